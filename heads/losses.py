"""Class weights for imbalanced labels."""

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import MmcliError

ClassWeights = Literal["none", "inverse", "sqrt", "effective"]

_BETA = 0.999  # of the effective number; Cui et al. use 0.9 to 0.9999


def class_weights(counts: NDArray[np.int64], kind: str) -> NDArray[np.float32]:
    """Return a weight per class, (C,) float32, with mean 1, from the classes' counts in the training rows.

    ``none``: all 1. ``inverse``: proportional to 1 / count. ``sqrt``: the square root of those, as the reference has
    it. ``effective``: (1 - b) / (1 - b ** count), b = 0.999 (Cui et al., Class-Balanced Loss Based on Effective Number
    of Samples, CVPR 2019).

    Raises
    ------
    MmcliError
        For a kind that is none of these.
    """
    if (counts == 0).any():
        raise MmcliError(f"class number {int(np.argmin(counts))} has no training row")
    rows = counts.astype(np.float64)
    if kind == "none":
        weights = np.ones_like(rows)
    elif kind == "inverse":
        weights = 1 / rows
    elif kind == "sqrt":
        weights = np.sqrt(1 / rows)
    elif kind == "effective":
        weights = (1 - _BETA) / (1 - _BETA**rows)
    else:
        raise MmcliError(f"unknown class weights {kind!r}: choose one of {', '.join(get_args(ClassWeights))}")
    return (weights / weights.mean()).astype(np.float32)
