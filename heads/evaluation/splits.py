"""Training, validation and test rows: drawn once per run and written as CSV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...cache.atomic import write_text
from ...cache.errors import DataError
from ...cache.labels import read_labels, read_table, table_text
from .folds import Indices, check_classes_left, groups_per_class, train_only

SPLITS = ("train", "val", "test")
NEEDED = 10  # groups of a class: a tenth of them is at least one


@dataclass(frozen=True)
class Split:
    """Guids of training, validation and test rows, and of test rows without a label."""

    train: list[str]
    val: list[str]
    test: list[str]
    unlabelled: list[str] = field(default_factory=list)

    def named(self) -> dict[str, list[str]]:
        """Return the three lists of labelled rows by name."""
        return {name: getattr(self, name) for name in SPLITS}

    def to_dict(self) -> dict[str, list[str]]:
        """Return the lists as plain data; ``Split(**data)`` restores the split."""
        return self.named() | ({"unlabelled": self.unlabelled} if self.unlabelled else {})


def stratified_split(guids: Sequence[str], tags: Sequence[str], seed: int = 42) -> Split:
    """Split 8:1:1, stratified by tag, in the order given.

    Exactly scikit-learn's ``train_test_split(train_size=0.8)``, then ``train_test_split(test_size=0.5)`` on the rest,
    both stratified and both with ``random_state=seed``.

    Raises
    ------
    DataError
        A part would have no row of some class; the message names the class.
    """
    names, classes = np.unique(list(tags), return_inverse=True)
    groups = np.arange(len(classes))
    parts, rare = split_rows(classes, groups, names.tolist(), seed)
    if len(rare):
        rarest = int(rare[np.argmin(np.bincount(classes)[rare])])
        raise DataError(
            f"{len(tags)} labelled pairs cannot be split 8:1:1 with every class in every part: class "
            f"{str(names[rarest])!r} has {np.count_nonzero(classes == rarest)} rows, and {NEEDED} are needed: label "
            "more of it, or leave it out"
        )
    return Split(*([guids[row] for row in rows.tolist()] for rows in parts))


def split_rows(
    classes: Indices, groups: Indices, names: Sequence[str], seed: int, remedy: str = ""
) -> tuple[tuple[Indices, Indices, Indices], Indices]:
    """Split rows 8:1:1, stratified by class, and keep all rows of a group in one part.

    The first row of each group stands for the group in the draw. Where every group is a single row and no class is too
    rare, the parts are exactly scikit-learn's (see ``stratified_split``). If the draw leaves a class with fewer than
    ``NEEDED`` groups without a row in some part, then this class trains only, and so does every class with as few
    groups. Copies of their rows in other classes train only, too.

    Parameters
    ----------
    classes, groups
        Class number and group number of each row, (n,) each.
    names
        Names of the classes.
    seed
        Seed for both draws.
    remedy
        What the user can do, other than label more, where too few classes are left.

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
    """Divide ``rows`` 8:1:1.

    Returns
    -------
    parts
        The rows of the three parts, or no part where a stratum is too small to be drawn from.
    too_small
        The smallest strata in that case, else none.
    """
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

    Parameters
    ----------
    parts, too_small
        Rows of the drawn parts; or no part, and the strata that were too small.
    classes
        Class number of each row, (n,).
    scored
        Numbers of the classes that are not rare so far.
    counts
        Number of groups of each class, (C,).
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
    classes. If joining leaves as many strata as before, all groups become one stratum.

    Parameters
    ----------
    divided
        The groups that are divided among the parts.
    """
    largest = np.bincount(strata[divided], minlength=1).argmax()
    merged = np.where(np.isin(strata, too_small), largest, strata)
    if len(np.unique(merged[divided])) < len(np.unique(strata[divided])):
        return merged
    if not len(divided) or not strata.any():
        raise DataError(f"{len(divided)} rows, copies counted once, are too few for an 8:1:1 split: label more{remedy}")
    return np.zeros_like(strata)


def write_split(folder: Path, split: Split, labels: Mapping[str, str]) -> None:
    """Write ``train_split.csv``, ``val_split.csv`` and ``test_split.csv``, each with header ``guid,tag``.

    Test rows that never had a label get an empty tag. A pair that has lost its label is left out.
    """
    for name, guids in split.named().items():
        rows = [[guid, labels[guid]] for guid in guids if guid in labels]
        if name == "test":
            rows += [[guid, ""] for guid in split.unlabelled]
        write_text(folder / f"{name}_split.csv", table_text(["guid", "tag"], rows))


def read_split(folder: str | Path) -> dict[str, dict[str, str | None]]:
    """Read the files that ``write_split`` wrote, or files of the same form.

    Returns
    -------
    dict
        Tag by guid, for ``train``, ``val`` and ``test``; None for an empty tag. A test part without a file or without
        a pair is an empty dict.

    Raises
    ------
    DataError
        The training or validation part is missing or names no pair, or a guid is in two parts.
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
