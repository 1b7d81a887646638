"""Training a head: the loop, the optimizer, the linear head."""
