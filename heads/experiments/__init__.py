"""Experiments on cached features: compare fusions, ablate modalities and sweep settings, all on the same folds.

Start reading at ``comparison.py``: it makes folds, fits every candidate on each fold (``fits.py``), and tests the
differences (``heads/evaluation/statistics.py``).
"""

from ..evaluation.statistics import bootstrap_p, corrected_t, holm, paired_bootstrap
from .candidates import Candidate, all_fusions, candidates_of, modalities_of
from .comparison import compare, single_split
from .setup import Protocol, Setup
from .tuning import grid_of, sweep

__all__ = [
    "Candidate",
    "Protocol",
    "Setup",
    "all_fusions",
    "bootstrap_p",
    "candidates_of",
    "compare",
    "corrected_t",
    "grid_of",
    "holm",
    "modalities_of",
    "paired_bootstrap",
    "single_split",
    "sweep",
]
