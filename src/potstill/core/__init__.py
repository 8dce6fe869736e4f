"""Settings, records, the artifact store, errors and events; nothing here imports torch."""
