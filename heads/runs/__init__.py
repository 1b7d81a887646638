"""From a cache and labels to a run folder, and from its best.pt to scores and predictions."""
