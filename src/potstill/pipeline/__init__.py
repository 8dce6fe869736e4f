"""The graph of steps, its fingerprints, the runner and the run folder."""
