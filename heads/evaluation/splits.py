"""Training, validation and test rows of a run, drawn or read from a folder; and what becomes of rare classes."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import write_text
from ...cache.errors import DataError, MmcliError
from ...cache.labels import read_labels, read_table, table_text
from .folds import NEEDED, groups_per_class, rare_classes, split_rows

Rare = Literal["train-only", "merge", "drop"]
New = Literal["train", "none"]
SPLITS = ("train", "val", "test")
OTHER = "other"  # the class that rare classes are merged into


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
    places = {guid: place for place, guid in enumerate(guids)}
    split, rare = _draw_split(dict(zip(guids, tags, strict=True)), places, seed, "")
    if rare:
        rarest = min(rare, key=rare.__getitem__)
        raise DataError(
            f"{len(tags)} labelled pairs cannot be split 8:1:1 with every class in every part: class {rarest!r} has "
            f"{rare[rarest]} rows, and {NEEDED} are needed: label more of it, or leave it out"
        )
    return split


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
        is_empty = not path.is_file() or not any(True for _ in read_table(path)[1])
        if is_empty and name == "val":
            raise DataError(
                f"{path} names no pair, but training needs rows to stop by: a run on all rows (--full) has none, so "
                "give the splits of the run that it repeats"
            )
        parts[name] = {} if is_empty and name == "test" else read_labels(path)
        for guid in parts[name]:
            if guid in seen:
                raise DataError(f"guid {guid!r} is in two parts of {folder}: {seen[guid]} and {name}")
            seen[guid] = name
    return parts


def group_numbers(groups: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.int64]]:
    """Return the group number of each guid, (n,) int64, by part."""
    return {name: np.fromiter((groups[guid] for guid in guids), np.int64, len(guids)) for name, guids in parts.items()}


def separated(
    parts: Mapping[str, Sequence[str]], groups: Mapping[str, int], of_parts: Collection[str] = ("val", "test")
) -> int:
    """Count the rows of ``of_parts`` that have a copy in another part."""
    count = 0
    for name in parts.keys() & set(of_parts):
        elsewhere = [guid for other, guids in parts.items() if other != name for guid in guids]
        count += len(parts[name]) - len(without_copies(parts[name], elsewhere, groups))
    return count


def without_copies(guids: Sequence[str], learned_from: Sequence[str], groups: Mapping[str, int]) -> list[str]:
    """Return the guids of pairs that are not copies of pairs that a head learned from."""
    known = {groups[guid] for guid in learned_from}
    return [guid for guid in guids if groups[guid] not in known]


@dataclass(frozen=True)
class SplitOptions:
    """How labelled rows are divided.

    ``split_dir`` is the splits folder of another run; default: draw a split with ``seed``, and with
    ``group_duplicates`` keep copies in one part. ``new`` says where rows go that ``split_dir`` does not name:
    ``train``, or ``none`` to leave them out. ``rare`` says what becomes of classes too rare for a row in each part:
    ``train-only``, ``merge`` (into one class ``other``) or ``drop``.
    """

    split_dir: str | Path | None = None
    seed: int = 42
    group_duplicates: bool = True
    new: str = "train"
    rare: str = "train-only"

    def __post_init__(self) -> None:
        for name, value, choices in (("new", self.new, get_args(New)), ("rare", self.rare, get_args(Rare))):
            if value not in choices:
                raise MmcliError(f"{name} cannot be {value!r}: choose one of {', '.join(choices)}")

    def to_dict(self) -> dict[str, Any]:
        """Return the options that were used, as ``config.json`` holds them."""
        if self.split_dir is None:
            drawn = {"split_dir": None, "split_seed": self.seed, "group_duplicates": self.group_duplicates}
            return drawn | {"rare": self.rare}
        read = {"split_dir": str(Path(self.split_dir).absolute()), "split_seed": None, "group_duplicates": None}
        return read | {"new": self.new, "rare": self.rare}


@dataclass(frozen=True)
class Division:
    """A split and the labels that belong to it.

    ``labels`` are the classes by guid, after rare classes were merged or dropped. ``relabelled`` has the new name of
    each class that was merged, and None for a class that was dropped. ``counts`` are the entries of ``metrics.json``
    about the split.
    """

    split: Split
    labels: dict[str, str]
    relabelled: dict[str, str | None] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[str]:
        """The names of the classes, sorted."""
        return sorted({self.labels[guid] for guids in self.split.named().values() for guid in guids})


def divide(labels: Mapping[str, str], groups: Mapping[str, int], options: SplitOptions) -> Division:
    """Return the split of a run: read from ``options.split_dir``, or drawn.

    ``labels`` are those of rows in the cache, and ``groups`` the groups of copies, both by guid. Raise a DataError if
    there are too few rows for a split, or if the splits folder does not fit the labels.
    """
    if options.split_dir is not None:
        return _read_division(labels, groups, Path(options.split_dir), options)
    group_of = {guid: groups[guid] if options.group_duplicates else number for number, guid in enumerate(labels)}
    n_copies = len(labels) - len(set(group_of.values()))
    remedy = ", or give your own parts with --split-dir"
    remedy += ", or count each copy as a row with --no-group-duplicates" if n_copies else ""
    split, rare = _draw_split(labels, group_of, options.seed, remedy)
    settled, relabelled = _settle_rare(labels, rare, options.rare)
    still_rare = rare
    if relabelled:
        split, still_rare = _draw_split(settled, group_of, options.seed, remedy)
    counts = _rare_counts(rare, still_rare, relabelled, len(labels) - len(settled), NEEDED)
    return Division(split, settled, relabelled, {"duplicates_together": n_copies, **counts})


def _draw_split(
    labels: Mapping[str, str], group_of: Mapping[str, int], seed: int, remedy: str
) -> tuple[Split, dict[str, int]]:
    """Draw a split; also return the classes that train only, with their rows, copies counted once."""
    guids = list(labels)
    names, classes = np.unique(list(labels.values()), return_inverse=True)
    groups = np.array([group_of[guid] for guid in guids], dtype=np.int64)
    parts, rare = split_rows(classes, groups, names.tolist(), seed, remedy)
    counts = groups_per_class(classes, groups, len(names))
    split = Split(*([guids[row] for row in rows.tolist()] for rows in parts))
    return split, {str(names[number]): int(counts[number]) for number in rare}


def _read_division(
    labels: Mapping[str, str], groups: Mapping[str, int], folder: Path, options: SplitOptions
) -> Division:
    """Return the split in ``folder`` with the labels of today."""
    stored = read_split(folder)
    parts = {name: [guid for guid in tags if guid in labels] for name, tags in stored.items()}
    unlabelled = [guid for guid, tag in stored["test"].items() if guid not in labels and tag is None]
    gone = {name: len(tags) - len(parts[name]) for name, tags in stored.items()}
    gone["test"] -= len(unlabelled)
    changed = {
        name: sum(tags[guid] not in (None, labels[guid]) for guid in parts[name]) for name, tags in stored.items()
    }
    new = [guid for guid in labels if not any(guid in tags for tags in stored.values())]
    new_without_copies = without_copies(new, [*parts["val"], *parts["test"]], groups)
    if options.new == "train":
        parts["train"] += new_without_copies
    used = {guid: labels[guid] for guids in parts.values() for guid in guids}
    rare = _classes_missing_in_a_part(used, parts)
    settled, relabelled = _settle_rare(used, rare, options.rare)
    new = [guid for guid in new if guid not in used or guid in settled]  # the others are counted as dropped
    new_without_copies = [guid for guid in new_without_copies if guid in new]
    kept = {name: [guid for guid in guids if guid in settled] for name, guids in parts.items()}
    _check_parts(folder, kept, settled)
    held_out_classes = {settled[guid] for name in ("val", "test") for guid in kept[name]}
    still_rare = _classes_missing_in_a_part(settled, kept).keys() - held_out_classes
    counts = {
        "new_rows": len(new),
        "new_rows_go_to": options.new,
        "new_copies": len(new) - len(new_without_copies),
        "rows_gone": gone,
        "labels_changed": changed,
        "test_rows_unlabelled": len(unlabelled),
        **_rare_counts(rare, still_rare, relabelled, len(used) - len(settled), None),
    }
    return Division(Split(**kept, unlabelled=unlabelled), settled, relabelled, counts)


def _classes_missing_in_a_part(labels: Mapping[str, str], parts: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the classes that have no row in some part, with their numbers of rows; empty parts do not count."""
    by_part = [Counter(labels[guid] for guid in guids) for guids in parts.values() if guids]
    total = sum(by_part, Counter[str]())
    return {name: total[name] for name in sorted(total) if any(name not in counts for counts in by_part)}


def _check_parts(folder: Path, parts: Mapping[str, Sequence[str]], labels: Mapping[str, str]) -> None:
    """Raise a DataError if no head can be trained and scored on the parts of a split folder."""
    for name in ("train", "val"):
        if not parts[name]:
            raise DataError(
                f"no pair of {folder / f'{name}_split.csv'} has a label and features: give the labels file and the "
                "cache that it belongs to"
            )
    learned = {labels[guid] for guid in parts["train"]}
    if len(learned) < 2:
        raise DataError(f"all training rows of {folder} are {min(learned)!r}: two classes are needed")
    for name in ("val", "test"):
        unknown = sorted({labels[guid] for guid in parts[name]} - learned)
        if unknown:
            count = sum(labels[guid] == unknown[0] for guid in parts[name])
            raise DataError(
                f"class {unknown[0]!r} has {count} row(s) in the {name} part of {folder} and none in the training "
                "part, so no head can learn it: name at least one in train_split.csv, or leave such classes out with "
                "--rare drop"
            )


def settle_rare_in_folds(
    labels: Mapping[str, str], groups: Mapping[str, int], folds: int, how: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """Merge or drop classes with fewer rows than folds, copies counted once; also return the entries of the results."""
    rare = _rare_in_folds(labels, groups, folds)
    settled, relabelled = _settle_rare(labels, rare, how)
    still_rare = _rare_in_folds(settled, groups, folds) if relabelled else rare
    return settled, _rare_counts(rare, still_rare, relabelled, len(labels) - len(settled), folds)


def _rare_in_folds(labels: Mapping[str, str], groups: Mapping[str, int], folds: int) -> dict[str, int]:
    """Return the classes with fewer rows than folds, and their rows, copies counted once."""
    if not labels:
        return {}
    names, classes = np.unique(list(labels.values()), return_inverse=True)
    numbers = np.fromiter((groups[guid] for guid in labels), np.int64, len(labels))
    counts = groups_per_class(classes, numbers, len(names))
    return {str(names[number]): int(counts[number]) for number in rare_classes(classes, numbers, folds)}


def _settle_rare(
    labels: Mapping[str, str], rare: Collection[str], how: str
) -> tuple[dict[str, str], dict[str, str | None]]:
    """Return labels after rare classes were merged or dropped, and the new name of each; None for a dropped class."""
    if not rare or how == "train-only":
        return dict(labels), {}
    if how == "merge" and OTHER in labels.values():
        raise DataError(
            f"--rare merge joins rare classes into a class {OTHER!r}, and the labels file already has that class: "
            "rename it, or use --rare train-only or --rare drop"
        )
    if how == "merge" and len(rare) < 2:
        raise DataError(
            f"--rare merge needs two rare classes, and only {min(rare)!r} is rare: use --rare train-only or --rare drop"
        )
    relabelled: dict[str, str | None] = dict.fromkeys(rare, OTHER if how == "merge" else None)
    return relabel(labels, relabelled), relabelled


def _rare_counts(
    rare: dict[str, int],
    still_rare: Collection[str],
    relabelled: Mapping[str, str | None],
    n_dropped: int,
    needed: int | None,
) -> dict[str, Any]:
    """Return the entries of ``metrics.json`` about rare classes; empty where no class is rare.

    ``needed`` are the rows that a class needs, copies counted once; None if it needs a row in each part of a folder.
    """
    if not rare:
        return {}
    return {
        "rare_classes": rare,
        "rare_classes_need": needed,
        "rare_train_only": sorted(still_rare),
        "rare_merged": sorted(name for name, new_name in relabelled.items() if new_name is not None),
        "rare_left_out": n_dropped,
    }


def relabel(
    labels: Mapping[str, str], relabelled: Mapping[str, str | None], keep_dropped: bool = False
) -> dict[str, str]:
    """Return labels by the class names that a head knows; dropped classes go, or with ``keep_dropped`` stay as is."""
    known = {guid: relabelled.get(tag, tag) for guid, tag in labels.items()}
    if keep_dropped:
        return {guid: name or labels[guid] for guid, name in known.items()}
    return {guid: name for guid, name in known.items() if name is not None}
