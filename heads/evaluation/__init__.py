"""Rows to score and their scores: splits, folds, copies and rare classes; metrics and statistics."""
