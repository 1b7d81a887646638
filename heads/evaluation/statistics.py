"""Bootstrap over groups of copies, and tests of differences: spread of fits, Holm's correction, the corrected t."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

PAIRED_REPLICATES = 5000
_CELLS_AT_ONCE = 4_000_000  # bounds the memory of the replicates that are drawn together
_LEAST_IN_TAIL = 25  # a tail with fewer replicates is too small to be counted


def f1_from_counts(hits: NDArray[Any], total: NDArray[Any]) -> NDArray[np.float64]:
    """Return F1 = 2 hits / total, NaN where the total is 0.

    The total is how often a class occurs plus how often it is predicted.
    """
    return np.where(total > 0, 2 * hits / np.maximum(total, 1), np.nan)


@dataclass(frozen=True)
class ResamplingUnits:
    """The units that a bootstrap draws: whole groups of copies, because copies are not independent of each other.

    Each row is of one of P kinds; groups that hold the same kinds are counted together. ``counts``, (P + M,) int64,
    says how many groups are a single row, for each kind, then how many groups of several rows there are, for each of M
    different contents. ``contents``, (P, M), are the rows of each kind in such a group; None where there is none.
    """

    counts: NDArray[np.int64]
    contents: Any  # a csr_array; scipy is imported where it is needed
    n_kinds: int

    def blocks(self, replicates: int) -> Iterator[range]:
        """Yield the numbers of the replicates that fit in memory at once."""
        at_once = max(1, _CELLS_AT_ONCE // len(self.counts))
        for start in range(0, replicates, at_once):
            yield range(start, min(start + at_once, replicates))

    def draw(self, generator: np.random.Generator, replicates: int) -> NDArray[np.int64]:
        """Draw as many groups as there are, with replacement, and count their rows by kind: (replicates, P) int64.

        Drawing groups one by one and counting them (Efron 1979; for groups Davison and Hinkley, Bootstrap Methods and
        their Application, 1997, section 3.8) is the same as one multinomial draw over the kinds of groups.
        """
        n_groups = int(self.counts.sum())
        drawn = generator.multinomial(n_groups, self.counts / max(n_groups, 1), size=replicates)
        if self.contents is None:
            return drawn
        rows_of_copies: NDArray[np.int64] = (self.contents @ drawn[:, self.n_kinds :].T).T
        return drawn[:, : self.n_kinds] + rows_of_copies


def resampling_units(
    kinds: NDArray[np.int64], n_kinds: int, groups: NDArray[np.int64] | None = None
) -> ResamplingUnits:
    """Count the groups of rows by the kinds that they hold.

    ``kinds``, (n,), are below ``n_kinds``. ``groups``, (n,) from 0, has one number for all copies; default: no copies.
    """
    if groups is None:
        return ResamplingUnits(np.bincount(kinds, minlength=n_kinds), None, n_kinds)
    group_sizes = np.bincount(groups)
    size_of_row = group_sizes[groups]
    single = np.bincount(kinds[size_of_row == 1], minlength=n_kinds)
    counts, members, ends = [single], [], [np.zeros(1, dtype=np.int64)]
    for size in (2 + np.flatnonzero(np.bincount(group_sizes)[2:])).tolist():
        contents, n_alike = _contents_of_groups(kinds, groups, np.flatnonzero(size_of_row == size), size)
        counts.append(n_alike)
        members.append(contents.ravel())
        ends.append(ends[-1][-1] + size * np.arange(1, len(contents) + 1))
    if not members:
        return ResamplingUnits(single, None, n_kinds)
    from scipy.sparse import csc_array

    rows, columns = np.concatenate(members), np.concatenate(ends)
    matrix = csc_array((np.ones(len(rows), dtype=np.int64), rows, columns), shape=(n_kinds, len(columns) - 1))
    return ResamplingUnits(np.concatenate(counts), matrix.tocsr(), n_kinds)


def _contents_of_groups(
    kinds: NDArray[np.int64], groups: NDArray[np.int64], rows: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the contents of the groups that ``rows`` form, all of one ``size``, and how many groups hold each, (M,).

    The contents are (M, size), each a sorted list of kinds.
    """
    by_group = rows[np.lexsort((kinds[rows], groups[rows]))]
    contents = np.ascontiguousarray(kinds[by_group].astype(np.int64).reshape(-1, size))
    as_bytes = contents.view(f"V{contents.itemsize * size}").ravel()  # one value for each group, faster than rows
    _, first, n_alike = np.unique(as_bytes, return_index=True, return_counts=True)
    return contents[first], n_alike


class Replicates(NamedTuple):
    """Scores of K candidates in B bootstrap replicates: f1 and recall (B, K, C), macro_f1 and accuracy (B, K)."""

    f1: NDArray[np.float64]
    recall: NDArray[np.float64]
    macro_f1: NDArray[np.float64]
    accuracy: NDArray[np.float64]


def paired_bootstrap(
    true: NDArray[np.int64],
    predicted: NDArray[np.int64],
    n_classes: int,
    seed: int,
    replicates: int = PAIRED_REPLICATES,
    groups: NDArray[np.int64] | None = None,
) -> Replicates:
    """Score K candidates on the same resampled groups (Efron 1979; paired: every candidate sees the same draw).

    As on the original rows, a candidate's score in a replicate is the mean over its repeats. Rows are of one kind (see
    ``ResamplingUnits``) if they have the same class and every candidate predicts the same for them in every repeat. The
    macro-F1 of a replicate leaves out a class without a row.

    Parameters
    ----------
    true, predicted
        Class numbers, (n,), and those that each candidate predicts in each of R repeats, (K, R, n).
    groups
        (n,), from 0, with one number for all copies, which are drawn together. Default: no copies.
    """
    n_candidates, n_repeats, n = predicted.shape
    table = np.column_stack([true, *predicted.reshape(-1, n)])
    patterns, kinds = np.unique(table, axis=0, return_inverse=True)
    units = resampling_units(kinds.reshape(-1), len(patterns), groups)
    predicted_by_kind = patterns[:, 1:].T.reshape(n_candidates, n_repeats, -1)
    generator = np.random.default_rng(seed)
    blocks = []
    for block in units.blocks(replicates):
        drawn = units.draw(generator, len(block)).astype(np.float64)
        blocks.append(_score_block(drawn, patterns[:, 0], predicted_by_kind, n_classes))
    return Replicates(*map(np.concatenate, zip(*blocks, strict=True)))


def _score_block(
    drawn: NDArray[np.float64], true: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int
) -> Replicates:
    """Score replicates (B, P), which count the rows of each of P kinds; ``true`` is (P,), ``predicted`` (K, R, P)."""
    numbers = np.arange(n_classes)
    is_true = (true[:, None] == numbers).astype(np.float64)
    n_rows, support = drawn.sum(axis=1), drawn @ is_true
    support = np.where(support > 0, support, np.nan)  # a replicate without a class says nothing about it
    by_candidate = []
    for repeats in predicted:
        by_repeat = []
        for repeat in repeats:
            is_predicted = (repeat[:, None] == numbers).astype(np.float64)
            hits = drawn @ (is_predicted * is_true)
            f1 = f1_from_counts(hits, drawn @ is_predicted + support)
            by_repeat.append((f1, hits / support, hits.sum(axis=1) / n_rows))
        by_candidate.append([np.mean(scores, axis=0) for scores in zip(*by_repeat, strict=True)])
    f1, recall, accuracy = (np.stack(scores, axis=1) for scores in zip(*by_candidate, strict=True))
    return Replicates(f1, recall, np.nanmean(f1, axis=2), accuracy)


def influence(true: NDArray[np.int64], predicted: NDArray[np.int64], n_classes: int) -> NDArray[np.float64]:
    """Return how much each row moves macro-F1, (n,), mean 0: n times the derivative by the row's weight.

    F1 = 2 TP / (S + P) with support S and predicted count P. A row moves it by (2 tp - F1 (s + p)) / (S + P), where
    tp, s and p are 1 if the row counts in TP, S and P, else 0.
    """
    numbers = np.arange(n_classes)
    is_true, is_predicted = (rows[:, None] == numbers for rows in (true, predicted))
    total = is_true.sum(axis=0) + is_predicted.sum(axis=0)
    hits = is_true & is_predicted
    f1 = f1_from_counts(hits.sum(axis=0), total)
    moves = (2.0 * hits - f1 * (is_true.astype(np.float64) + is_predicted)) / np.maximum(total, 1)
    return len(true) * moves[:, is_true.any(axis=0)].mean(axis=1)


@dataclass(frozen=True)
class FitSpread:
    """How much of the variance of a mean over folds and repeats comes from the fits.

    ``between`` is the variance of the mean, estimated from the differences between folds with ``freedom`` degrees of
    freedom. It includes rows and fits. ``within`` is the part of it that the rows explain.
    """

    between: float
    within: float
    freedom: int

    def variances(self, chi_squares: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return possible variances of the fits, one for each chi-square with ``freedom`` degrees of freedom.

        ``between`` is an estimate: the true variance times a chi-square over its degrees of freedom. Dividing by
        chi-squares gives the true variances that fit the folds (the generalized p values of Tsui and Weerahandi,
        Journal of the American Statistical Association 1989). Where such a variance is below the variance of the rows,
        the fits have none.
        """
        return np.maximum(self.between * self.freedom / chi_squares - self.within, 0.0)


def fit_spread(
    influences: NDArray[np.float64], fold_of: NDArray[np.int64], groups: NDArray[np.int64] | None = None
) -> FitSpread:
    """Return how much the fits vary beyond what their rows explain.

    Resampling rows takes the fits as given. A fit with another seed would have been better or worse on all its rows.
    Folds that differ by more than their rows explain show how much: the between-group component of a one-way analysis
    of variance (Searle, Casella and McCulloch, Variance Components, 1992, section 3.6), with a fold as a group. Copies
    move together, so the rows of a fold vary by the sums over its groups of copies.

    ``influences``, (R, n) with mean 0 in each repeat, are those of each row on a score, or on a difference of two
    scores. ``fold_of``, (R, n), is the fold of each row. ``groups``, (n,) from 0, has one number for all copies, which
    are in one fold; default: no copies.
    """
    n_repeats, n = influences.shape
    group_of = np.arange(n) if groups is None else groups
    group_sizes = np.bincount(group_of)
    between = within = squared_sizes = freedom_within = 0.0
    n_folds = 0
    for repeat in range(n_repeats):
        sizes = np.bincount(fold_of[repeat])
        means = np.bincount(fold_of[repeat], influences[repeat]) / sizes
        between += float((sizes * means**2).sum())
        group_sums = np.bincount(group_of, influences[repeat] - means[fold_of[repeat]])
        within += float((group_sums**2).sum())
        freedom_within += n - float((np.bincount(fold_of[repeat], group_sizes[group_of]) / sizes).sum())
        squared_sizes += float((sizes**2).sum())
        n_folds += len(sizes)
    freedom = n_folds - n_repeats
    mean_size = (n_repeats * n - squared_sizes / n) / freedom  # corrected for folds of unequal size
    scale = squared_sizes / mean_size / (n_repeats * n) ** 2  # from a mean square to the variance of the mean
    return FitSpread(scale * between / freedom, scale * within / max(freedom_within, 1.0), freedom)


def with_fits(drawn: NDArray[np.float64], spread: FitSpread, seed: int) -> NDArray[np.float64]:
    """Add the variance of the fits to bootstrap replicates (B,) of a score or difference that were drawn over rows."""
    generator = np.random.default_rng(seed)
    variances = spread.variances(generator.chisquare(spread.freedom, len(drawn)))
    return drawn + np.sqrt(variances) * generator.standard_normal(len(drawn))


def tail_p(drawn: NDArray[np.float64], spread: FitSpread, n_differ: int) -> float:
    """Return the two-sided p of "no difference" where too few replicates lie beyond 0 to be counted.

    A difference in macro-F1 is a smooth function of means over groups. So its tail over rows is that of Student's t,
    with one degree of freedom less than there are groups on which the candidates differ. The tail is averaged over the
    possible variances of the fits, by integration: chi-squares small enough to matter are too rare to be drawn.

    ``drawn`` are bootstrap differences over rows alone, (B,), and ``n_differ`` is the number of groups on which the two
    candidates differ. No p is below 2 ** (1 - n_differ), the chance that all of them favour one side: a sign test
    cannot give less.
    """
    from scipy.special import gammaincinv, stdtr

    least = 2.0 ** (1 - n_differ)
    if n_differ < 2 or drawn.var() == 0:
        return min(1.0, least)
    shares = np.geomspace(1e-14, 1.0, 1001)  # cumulative probabilities of the chi-squares, dense near 0
    chi_squares = 2 * gammaincinv(spread.freedom / 2, (shares[1:] + shares[:-1]) / 2)
    deviations = np.sqrt(drawn.var() + spread.variances(chi_squares))
    beyond = float(np.diff(shares) @ stdtr(n_differ - 1, -abs(drawn.mean()) / deviations))
    return min(1.0, max(2 * beyond, least))


def bootstrap_p(differences: NDArray[np.float64], computed: float | None = None) -> float:
    """Return the two-sided p of "no difference" from bootstrap differences (B,): twice the smaller tail beyond 0.

    ``computed`` is the p to return where the tail holds too few replicates to be counted (see ``tail_p``). Default:
    count them anyway, so that no p is below 2 / (B + 1).
    """
    below, above = np.count_nonzero(differences <= 0), np.count_nonzero(differences >= 0)
    if computed is not None and min(below, above) < _LEAST_IN_TAIL:
        return computed
    return float(min(1.0, 2 * (min(below, above) + 1) / (len(differences) + 1)))


def holm(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Adjust p values, (m,), for their number (Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979)."""
    order = np.argsort(p_values)
    steps = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def corrected_t(differences: NDArray[np.float64], test_share: float) -> tuple[float, float]:
    """Return (t, two-sided p) of differences by fold, (J,), corrected for overlapping training rows.

    t = mean / sqrt((1 / J + n_test / n_train) variance) with J - 1 degrees of freedom (Nadeau and Bengio, Inference for
    the Generalization Error, Machine Learning 2003; for repeated folds Bouckaert and Frank 2004). ``differences`` has
    one for each fold and repeat, and ``test_share`` is n_test / n_train.
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
