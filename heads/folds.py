"""Folds that keep copies on one side."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import DataError, MmcliError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fit: to learn from, to stop by, to score on."""

    repeat: int
    fold: int
    train: Indices
    stop: Indices
    test: Indices


def group_folds(classes: Indices, groups: Indices, folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Return (inside, outside) row numbers of stratified folds that part no group.

    The groups are dealt out by scikit-learn's ``StratifiedKFold``, each with the class of its first row.
    ``StratifiedGroupKFold`` does the same with a loop over groups that takes minutes for a million pairs. A class with
    fewer groups than folds is missing in some.

    Parameters
    ----------
    classes, groups
        (n,) each.
    folds
        At least 2, and no more than the groups of the largest class.
    seed
        Of the shuffling.
    """
    from sklearn.model_selection import StratifiedKFold

    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's on classes with fewer groups than folds
        dealer = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)
        dealt = list(dealer.split(np.zeros(len(first)), classes[first]))
    rows = [[np.flatnonzero(np.isin(group_of, part)) for part in parts] for parts in dealt]
    return [(inside, outside) for inside, outside in rows]


def groups_per_class(classes: Indices, groups: Indices, n_classes: int) -> Indices:
    """Count the groups of each class, (C,), each group by the class of its first row."""
    _, first = np.unique(groups, return_index=True)
    return np.bincount(classes[first], minlength=n_classes)


def check_folds(classes: Indices, groups: Indices, names: Sequence[str], folds: int, remedy: str) -> None:
    """Refuse to make folds of which some would lack a class.

    Raises
    ------
    DataError
        Naming the class that is too small, how many rows it has, copies counted once, and the remedy.
    """
    rows = groups_per_class(classes, groups, len(names))
    if np.count_nonzero(np.bincount(classes, minlength=len(names))) < 2:
        raise DataError(
            f"all {len(classes)} labelled pairs are {names[int(np.argmax(rows))]!r}: two classes are needed"
        )
    rarest = int(np.argmin(rows))
    if rows[rarest] < folds:
        raise DataError(
            f"class {names[rarest]!r} has {rows[rarest]} rows (copies counted once), fewer than the {folds} folds: "
            f"{remedy}, label more of it, or take it out"
        )


def repeated_folds(
    classes: Indices, groups: Indices, names: Sequence[str], folds: int, repeats: int, seed: int
) -> list[Fold]:
    """Return repeated stratified group k-fold, each training part less a tenth to stop by.

    Parameters
    ----------
    classes, groups
        Class number and group number of each row, (n,) each.
    names
        Of the classes.
    folds, repeats
        At least 2, at least 1.
    seed
        Repeat r is shuffled by ``seed + r``.

    Raises
    ------
    DataError
        A class is too small, or ends up missing from a part.
    MmcliError
        Too few folds or repeats.
    """
    if folds < 2 or repeats < 1:
        raise MmcliError(f"at least 2 folds and 1 repeat are needed, found {folds} and {repeats}")
    check_folds(classes, groups, names, folds, "ask for fewer folds")
    made = []
    for repeat in range(repeats):
        for number, (inside, test) in enumerate(group_folds(classes, groups, folds, seed + repeat)):
            train, stop = _less_a_tenth(classes[inside], groups[inside], seed + repeat)
            fold = Fold(repeat, number, inside[train], inside[stop], test)
            for what, rows in (("training", fold.train), ("test", fold.test)):
                missing = sorted(set(range(len(names))) - set(classes[rows].tolist()))
                if missing:
                    raise DataError(
                        f"class {names[missing[0]]!r} has no row in a {what} part of the folds: its rows are too few, "
                        "or copies of rows of other classes; label more of it, or take it out"
                    )
            made.append(fold)
    return made


def _less_a_tenth(classes: Indices, groups: Indices, seed: int) -> tuple[Indices, Indices]:
    """Return (nine tenths to learn from, a tenth to stop by), no group in both.

    A class too rare to be in the tenth gives it one of its groups, where it has another to learn from.
    """
    n_classes = int(classes.max()) + 1
    counts = groups_per_class(classes, groups, n_classes)
    if counts.max() < 2:
        raise DataError(f"{len(classes)} training rows are too few to keep some of them to stop by: label more")
    train, stop = group_folds(classes, groups, int(min(10, counts.max())), seed)[0]
    _, first = np.unique(groups, return_index=True)
    for each in np.flatnonzero(counts):
        group = groups[first[np.flatnonzero(classes[first] == each)[0]]]
        if each not in classes[train]:
            train = np.union1d(train, np.flatnonzero(groups == group))
            stop = np.setdiff1d(stop, train)
        elif each not in classes[stop] and counts[each] >= 2:
            stop = np.union1d(stop, np.flatnonzero(groups == group))
            train = np.setdiff1d(train, stop)
    return train, stop


def folds_of(folds: Sequence[Fold], n: int) -> Indices:
    """Return which fold scores each row, (R, n)."""
    found = np.zeros((max(fold.repeat for fold in folds) + 1, n), dtype=np.int64)
    for fold in folds:
        found[fold.repeat, fold.test] = fold.fold
    return found
