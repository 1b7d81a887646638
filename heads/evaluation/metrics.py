"""Scores of a classifier, each with a bootstrap interval.

Everything is computed from confusion matrices, so that thousands of bootstrap replicates cost one array operation.
scikit-learn is the witness in the tests.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import MmcliError
from .resampling import Units, units_of

REPLICATES = 2000
LEVEL = 0.95
_BOOTSTRAP_CELLS = 4_000_000  # cells of all matrices drawn at once


def softmax(logits: NDArray[Any]) -> NDArray[np.float64]:
    """Return probabilities, (n, C) float64, of logits (n, C). Rows sum to 1 within rounding, as scikit-learn asks."""
    exact = logits.astype(np.float64)
    exponentials = np.exp(exact - exact.max(axis=1, keepdims=True))
    probs: NDArray[np.float64] = exponentials / exponentials.sum(axis=1, keepdims=True)
    return probs


def confusion_matrix(true: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """Count pairs of classes: (C, C) int64, rows true, columns predicted. Both inputs are (n,) class numbers."""
    counts = np.bincount(true * n_classes + predicted, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes).astype(np.int64)


def f1_of(hits: NDArray[Any], total: NDArray[Any]) -> NDArray[np.float64]:
    """F1 = 2 hits / total, total being how often a class occurs plus how often it is predicted; NaN where that is 0."""
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)


def f1_per_class(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """F1 of each class, (..., C) float64, from confusion matrices (..., C, C).

    F1 = 2 TP / (2 TP + FP + FN), and NaN for a class without a row, also where it is predicted: nothing says how well
    its rows would be found. Such predictions count as errors of the classes that the rows have.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support = confusion.sum(axis=-1)
    return np.where(support > 0, f1_of(hits, support + confusion.sum(axis=-2)), np.nan)


def macro_f1(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Mean of the F1 of the classes that have rows, (...,) float64, from (..., C, C).

    A bootstrap replicate that misses a rare class says nothing about it; counting it as 0 would bend the interval.
    """
    return np.nanmean(f1_per_class(confusion), axis=-1)


def accuracy(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Share of rows on the diagonal, (...,) float64, from confusion matrices (..., C, C)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1)
    return hits / np.maximum(confusion.sum(axis=(-2, -1)), 1)


def quick_scores(true: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> dict[str, float]:
    """Return macro-F1 and accuracy, without intervals, of class numbers (n,) each."""
    confusion = confusion_matrix(true, predicted, n_classes)
    return {"macro_f1": float(macro_f1(confusion)), "accuracy": float(accuracy(confusion))}


def bootstrap_scores(units: Units, n_classes: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """F1 per class, (R, C), and accuracy, (R,), of bootstrap replicates, in bounded memory.

    The kinds of rows in ``units`` are the C x C cells of the confusion matrix.
    """
    at_once = max(1, min(REPLICATES, _BOOTSTRAP_CELLS // len(units.counts)))
    f1, hits = [], []
    for start in range(0, REPLICATES, at_once):
        generator = np.random.default_rng(seed + start)
        drawn = units.draw(generator, min(at_once, REPLICATES - start)).reshape(-1, n_classes, n_classes)
        f1.append(f1_per_class(drawn))
        hits.append(accuracy(drawn))
    return np.concatenate(f1), np.concatenate(hits)


def interval(values: NDArray[np.float64], level: float = LEVEL) -> list[float]:
    """Percentile interval [low, high] of bootstrap replicates (R,)."""
    tail = (1 - level) / 2
    return [float(np.nanquantile(values, tail)), float(np.nanquantile(values, 1 - tail))]


def score(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    classes: Sequence[str],
    groups: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Score predictions against truth.

    Parameters
    ----------
    true, predicted
        Class numbers, (n,) int64 each.
    classes
        Names, in the order of the numbers.
    groups
        (n,) group number of each row, from 0: rows with the same number are copies, and the bootstrap draws them
        together; default: no copies.
    seed
        Seed for the bootstrap.

    Returns
    -------
    dict
        ``n``, ``n_groups``, ``macro_f1``, ``macro_f1_ci``, ``accuracy``, ``accuracy_ci`` (95 % percentile bootstrap
        over groups), ``per_class`` (precision, recall, f1, f1_ci, support, and the groups that hold a row of the
        class; None for the F1 of a class without a row), ``confusion`` (rows true, columns predicted).

    Raises
    ------
    MmcliError
        There is no row.
    """
    if not len(true):
        raise MmcliError("there is no row to score: a score needs at least one")
    n_classes = len(classes)
    confusion = confusion_matrix(true, predicted, n_classes)
    units = units_of(true * n_classes + predicted, n_classes**2, groups)
    f1_replicates, accuracy_replicates = bootstrap_scores(units, n_classes, seed)
    hits, support, called = np.diagonal(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    of_class = support if groups is None else _groups_by_class(true, groups, n_classes)
    f1 = f1_per_class(confusion)
    return {
        "n": len(true),
        "n_groups": int(units.counts.sum()),
        "macro_f1": float(macro_f1(confusion)),
        "macro_f1_ci": interval(np.nanmean(f1_replicates, axis=1)),
        "accuracy": float(accuracy(confusion)),
        "accuracy_ci": interval(accuracy_replicates),
        "per_class": {
            name: {
                "precision": float(hits[k] / max(called[k], 1)),
                "recall": float(hits[k] / max(support[k], 1)),
                "f1": None if np.isnan(f1[k]) else float(f1[k]),
                "f1_ci": None if np.isnan(f1[k]) else interval(f1_replicates[:, k]),
                "support": int(support[k]),
                "groups": int(of_class[k]),
            }
            for k, name in enumerate(classes)
        },
        "confusion": confusion.tolist(),
    }


def _groups_by_class(true: NDArray[np.int64], groups: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """Count the groups that hold a row of each class, (C,)."""
    held = np.sort(groups * n_classes + true)
    return np.bincount(held[np.diff(held, prepend=-1) > 0] % n_classes, minlength=n_classes)
