"""Train, validation and test rows: made once per run, written as CSV, reused with ``--split-dir``."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.atomic import write_text
from ..cache.errors import DataError, MmcliError
from ..cache.labels import read_labels, table_text
from .folds import check_folds, group_folds

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """Guids of the training, validation and test rows."""

    train: list[str]
    val: list[str]
    test: list[str]

    def named(self) -> dict[str, list[str]]:
        """Return the three lists by name."""
        return {name: getattr(self, name) for name in SPLITS}


def stratified_split(guids: Sequence[str], tags: Sequence[str], seed: int = 42) -> Split:
    """Split 8:1:1, stratified by tag, in the order given.

    Exactly scikit-learn's ``train_test_split(train_size=0.8)``, then ``train_test_split(test_size=0.5)`` on the rest,
    both stratified and both with ``random_state=seed``.

    Raises
    ------
    DataError
        Naming a class of which a part would have no row.
    """
    counts = Counter(tags)
    if len(counts) < 2:
        raise DataError(f"all {len(tags)} labelled pairs are {next(iter(counts), 'missing')!r}: two classes are needed")
    classes = np.unique(list(tags), return_inverse=True)[1]
    found = stratified_draw(classes, int(0.8 * len(classes)), seed)
    parts = None
    if found is not None:
        train, rest = found
        parts = stratified_draw(classes[rest], len(rest) // 2, seed)
    if found is None or parts is None:
        name, count = min(counts.items(), key=lambda item: item[1])
        raise DataError(
            f"{len(tags)} labelled pairs cannot be split 8:1:1 with each class in each part: class {name!r} has "
            f"{count}; label more of it, take it out, or give your own parts with --split-dir"
        )
    split = Split(*([guids[row] for row in rows.tolist()] for rows in (train, *(rest[part] for part in parts))))
    check_classes(split, dict(zip(guids, tags, strict=True)))
    return split


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
        (n,): numbers from 0, none left out.
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


def grouped_split(guids: Sequence[str], tags: Sequence[str], groups: Sequence[int], seed: int = 42) -> Split:
    """Split about 8:1:1, stratified by tag, pairs of one group in one part.

    Of ten folds (``folds.group_folds``) the first is the test part, the second the validation part.

    Raises
    ------
    DataError
        Naming a class of which a part would have no row.
    """
    names = sorted(set(tags))
    classes = np.searchsorted(np.array(names), np.array(tags))
    grouped = np.asarray(groups)
    check_folds(classes, grouped, names, 10, "make your own parts (--split-dir)")
    (_, test), (_, val), *_ = group_folds(classes, grouped, 10, seed)
    held_out = {*test.tolist(), *val.tolist()}
    split = Split(
        [guid for index, guid in enumerate(guids) if index not in held_out],
        [guids[index] for index in val],
        [guids[index] for index in test],
    )
    check_classes(split, dict(zip(guids, tags, strict=True)))
    return split


def make_split(
    labels: Mapping[str, str],
    groups: Mapping[str, int],
    split_dir: str | Path | None = None,
    seed: int = 42,
    group_duplicates: bool = False,
) -> Split:
    """Return the split of a run: read from ``split_dir``, or made by ``seed``, with copies in one part where wanted.

    Raises
    ------
    DataError
        As the functions that it calls say.
    MmcliError
        Copies are to be kept together in a split that is read.
    """
    if split_dir is not None:
        if group_duplicates:
            raise MmcliError("--group-duplicates makes a split, --split-dir reuses one: give one of them")
        return read_split(split_dir, dict(labels))
    guids, tags = list(labels), list(labels.values())
    if group_duplicates:
        return grouped_split(guids, tags, [groups[guid] for guid in guids], seed)
    return stratified_split(guids, tags, seed)


def check_classes(split: Split, labels: dict[str, str]) -> None:
    """Raise a DataError where a class of the labels has no row in one of the parts."""
    classes = Counter(labels[guid] for guids in split.named().values() for guid in guids)
    if len(classes) < 2:
        raise DataError(f"all {sum(classes.values())} pairs of the split are {min(classes)!r}: two classes are needed")
    for name, guids in split.named().items():
        missing = sorted(set(classes) - {labels[guid] for guid in guids})
        if missing:
            raise DataError(
                f"class {missing[0]!r} has no row in the {name} part ({len(guids)} rows; the class has "
                f"{classes[missing[0]]} in all): label more of it, take it out, or give your own parts with --split-dir"
            )


def write_split(folder: Path, split: Split, labels: dict[str, str]) -> None:
    """Write ``train_split.csv``, ``val_split.csv`` and ``test_split.csv``, each with header ``guid,tag``."""
    for name, guids in split.named().items():
        rows = ([guid, labels[guid]] for guid in guids)
        write_text(folder / f"{name}_split.csv", table_text(["guid", "tag"], rows))


def read_split(folder: str | Path, labels: dict[str, str]) -> Split:
    """Read the three files that ``write_split`` wrote, or that somebody made like them.

    Raises
    ------
    DataError
        A file is missing; a guid is in two parts, is not among ``labels``, or has another tag there.
    """
    folder = Path(folder)
    parts: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for name in SPLITS:
        path = folder / f"{name}_split.csv"
        if not path.is_file():
            raise DataError(f"no such file: {path}; a split folder holds {', '.join(f'{n}_split.csv' for n in SPLITS)}")
        tags = read_labels(path)
        for guid, tag in tags.items():
            if guid in seen:
                raise DataError(f"guid {guid!r} is in two parts of {folder}: {seen[guid]} and {name}")
            if guid not in labels:
                raise DataError(f"{path} names guid {guid!r}, which has no label or no features in the cache")
            if tag != labels[guid]:
                raise DataError(f"{path} says that {guid!r} is {tag!r}, the labels file says {labels[guid]!r}")
            seen[guid] = name
        if not tags:
            raise DataError(f"{path} names no pair")
        parts[name] = list(tags)
    split = Split(**parts)
    check_classes(split, labels)
    return split
