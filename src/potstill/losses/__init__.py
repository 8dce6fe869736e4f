"""Losses and token metrics as pure functions of logits, and the chunked head that feeds them."""
