"""Sources and mixtures of records, their rendering to token ids and loss masks, and plans of batches."""
