"""Folds that keep copies on one side."""

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
    ``StratifiedGroupKFold`` does the same with a loop over groups that takes minutes for a million pairs.

    Parameters
    ----------
    classes, groups
        (n,) each.
    folds
        At least 2.
    seed
        Of the shuffling.
    """
    from sklearn.model_selection import StratifiedKFold

    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    dealt = StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(first)), classes[first])
    return [
        (np.flatnonzero(np.isin(group_of, inside)), np.flatnonzero(np.isin(group_of, outside)))
        for inside, outside in dealt
    ]


def check_folds(classes: Indices, groups: Indices, names: Sequence[str], folds: int) -> None:
    """Refuse to make folds of which some would lack a class.

    Raises
    ------
    DataError
        Naming the class that is too small, and how many rows it has, copies counted once.
    """
    rows = [len(np.unique(groups[classes == number])) for number in range(len(names))]
    if sum(count > 0 for count in rows) < 2:
        raise DataError(
            f"all {len(classes)} labelled pairs are {names[int(np.argmax(rows))]!r}: two classes are needed"
        )
    rarest = int(np.argmin(rows))
    if rows[rarest] < folds:
        raise DataError(
            f"class {names[rarest]!r} has {rows[rarest]} rows (copies counted once), fewer than the {folds} folds: ask "
            "for fewer folds, label more of it, or take it out"
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
    check_folds(classes, groups, names, folds)
    made = []
    for repeat in range(repeats):
        for number, (inside, test) in enumerate(group_folds(classes, groups, folds, seed + repeat)):
            parts = max(2, min(10, _rarest(classes[inside], groups[inside])))
            train, stop = group_folds(classes[inside], groups[inside], parts, seed + repeat)[0]
            fold = Fold(repeat, number, inside[train], inside[stop], test)
            for what, rows in (("training", fold.train), ("stopping", fold.stop), ("test", fold.test)):
                missing = sorted(set(range(len(names))) - set(classes[rows].tolist()))
                if missing:
                    raise DataError(
                        f"class {names[missing[0]]!r} has no row in a {what} part of the folds: its rows are copies of "
                        "rows of other classes, or too few; ask for fewer folds, or label more of it"
                    )
            made.append(fold)
    return made


def _rarest(classes: Indices, groups: Indices) -> int:
    return min(len(np.unique(groups[classes == number])) for number in np.unique(classes))


def folds_of(folds: Sequence[Fold], n: int) -> Indices:
    """Return which fold scores each row, (R, n)."""
    found = np.zeros((max(fold.repeat for fold in folds) + 1, n), dtype=np.int64)
    for fold in folds:
        found[fold.repeat, fold.test] = fold.fold
    return found
