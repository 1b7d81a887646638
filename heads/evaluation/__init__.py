"""Scores and what they are scores of: metrics, statistics, splits, folds, copies."""
