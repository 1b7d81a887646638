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
        At least 2, and no more than there are groups.
    seed
        Seed for shuffling.
    """
    from sklearn.model_selection import StratifiedKFold

    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    strata = classes[first]
    if np.bincount(strata).max() < folds:  # copies with other labels leave each class few groups of its own
        strata = np.zeros_like(strata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's on classes with fewer groups than folds
        dealer = StratifiedKFold(folds, shuffle=True, random_state=seed % 2**32)
        dealt = list(dealer.split(np.zeros(len(first)), strata))
    rows = [[np.flatnonzero(np.isin(group_of, part)) for part in parts] for parts in dealt]
    return [(inside, outside) for inside, outside in rows]


def groups_per_class(classes: Indices, groups: Indices, n_classes: int) -> Indices:
    """Count the groups that hold a row of each class, (C,)."""
    group_of = np.unique(groups, return_inverse=True)[1]
    return np.bincount(np.unique(group_of * n_classes + classes) % n_classes, minlength=n_classes)


def rare_classes(classes: Indices, groups: Indices, needed: int, rare: Indices | None = None) -> Indices:
    """Return the numbers of ``rare`` and of all classes with fewer than ``needed`` groups.

    Groups that hold a row of a rare class train only, so they do not count for another class.
    """
    rare = np.zeros(0, dtype=np.int64) if rare is None else rare
    while True:
        rows = np.flatnonzero(~train_only(classes, groups, rare))
        present = np.setdiff1d(classes, rare)
        counts = groups_per_class(classes[rows], groups[rows], int(classes.max()) + 1)
        more = present[counts[present] < needed]
        if not len(more):
            return rare
        rare = np.union1d(rare, more)


def train_only(classes: Indices, groups: Indices, rare: Indices) -> NDArray[np.bool_]:
    """Return which rows only train, (n,): those of ``rare`` classes, and their copies in other classes."""
    if not len(rare):
        return np.zeros(len(classes), dtype=np.bool_)
    return np.isin(groups, groups[np.isin(classes, rare)])


def check_classes_left(
    classes: Indices, groups: Indices, names: Sequence[str], rare: Indices, needed: int, remedy: str
) -> None:
    """Raise a DataError where fewer than two classes have enough rows to be scored.

    Parameters
    ----------
    rare
        The classes that have too few.
    needed
        How many groups a class needs.
    remedy
        What to do beside labelling more.
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
    """Return repeated stratified group k-fold, each training part less a tenth to stop by.

    A class with fewer groups than folds trains only: its rows, and their copies, are in every training part.

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
        Fewer than two classes have as many groups as there are folds.
    MmcliError
        Too few folds or repeats.
    """
    if folds < 2 or repeats < 1:
        raise MmcliError(f"at least 2 folds and 1 repeat are needed, found {folds} and {repeats}")
    rare = rare_classes(classes, groups, folds)
    check_classes_left(classes, groups, names, rare, folds, " or ask for fewer folds (--folds)")
    alone = train_only(classes, groups, rare)
    always, dealt = np.flatnonzero(alone), np.flatnonzero(~alone)
    made = []
    for repeat in range(repeats):
        parts = group_folds(classes[dealt], groups[dealt], folds, seed + repeat)
        for number, (inside, test) in enumerate(parts):
            inside = dealt[inside]
            train, stop = _less_a_tenth(classes[inside], groups[inside], seed + repeat)
            unseen = np.setdiff1d(classes[dealt], classes[inside[train]])
            if len(unseen):
                raise DataError(
                    f"class {names[int(unseen[0])]!r} has no row in a training part of the folds, because its rows are "
                    "copies of rows of other classes: mend their labels, or label more of it"
                )
            made.append(Fold(repeat, number, np.union1d(inside[train], always), inside[stop], dealt[test]))
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
    for each in np.flatnonzero(counts):
        group = groups[np.flatnonzero(classes == each)[0]]
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
