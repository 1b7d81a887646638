"""Training a head: the loop, its batches, the linear head."""
