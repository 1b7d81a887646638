"""Train, validation and test rows: drawn once per run, and written as CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import write_text
from ...cache.errors import DataError
from ...cache.labels import read_labels, read_table, table_text
from .folds import Indices, check_classes_left, groups_per_class, train_only

SPLITS = ("train", "val", "test")
NEEDED = 10  # groups of a class, so that a tenth of them is one


@dataclass(frozen=True)
class Split:
    """Guids of the training, validation and test rows, and of test rows that have no label yet."""

    train: list[str]
    val: list[str]
    test: list[str]
    unlabelled: list[str] = field(default_factory=list)

    def named(self) -> dict[str, list[str]]:
        """Return the three lists of labelled rows by name."""
        return {name: getattr(self, name) for name in SPLITS}

    def to_dict(self) -> dict[str, list[str]]:
        """Return the lists as plain data; ``Split(**...)`` takes it."""
        return self.named() | ({"unlabelled": self.unlabelled} if self.unlabelled else {})


def stratified_split(guids: Sequence[str], tags: Sequence[str], seed: int = 42) -> Split:
    """Split 8:1:1, stratified by tag, in the order given.

    Exactly scikit-learn's ``train_test_split(train_size=0.8)``, then ``train_test_split(test_size=0.5)`` on the rest,
    both stratified and both with ``random_state=seed``.

    Raises
    ------
    DataError
        Naming a class of which a part would have no row.
    """
    names, classes = np.unique(list(tags), return_inverse=True)
    groups = np.arange(len(classes))
    parts, rare = split_rows(classes, groups, names.tolist(), seed)
    if len(rare):
        rarest = int(rare[np.argmin(np.bincount(classes)[rare])])
        raise DataError(
            f"{len(tags)} labelled pairs cannot be split 8:1:1 with each class in each part: class "
            f"{str(names[rarest])!r} has {np.count_nonzero(classes == rarest)} rows, and {NEEDED} are needed: label "
            "more of it, or take it out"
        )
    return Split(*([guids[row] for row in rows.tolist()] for rows in parts))


def split_rows(
    classes: Indices, groups: Indices, names: Sequence[str], seed: int, remedy: str = ""
) -> tuple[tuple[Indices, Indices, Indices], Indices]:
    """Split rows 8:1:1, stratified by class, with all rows of a group in one part.

    One row stands for each group, with the class of its first row. Where no group has two rows and no class is too
    rare, the parts are exactly scikit-learn's (see ``stratified_split``). A class with fewer than ``NEEDED`` groups, of
    which that draw leaves a part without a row, trains only, with its copies in other classes; so does every class with
    as few groups.

    Parameters
    ----------
    classes, groups
        (n,) each.
    names
        Of the classes.
    remedy
        What to do beside labelling more where too few classes are left.

    Returns
    -------
    parts
        Row numbers of the training, validation and test part.
    rare
        Numbers of the classes that train only.

    Raises
    ------
    DataError
        Fewer than two classes have enough rows.
    """
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    strata, rare = classes[first], np.zeros(0, dtype=np.int64)
    while True:
        alone = train_only(classes, groups, rare)
        check_classes_left(classes, groups, names, rare, NEEDED, remedy)
        standing = np.sort(first[~alone[first]])  # one row for each group, in the order of the rows
        drawn, suspects = _draw_parts(strata[group_of[standing]], seed)
        parts = [_members(group_of, group_of[standing[rows]]) for rows in drawn]
        scored = np.setdiff1d(classes, rare)
        if parts:
            suspects = np.unique(np.concatenate([np.setdiff1d(scored, classes[rows]) for rows in parts]))
        counts = groups_per_class(classes[~alone], groups[~alone], len(names))
        too_few = suspects[counts[suspects] < NEEDED]
        if parts and not len(too_few):
            too_few = np.setdiff1d(scored, classes[parts[0]])
        if len(too_few):
            rare = np.union1d(rare, scored[counts[scored] <= counts[too_few].max()])
        elif parts:
            return (np.concatenate([parts[0], np.flatnonzero(alone)]), parts[1], parts[2]), rare
        else:  # classes whose rows are mostly copies of rows of other classes: they cannot be strata
            largest = np.bincount(strata[group_of[standing]]).argmax()
            merged = np.where(np.isin(strata, suspects), largest, strata)
            fewer = len(np.unique(merged[group_of[standing]])) < len(np.unique(strata[group_of[standing]]))
            if not fewer and not strata.any():
                raise DataError(
                    f"{len(standing)} rows, copies counted once, are too few for an 8:1:1 split: label more{remedy}"
                )
            strata = merged if fewer else np.zeros_like(strata)


def _members(group_of: Indices, chosen: Indices) -> Indices:
    """Return the rows of the groups ``chosen``, group by group in that order."""
    rank = np.full(int(group_of.max()) + 1, len(chosen))
    rank[chosen] = np.arange(len(chosen))
    rows = np.flatnonzero(rank[group_of] < len(chosen))
    return rows[np.argsort(rank[group_of[rows]], kind="stable")]


def _draw_parts(strata: Indices, seed: int) -> tuple[list[Indices], Indices]:
    """Return the row numbers of the three parts, or none and the strata that are too small for them."""
    none = np.zeros(0, dtype=np.int64)
    if not len(strata):
        return [], none
    present, numbers, counts = np.unique(strata, return_inverse=True, return_counts=True)
    first = stratified_draw(numbers, int(0.8 * len(numbers)), seed)
    if first is None:
        return [], present[counts == counts.min()]
    train, rest = first
    second = stratified_draw(numbers[rest], len(rest) // 2, seed)
    if second is None:
        left = np.bincount(numbers[rest], minlength=len(present))
        return [], present[left == left.min()]
    return [train, rest[second[0]], rest[second[1]]], none


def stratified_draw(
    classes: NDArray[np.int64], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """Draw ``count`` of n rows, each class in its share; return the rows drawn, and the others, both in random order.

    The numbers of scikit-learn's ``train_test_split(stratify=classes, random_state=seed)``, whatever its version, and
    without the second that importing it takes. None where it would refuse: a class with one row, or more classes than
    rows on a side.

    Parameters
    ----------
    classes
        (n,): numbers from 0.
    """
    per_class = np.bincount(classes)
    others = len(classes) - count
    present = np.unique(classes)
    per_class = per_class[present]
    if per_class.min() < 2 or min(count, others) < len(present):
        return None
    random = np.random.RandomState(seed)
    drawn_of = _shares(per_class, count, random)
    others_of = _shares(per_class - drawn_of, others, random)
    drawn: list[NDArray[np.int64]] = []
    left: list[NDArray[np.int64]] = []
    rows_of = np.split(np.argsort(classes, kind="stable"), np.cumsum(per_class)[:-1])
    for rows, here, there in zip(rows_of, drawn_of.tolist(), others_of.tolist(), strict=True):
        shuffled = rows[random.permutation(len(rows))]
        drawn.append(shuffled[:here])
        left.append(shuffled[here : here + there])
    return random.permutation(np.concatenate(drawn)), random.permutation(np.concatenate(left))


def _shares(per_class: NDArray[np.int64], count: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """Return how many of ``count`` rows each class gives: its share rounded down, the rest by largest remainders."""
    exact = per_class / per_class.sum() * count
    shares = np.floor(exact)
    missing = int(count - shares.sum())
    for remainder in np.sort(np.unique(exact - shares))[::-1] if missing else ():
        (tied,) = np.where(exact - np.floor(exact) == remainder)
        chosen = random.choice(tied, size=min(len(tied), missing), replace=False)
        shares[chosen] += 1
        missing -= len(chosen)
        if missing == 0:
            break
    return shares.astype(np.int64)


def write_split(folder: Path, split: Split, labels: Mapping[str, str]) -> None:
    """Write ``train_split.csv``, ``val_split.csv`` and ``test_split.csv``, each with header ``guid,tag``.

    Test rows that never had a label have an empty tag; a pair that lost its label is left out.
    """
    for name, guids in split.named().items():
        rows = [[guid, labels[guid]] for guid in guids if guid in labels]
        if name == "test":
            rows += [[guid, ""] for guid in split.unlabelled]
        write_text(folder / f"{name}_split.csv", table_text(["guid", "tag"], rows))


def read_split(folder: str | Path) -> dict[str, dict[str, str | None]]:
    """Read the files that ``write_split`` wrote, or that somebody made like them.

    Returns
    -------
    dict
        Tag by guid, None where it is empty, for ``train``, ``val`` and ``test``. A test part that is not there, or
        names no pair, is empty.

    Raises
    ------
    DataError
        The training or validation part is missing or names no pair; a guid is in two parts.
    """
    folder = Path(folder)
    parts: dict[str, dict[str, str | None]] = {}
    seen: dict[str, str] = {}
    for name in SPLITS:
        path = folder / f"{name}_split.csv"
        if not path.is_file() and name != "test":
            raise DataError(
                f"no such file: {path}; a split folder holds train_split.csv, val_split.csv and, where there are test "
                "rows, test_split.csv, each with the header guid,tag"
            )
        is_empty = name == "test" and (not path.is_file() or not any(True for _ in read_table(path)[1]))
        parts[name] = {} if is_empty else read_labels(path)
        for guid in parts[name]:
            if guid in seen:
                raise DataError(f"guid {guid!r} is in two parts of {folder}: {seen[guid]} and {name}")
            seen[guid] = name
    return parts
