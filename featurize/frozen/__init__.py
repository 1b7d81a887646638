"""The part of the backbone that stays frozen in stage 2. Its output is computed once per pair and kept on disk."""
