"""Scores of a classifier, each with a bootstrap interval.

Every score is computed from confusion matrices, so that one array operation scores thousands of bootstrap replicates.
The tests compare the scores with scikit-learn's.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import MmcliError
from .folds import groups_per_class
from .statistics import ResamplingUnits, f1_from_counts, resampling_units

REPLICATES = 2000
LEVEL = 0.95


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


def f1_per_class(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Return the F1 of each class, (..., C) float64, from confusion matrices (..., C, C).

    F1 = 2 TP / (2 TP + FP + FN). A class without a row has NaN, even where it is predicted, because nothing says how
    well its rows would be recognised. Such predictions still count as errors of the classes that the rows belong to.
    """
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    support = confusion.sum(axis=-1)
    return np.where(support > 0, f1_from_counts(hits, support + confusion.sum(axis=-2)), np.nan)


def macro_f1(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Return the mean F1 of the classes that have rows, (...,) float64, from confusion matrices (..., C, C).

    A bootstrap replicate without a rare class says nothing about that class; counting its F1 as 0 would distort the
    interval.
    """
    return np.nanmean(f1_per_class(confusion), axis=-1)


def accuracy(confusion: NDArray[Any]) -> NDArray[np.float64]:
    """Return the share of rows on the diagonal, (...,) float64, from confusion matrices (..., C, C)."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1).sum(axis=-1)
    return hits / np.maximum(confusion.sum(axis=(-2, -1)), 1)


def quick_scores(true: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> dict[str, float]:
    """Return macro-F1 and accuracy, without intervals, of class numbers (n,) each."""
    confusion = confusion_matrix(true, predicted, n_classes)
    return {"macro_f1": float(macro_f1(confusion)), "accuracy": float(accuracy(confusion))}


def bootstrap_scores(
    units: ResamplingUnits, n_classes: int, seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return F1 per class, (B, C), and accuracy, (B,), of B bootstrap replicates, in bounded memory.

    The kinds of rows in ``units`` are the C x C cells of the confusion matrix.
    """
    f1, accuracies = [], []
    for block in units.blocks(REPLICATES):
        generator = np.random.default_rng(seed + block.start)
        confusions = units.draw(generator, len(block)).reshape(-1, n_classes, n_classes)
        f1.append(f1_per_class(confusions))
        accuracies.append(accuracy(confusions))
    return np.concatenate(f1), np.concatenate(accuracies)


def interval(values: NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """Return the percentile interval (low, high) of bootstrap replicates (B,)."""
    tail = (1 - level) / 2
    return float(np.nanquantile(values, tail)), float(np.nanquantile(values, 1 - tail))


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class.

    Attributes
    ----------
    f1, f1_ci
        F1 and its 95 % interval; None for a class without a row.
    support, groups
        Number of rows of the class, and of groups of copies that hold one of them.
    """

    precision: float
    recall: float
    f1: float | None
    f1_ci: tuple[float, float] | None
    support: int
    groups: int


@dataclass(frozen=True)
class Scores:
    """Scores of predictions, with 95 % percentile bootstrap intervals over groups of copies.

    Attributes
    ----------
    n, n_groups
        Number of rows, and of groups of copies.
    confusion
        (C, C) counts; rows true, columns predicted.
    """

    n: int
    n_groups: int
    macro_f1: float
    macro_f1_ci: tuple[float, float]
    accuracy: float
    accuracy_ci: tuple[float, float]
    per_class: dict[str, ClassScores]
    confusion: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data."""
        return asdict(self)


def score(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    classes: Sequence[str],
    groups: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> Scores:
    """Score predicted classes against the true ones; raise an MmcliError if there is no row.

    Parameters
    ----------
    true, predicted
        Class numbers, (n,) int64 each.
    classes
        Names, in the order of the numbers.
    groups
        (n,) group number of each row, from 0. Rows with the same number are copies, and the bootstrap draws them
        together. Default: no copies.
    seed
        Seed for the bootstrap.
    """
    if not len(true):
        raise MmcliError("there is no row to score: a score needs at least one")
    n_classes = len(classes)
    confusion = confusion_matrix(true, predicted, n_classes)
    units = resampling_units(true * n_classes + predicted, n_classes**2, groups)
    f1_replicates, accuracy_replicates = bootstrap_scores(units, n_classes, seed)
    n_groups = confusion.sum(axis=1) if groups is None else groups_per_class(true, groups, n_classes)
    per_class = {}
    for number, name in enumerate(classes):
        hits, support, called = confusion[number, number], confusion[number].sum(), confusion[:, number].sum()
        per_class[name] = ClassScores(
            precision=float(hits / max(called, 1)),
            recall=float(hits / max(support, 1)),
            f1=float(f1_from_counts(hits, support + called)) if support else None,
            f1_ci=interval(f1_replicates[:, number]) if support else None,
            support=int(support),
            groups=int(n_groups[number]),
        )
    return Scores(
        n=len(true),
        n_groups=int(units.counts.sum()),
        macro_f1=float(macro_f1(confusion)),
        macro_f1_ci=interval(np.nanmean(f1_replicates, axis=1)),
        accuracy=float(accuracy(confusion)),
        accuracy_ci=interval(accuracy_replicates),
        per_class=per_class,
        confusion=confusion.tolist(),
    )
