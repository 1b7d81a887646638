"""The part of the backbone that stays frozen in stage 2: what leaves it is computed once per pair and kept."""
