"""Teacher logits on disk: what is kept of each token's distribution, and the sealed shards that hold it."""
