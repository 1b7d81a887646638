"""Folds that keep copies on one side."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError, MmcliError

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Fold:
    """Row numbers for one fit: rows to learn from, rows that decide when to stop, and rows to score."""

    repeat: int
    fold: int
    train: Indices
    stop: Indices
    test: Indices


def group_folds(classes: Indices, groups: Indices, folds: int, seed: int) -> list[tuple[Indices, Indices]]:
    """Return (inside, outside) row numbers of stratified folds that keep every group on one side.

    scikit-learn's ``StratifiedKFold`` deals out the groups, each with the class of its first row.
    ``StratifiedGroupKFold`` does the same with a loop over groups that takes minutes for a million pairs. A class with
    fewer groups than folds is missing from some folds.

    Parameters
    ----------
    classes, groups
        Class number and group number of each row, (n,) each.
    folds
        At least 2, and at most the number of groups.
    seed
        Seed for shuffling.
    """
    from sklearn.model_selection import StratifiedKFold

    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    strata = classes[first]
    if np.bincount(strata).max() < folds:  # scikit-learn needs one stratum with as many groups as folds
        strata = np.zeros_like(strata)
    fold_of_group = np.zeros(len(first), dtype=np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns about classes with fewer groups than folds
        dealer = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)
        for number, (_, outside) in enumerate(dealer.split(np.zeros(len(first)), strata)):
            fold_of_group[outside] = number
    fold_of = fold_of_group[group_of]
    return [(np.flatnonzero(fold_of != number), np.flatnonzero(fold_of == number)) for number in range(folds)]


def groups_per_class(classes: Indices, groups: Indices, n_classes: int) -> Indices:
    """Return the number of groups that hold a row of each class, (C,)."""
    group_of = np.unique(groups, return_inverse=True)[1]
    return np.bincount(np.unique(group_of * n_classes + classes) % n_classes, minlength=n_classes)


def rare_classes(classes: Indices, groups: Indices, needed: int) -> Indices:
    """Return the numbers of the classes with fewer than ``needed`` groups.

    Groups that hold a row of a rare class train only, so they do not count for any other class.
    """
    rare = np.zeros(0, dtype=np.int64)
    while True:
        rows = np.flatnonzero(~train_only(classes, groups, rare))
        scored = np.setdiff1d(classes, rare)
        counts = groups_per_class(classes[rows], groups[rows], int(classes.max()) + 1)
        too_few = scored[counts[scored] < needed]
        if not len(too_few):
            return rare
        rare = np.union1d(rare, too_few)


def train_only(classes: Indices, groups: Indices, rare: Indices) -> NDArray[np.bool_]:
    """Return which rows train only, (n,): rows of ``rare`` classes, and their copies in other classes."""
    if not len(rare):
        return np.zeros(len(classes), dtype=np.bool_)
    return np.isin(groups, groups[np.isin(classes, rare)])


def check_classes_left(
    classes: Indices, groups: Indices, names: Sequence[str], rare: Indices, needed: int, remedy: str
) -> None:
    """Raise a DataError where fewer than two classes have enough rows to be scored.

    Parameters
    ----------
    names
        Names of the classes.
    rare
        Numbers of the classes that have too few groups.
    needed
        How many groups a class needs.
    remedy
        What the user can do, other than label more.
    """
    present = np.unique(classes)
    if len(present) < 2:
        raise DataError(f"all {len(classes)} labelled pairs are {names[int(present[0])]!r}: two classes are needed")
    if len(present) - len(rare) >= 2:
        return
    counts = groups_per_class(classes, groups, len(names))
    listed = ", ".join(f"{names[number]!r} has {counts[number]}" for number in rare[:5])
    more = f" and {len(rare) - 5} more classes" if len(rare) > 5 else ""
    raise DataError(
        f"two classes with at least {needed} rows each are needed (copies counted once): class {listed}{more}; "
        f"label more of them{remedy}"
    )


def repeated_folds(
    classes: Indices, groups: Indices, names: Sequence[str], folds: int, repeats: int, seed: int
) -> list[Fold]:
    """Return repeated stratified group k-fold, with a tenth of each training part set aside as rows to stop by.

    A class with fewer groups than folds trains only: its rows, and their copies, are in every training part.

    Parameters
    ----------
    classes, groups
        Class number and group number of each row, (n,) each.
    names
        Names of the classes.
    folds, repeats
        At least 2 folds and 1 repeat.
    seed
        Repeat r is shuffled with ``seed + r``.

    Raises
    ------
    DataError
        Fewer than two classes have as many groups as there are folds.
    MmcliError
        Too few folds or repeats.
    """
    if folds < 2 or repeats < 1:
        raise MmcliError(f"at least 2 folds and 1 repeat are needed, found {folds} and {repeats}")
    rare = rare_classes(classes, groups, folds)
    check_classes_left(classes, groups, names, rare, folds, " or ask for fewer folds (--folds)")
    trains_only = train_only(classes, groups, rare)
    always, dealt = np.flatnonzero(trains_only), np.flatnonzero(~trains_only)
    all_folds = []
    for repeat in range(repeats):
        parts = group_folds(classes[dealt], groups[dealt], folds, seed + repeat)
        for number, (inside, test) in enumerate(parts):
            inside = dealt[inside]
            train, stop = _set_aside_tenth(classes[inside], groups[inside], seed + repeat)
            unseen = np.setdiff1d(classes[dealt], classes[inside[train]])
            if len(unseen):
                raise DataError(
                    f"class {names[int(unseen[0])]!r} has no row in a training part of the folds, because its rows are "
                    "copies of rows of other classes: correct their labels, or label more of it"
                )
            all_folds.append(Fold(repeat, number, np.union1d(inside[train], always), inside[stop], dealt[test]))
    return all_folds


def _set_aside_tenth(classes: Indices, groups: Indices, seed: int) -> tuple[Indices, Indices]:
    """Return (rows to learn from, rows to stop by), nine tenths and one tenth; every group is on one side.

    If a class has no row on a side, its first group moves there. A class with a single group stays on the training
    side.
    """
    n_classes = int(classes.max()) + 1
    counts = groups_per_class(classes, groups, n_classes)
    if counts.max() < 2:
        raise DataError(f"{len(classes)} training rows are too few to keep some of them to stop by: label more")
    _, tenth = group_folds(classes, groups, int(min(10, counts.max())), seed)[0]
    stops = np.zeros(len(classes), dtype=np.bool_)
    stops[tenth] = True
    rows_of_class = np.bincount(classes, minlength=n_classes)
    stopping = np.bincount(classes[stops], minlength=n_classes)
    for number, first_row in zip(*np.unique(classes, return_index=True), strict=True):
        not_learned = stopping[number] == rows_of_class[number]
        not_stopping = stopping[number] == 0 and counts[number] >= 2
        if not_learned or not_stopping:
            stops[groups == groups[first_row]] = not_stopping
            stopping = np.bincount(classes[stops], minlength=n_classes)
    return np.flatnonzero(~stops), np.flatnonzero(stops)


def folds_of(folds: Sequence[Fold], n: int) -> Indices:
    """Return the number of the fold that scores each of ``n`` rows in each of R repeats, (R, n)."""
    fold_of = np.zeros((max(fold.repeat for fold in folds) + 1, n), dtype=np.int64)
    for fold in folds:
        fold_of[fold.repeat, fold.test] = fold.fold
    return fold_of
