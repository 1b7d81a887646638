"""Copies of pairs, and folds and parts of rows that keep them on one side."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError, MmcliError
from ...cache.schema import EMPTY_SHA256
from ...cache.store import FeatureCache

Indices = NDArray[np.int64]

NEEDED = 10  # groups of a class in a split 8:1:1: a tenth of them is at least one
_NOTHING = np.array([EMPTY_SHA256, bytes(32)], dtype="V32")  # digests of an empty side and of a missing side


def duplicate_groups(cache: FeatureCache, guids: Sequence[str]) -> NDArray[np.int64]:
    """Return the group number of each pair, (n,) int64, from 0; copies of each other have the same number.

    Groups are closed: a pair that shares its image with a second pair and its text with a third joins all three.
    Missing images, and texts that are empty after cleaning, are not copies of each other. A cache without digests of
    cleaned texts is compared by its raw texts.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, n = cache.rows(guids), len(guids)
    text = "row/cleaned_sha256" if cache.has_cleaned else "row/text_sha256"
    pairs, first_copies = [], []
    for name in ("row/image_sha256", text):
        digests = np.ascontiguousarray(cache.read(name, rows)).view("V32").reshape(n)
        there = np.flatnonzero((digests != _NOTHING[0]) & (digests != _NOTHING[1]))
        _, first, inverse = np.unique(digests[there], return_index=True, return_inverse=True)
        pairs.append(there)
        first_copies.append(there[first[inverse]])
    edges = (np.concatenate(pairs), np.concatenate(first_copies))
    graph = coo_array((np.ones(len(edges[0]), dtype=np.bool_), edges), shape=(n, n))
    numbers: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return numbers


def groups_by_guid(cache: FeatureCache, guids: Sequence[str]) -> dict[str, int]:
    """Return the number of each pair's group of copies, by guid; see ``duplicate_groups``."""
    return dict(zip(guids, duplicate_groups(cache, guids).tolist(), strict=True))


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
    return np.isin(groups, groups[np.isin(classes, rare)])


def check_classes_left(
    classes: Indices, groups: Indices, names: Sequence[str], rare: Indices, needed: int, remedy: str
) -> None:
    """Raise a DataError where fewer than two classes are left to be scored, because ``rare`` have too few groups.

    ``remedy`` is what the user can do, other than label more.
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

    ``classes`` and ``groups`` are (n,), and there are at least 2 folds and at most as many as groups. scikit-learn's
    ``StratifiedKFold`` deals out the groups, each with the class of its first row. ``StratifiedGroupKFold`` does the
    same with a loop over groups that takes minutes for a million pairs. A class with fewer groups than folds is missing
    from some folds.
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


def repeated_folds(
    classes: Indices, groups: Indices, names: Sequence[str], folds: int, repeats: int, seed: int
) -> list[Fold]:
    """Return repeated stratified group k-fold, with a tenth of each training part set aside as rows to stop by.

    ``classes`` and ``groups`` are (n,), and repeat r is shuffled with ``seed + r``. A class with fewer groups than
    folds trains only: its rows, and their copies, are in every training part. Raise a DataError where fewer than two
    classes have as many groups as there are folds, and an MmcliError for too few folds or repeats.
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


def split_rows(
    classes: Indices, groups: Indices, names: Sequence[str], seed: int, remedy: str = ""
) -> tuple[tuple[Indices, Indices, Indices], Indices]:
    """Split rows 8:1:1, stratified by class, and keep all rows of a group in one part.

    The first row of each group stands for the group in the draw. Where every group is a single row and no class is too
    rare, the parts are exactly scikit-learn's (see ``stratified_split``). If the draw leaves a class with fewer than
    ``NEEDED`` groups without a row in some part, then this class trains only, and so does every class with as few
    groups. Copies of their rows in other classes train only, too.

    ``classes`` and ``groups`` are (n,), ``seed`` is for both draws, and ``remedy`` is what the user can do, other than
    label more. Return the row numbers of the three parts, and the numbers of the classes that train only. Raise a
    DataError where fewer than two classes have enough rows.
    """
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    strata, rare = classes[first], np.zeros(0, dtype=np.int64)
    while True:
        trains_only = train_only(classes, groups, rare)
        check_classes_left(classes, groups, names, rare, NEEDED, remedy)
        first_rows = np.sort(first[~trains_only[first]])  # one row for each group, in the order of the rows
        parts, too_small = _draw_parts(first_rows, strata[group_of[first_rows]], seed)
        parts = [_members(group_of, group_of[rows]) for rows in parts]
        counts = groups_per_class(classes[~trains_only], groups[~trains_only], len(names))
        too_rare = _classes_too_rare(parts, too_small, classes, np.setdiff1d(classes, rare), counts)
        if len(too_rare):
            rare = np.union1d(rare, too_rare)
        elif parts:
            return (np.concatenate([parts[0], np.flatnonzero(trains_only)]), parts[1], parts[2]), rare
        else:
            strata = _merged_strata(strata, group_of[first_rows], too_small, remedy)


def _draw_parts(rows: Indices, strata: Indices, seed: int) -> tuple[list[Indices], Indices]:
    """Divide ``rows`` 8:1:1; return the three parts, or no part and the smallest strata, too small to be drawn from."""
    from sklearn.model_selection import train_test_split

    parts: list[Indices] = []
    present, numbers = np.unique(strata, return_inverse=True)
    for share in (0.8, 0.5):
        count = int(share * len(rows))
        sizes = np.bincount(numbers, minlength=len(present))
        drawable = sizes[sizes > 0]
        # What scikit-learn refuses: a stratum of one row, or more strata than rows on a side.
        if not len(rows) or drawable.min() < 2 or min(count, len(rows) - count) < len(drawable):
            return [], present[sizes == sizes.min(initial=len(rows))]
        part, rows, _, numbers = train_test_split(rows, numbers, train_size=count, stratify=numbers, random_state=seed)
        parts.append(part)
    return [*parts, rows], np.zeros(0, dtype=np.int64)


def _members(group_of: Indices, chosen: Indices) -> Indices:
    """Return the rows of the groups ``chosen``, group by group in that order."""
    rank = np.full(int(group_of.max()) + 1, len(chosen))
    rank[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(rank[group_of] < len(chosen))
    return rows[np.argsort(rank[group_of[rows]], kind="stable")]


def _classes_too_rare(
    parts: Sequence[Indices], too_small: Indices, classes: Indices, scored: Indices, counts: Indices
) -> Indices:
    """Return the classes that must train only, because the draw failed on them or left them out of a part.

    ``parts`` are drawn, or empty with the strata ``too_small``; ``counts``, (C,), are the groups of each class. Among
    the classes that are ``scored`` so far, all with as few groups as those that failed are too rare.
    """
    missing = [np.setdiff1d(scored, classes[rows]) for rows in parts]
    suspects = np.unique(np.concatenate(missing)) if parts else too_small
    too_few = suspects[counts[suspects] < NEEDED]
    if parts and not len(too_few):
        too_few = missing[0]  # no head can be scored on a class that it does not learn
    return scored[counts[scored] <= counts[too_few].max()] if len(too_few) else too_few


def _merged_strata(strata: Indices, divided: Indices, too_small: Indices, remedy: str) -> Indices:
    """Return the stratum of each group, after strata too small to be drawn from have joined the largest.

    A class with enough rows can still be too small a stratum, where its rows are mostly copies of rows of other
    classes. If joining leaves as many strata as before among the groups to be ``divided``, all become one stratum.
    """
    largest = np.bincount(strata[divided], minlength=1).argmax()
    merged = np.where(np.isin(strata, too_small), largest, strata)
    if len(np.unique(merged[divided])) < len(np.unique(strata[divided])):
        return merged
    if not len(divided) or not strata.any():
        raise DataError(f"{len(divided)} rows, copies counted once, are too few for an 8:1:1 split: label more{remedy}")
    return np.zeros_like(strata)
