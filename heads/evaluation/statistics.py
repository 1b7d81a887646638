"""Which differences are real: paired bootstrap, Holm's correction, the corrected t of cross-validation."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .metrics import f1_of
from .resampling import units_of

REPLICATES = 5000
_CELLS = 4_000_000  # numbers drawn at once
_COUNTED = 25  # replicates that a tail must hold for its share to be counted


@dataclass(frozen=True)
class Replicates:
    """Scores of B bootstrap replicates of K candidates: f1, recall (B, K, C), macro_f1, accuracy (B, K)."""

    f1: NDArray[np.float64]
    recall: NDArray[np.float64]
    macro_f1: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def paired_bootstrap(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    n_classes: int,
    seed: int,
    replicates: int = REPLICATES,
    groups: NDArray[np.int64] | None = None,
) -> Replicates:
    """Score K candidates on the same resampled groups (Efron 1979; paired: every candidate sees the same draw).

    A candidate's score in a replicate is the mean over its repeats, as its score on the rows themselves is. Rows on
    which everything agrees, the class and what each candidate says in each repeat, are of one kind (see
    ``resampling``).

    Parameters
    ----------
    true
        Class numbers, (n,).
    predicted
        (K, R, n): of each candidate in each of R repeats.
    n_classes
        C.
    groups
        (n,) group number of each row, from 0: rows with the same number are copies, and drawn together; default: no
        copies.

    Returns
    -------
    Replicates
        A class of which a replicate has no row is left out of its macro-F1.
    """
    n_candidates, n_repeats, n = predicted.shape
    table = np.column_stack([true, *predicted.reshape(-1, n)])
    patterns, kinds = np.unique(table, axis=0, return_inverse=True)
    units = units_of(kinds.reshape(-1), len(patterns), groups)
    is_class = np.arange(n_classes)
    support_of = (patterns[:, :1] == is_class).astype(np.float64)  # (P, C)
    generator = np.random.default_rng(seed)
    at_once = max(1, min(replicates, _CELLS // len(units.counts)))
    f1, recall, accuracy = [], [], []
    for start in range(0, replicates, at_once):
        drawn = units.draw(generator, min(at_once, replicates - start)).astype(np.float64)
        rows = drawn.sum(axis=1)
        support = drawn @ support_of
        f1_block = np.empty((len(drawn), n_candidates, n_classes))
        recall_block = np.zeros_like(f1_block)
        of_class = np.where(support > 0, support, np.nan)  # a replicate without a class says nothing of its recall
        accuracy_block = np.empty((len(drawn), n_candidates))
        for candidate in range(n_candidates):
            of_repeats, right = [], np.zeros(len(drawn))
            for repeat in range(n_repeats):
                says = (patterns[:, 1 + candidate * n_repeats + repeat, None] == is_class).astype(np.float64)
                hits = drawn @ (says * support_of)
                of_repeats.append(np.where(support > 0, f1_of(hits, drawn @ says + support), np.nan))
                recall_block[:, candidate] += hits / of_class / n_repeats
                right += hits.sum(axis=1) / rows
            f1_block[:, candidate] = np.mean(of_repeats, axis=0)
            accuracy_block[:, candidate] = right / n_repeats
        f1.append(f1_block)
        recall.append(recall_block)
        accuracy.append(accuracy_block)
    joined = np.concatenate(f1)
    return Replicates(joined, np.concatenate(recall), np.nanmean(joined, axis=2), np.concatenate(accuracy))


def influence(true: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> NDArray[np.float64]:
    """Return by how much each row moves macro-F1, (n,), mean 0: n times its derivative by the row's weight.

    F1 = 2 TP / (S + P), with support S and predicted count P, gives (2 tp - F1 (s + p)) / (S + P) for a row, tp, s and
    p being 1 where the row counts there.
    """
    is_class = np.arange(n_classes)
    support, called = (rows[:, None] == is_class for rows in (true, predicted))
    total = support.sum(axis=0) + called.sum(axis=0)
    hits = support & called
    f1 = f1_of(hits.sum(axis=0), total)
    moved = (2.0 * hits - f1 * (support.astype(np.float64) + called)) / np.maximum(total, 1)
    return len(true) * moved[:, support.any(axis=0)].mean(axis=1)


@dataclass(frozen=True)
class FitSpread:
    """How much of the variance of a mean over folds and repeats comes from the fits.

    Attributes
    ----------
    between
        Variance of the mean as the differences between folds show it, rows and fits together.
    within
        The part of it that the rows explain.
    freedom
        Degrees of freedom of ``between``.
    """

    between: float
    within: float
    freedom: int

    def variances(self, chi_squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the variance that comes from the fits, one per chi-square with ``freedom`` degrees of freedom.

        ``between`` is an estimate: it is the true variance times a chi-square over its degrees of freedom. Dividing by
        chi-squares gives the true variances that fit the folds seen (the generalized p values of Tsui and Weerahandi,
        Journal of the American Statistical Association 1989). A variance below that of the rows means no variance of
        the fits.
        """
        return np.maximum(self.between * self.freedom / chi_squares - self.within, 0.0)


def fit_spread(
    influences: NDArray[np.float64], fold_of: NDArray[np.int64], groups: NDArray[np.int64] | None = None
) -> FitSpread:
    """Return how much the fits vary beyond what their rows explain.

    Resampling rows takes the fits as given. But a fit with another seed would have been another, better or worse on all
    its rows. How much, is seen where folds differ by more than their rows explain: the between-group component of a
    one-way analysis of variance (Searle, Casella and McCulloch, Variance Components, 1992, section 3.6), one fold being
    one group. Copies move together, so the rows of a fold vary by the sums of its groups of copies.

    Parameters
    ----------
    influences
        (R, n), mean 0 in each repeat: of a score, or of a difference of two.
    fold_of
        (R, n): which fold each row is in.
    groups
        (n,) group number of each row, from 0: rows with the same number are copies, and in one fold; default: no
        copies.
    """
    n_repeats, n = influences.shape
    group_of = np.arange(n) if groups is None else groups
    group_sizes = np.bincount(group_of)
    between = within = squares = freedom_within = 0.0
    n_folds = 0
    for repeat in range(n_repeats):
        sizes = np.bincount(fold_of[repeat])
        means = np.bincount(fold_of[repeat], influences[repeat]) / sizes
        between += float((sizes * means**2).sum())
        sums = np.bincount(group_of, influences[repeat] - means[fold_of[repeat]])
        within += float((sums**2).sum())
        freedom_within += n - float((np.bincount(fold_of[repeat], group_sizes[group_of]) / sizes).sum())
        squares += float((sizes**2).sum())
        n_folds += len(sizes)
    freedom = n_folds - n_repeats
    size = (n_repeats * n - squares / n) / freedom  # the mean size of a fold, corrected for unequal ones
    of_mean = squares / size / (n_repeats * n) ** 2
    return FitSpread(of_mean * between / freedom, of_mean * within / max(freedom_within, 1.0), freedom)


def with_fits(drawn: NDArray[np.float64], spread: FitSpread, seed: int) -> NDArray[np.float64]:
    """Return bootstrap replicates (B,) of a score or difference, rows drawn already, with fits drawn too."""
    generator = np.random.default_rng(seed)
    variances = spread.variances(generator.chisquare(spread.freedom, len(drawn)))
    return drawn + np.sqrt(variances) * generator.standard_normal(len(drawn))


def tail_p(drawn: NDArray[np.float64], spread: FitSpread, n_differ: int) -> float:
    """Two-sided p of "no difference" far out, where hardly a replicate lies.

    A difference in macro-F1 is a smooth function of means over groups, so over rows its tail is Student's t, with one
    degree of freedom less than there are groups on which the two differ. The variance of the fits is mixed in. The
    mixture is computed, not drawn: far out it depends on chi-squares that are too small to be drawn.

    Parameters
    ----------
    drawn
        Bootstrap differences over rows alone, (B,).
    n_differ
        Groups on which the two differ. No p is below the chance that all of them favour one side, 2 ** (1 - n_differ):
        a test of signs could not be surer.
    """
    from scipy.special import gammaincinv, stdtr

    least = 2.0 ** (1 - n_differ)
    if n_differ < 2 or drawn.var() == 0:
        return min(1.0, least)
    shares = np.geomspace(1e-14, 1.0, 1001)  # of the chi-squares that are smaller
    chi_squares = 2 * gammaincinv(spread.freedom / 2, (shares[1:] + shares[:-1]) / 2)
    deviations = np.sqrt(drawn.var() + spread.variances(chi_squares))
    beyond = float(np.diff(shares) @ stdtr(n_differ - 1, -abs(drawn.mean()) / deviations))
    return min(1.0, max(2 * beyond, least))


def bootstrap_p(differences: NDArray[np.float64], beyond: float | None = None) -> float:
    """Two-sided p of "no difference" from bootstrap differences (B,): twice the smaller tail beyond 0.

    Parameters
    ----------
    beyond
        The p to return where the tail holds too few replicates to be counted (``tail_p``); default: count them anyway,
        so that no p is below 2 / (B + 1).
    """
    below, above = np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0)
    if beyond is not None and min(below, above) < _COUNTED:
        return beyond
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjust p values, (m,), for their number (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."""
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def corrected_t(differences: NDArray[np.float64], test_share: float) -> tuple[float, float]:
    """Return (t, two-sided p) of fold-wise differences, (J,), corrected for overlapping training rows.

    t = mean / sqrt((1 / J + n_test / n_train) variance) with J - 1 degrees of freedom (Nadeau and Bengio, Inference for
    the Generalization Error, Machine Learning 2003; for repeated folds Bouckaert and Frank 2004).

    Parameters
    ----------
    differences
        One per fold and repeat.
    test_share
        n_test / n_train.
    """
    from scipy.stats import t as student

    count = len(differences)
    if count < 2:
        return math.nan, math.nan
    variance = float(np.var(differences, ddof=1))
    mean = float(np.mean(differences))
    if variance == 0:
        return (0.0, 1.0) if mean == 0 else (math.copysign(math.inf, mean), 0.0)
    t = mean / math.sqrt((1 / count + test_share) * variance)
    return t, float(2 * student.sf(abs(t), count - 1))
