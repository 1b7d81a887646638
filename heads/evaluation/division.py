"""Which labelled rows are trained, stopped and tested on: drawn, or read from the splits folder of another run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...cache.errors import DataError, MmcliError
from .folds import groups_per_class, rare_classes
from .splits import NEEDED, SPLITS, Split, read_split, split_rows

Rare = Literal["train-only", "merge", "drop"]
New = Literal["train", "none"]
OTHER = "other"  # the class that rare classes are merged into


@dataclass(frozen=True)
class SplitOptions:
    """How labelled rows are divided.

    Attributes
    ----------
    split_dir
        The splits folder of another run; default: draw a split.
    seed
        Seed for drawing it.
    group_duplicates
        Whether copies stay in one part of a split that is drawn.
    new
        Where labelled rows go that ``split_dir`` does not name: ``train``, or ``none`` to leave them out.
    rare
        What becomes of classes too rare for a row in each part: ``train-only``, ``merge`` (into one class ``other``)
        or ``drop``.
    """

    split_dir: str | Path | None = None
    seed: int = 42
    group_duplicates: bool = True
    new: str = "train"
    rare: str = "train-only"

    def __post_init__(self) -> None:
        for name, choices in (("new", New), ("rare", Rare)):
            if getattr(self, name) not in get_args(choices):
                raise MmcliError(
                    f"{name} cannot be {getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` holds of it."""
        if self.split_dir is None:
            drawn = {"split_dir": None, "split_seed": self.seed, "group_duplicates": self.group_duplicates}
            return drawn | {"rare": self.rare}
        read = {"split_dir": str(Path(self.split_dir).absolute()), "split_seed": None, "group_duplicates": None}
        return read | {"new": self.new, "rare": self.rare}


@dataclass(frozen=True)
class Division:
    """A split and the labels that belong to it.

    Attributes
    ----------
    split
        The rows of each part.
    labels
        Class by guid, rare classes merged or left out.
    relabelled
        What became of classes of the labels file: the name that the head knows them by, or None where it does not.
    counts
        What ``metrics.json`` says about the split.
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

    Parameters
    ----------
    labels
        By guid, of rows in the cache.
    groups
        Number of the group of copies, by guid.

    Raises
    ------
    DataError
        Too few rows for a split, as the functions say that this one calls.
    """
    if options.split_dir is not None:
        return _read(labels, groups, Path(options.split_dir), options)
    guids = list(labels)
    numbers = np.arange(len(guids))
    if options.group_duplicates:
        numbers = np.fromiter((groups[guid] for guid in guids), np.int64, len(guids))
    group_of = dict(zip(guids, numbers.tolist(), strict=True))
    copies = len(numbers) - len(np.unique(numbers))
    remedy = ", or give your own parts with --split-dir"
    remedy += ", or count each copy as a row with --no-group-duplicates" if copies else ""

    def drawn(tags: Mapping[str, str]) -> tuple[Split, dict[str, int]]:
        names, classes = np.unique(list(tags.values()), return_inverse=True)
        of_rows = np.fromiter((group_of[guid] for guid in tags), np.int64, len(tags))
        parts, rare = split_rows(classes, of_rows, names.tolist(), options.seed, remedy)
        listed = list(tags)
        counted = groups_per_class(classes, of_rows, len(names))
        return (
            Split(*([listed[row] for row in rows.tolist()] for rows in parts)),
            {str(names[number]): int(counted[number]) for number in rare},
        )

    splits: list[Split] = []

    def rare_of(tags: Mapping[str, str]) -> dict[str, int]:
        split, rare = drawn(tags)
        splits.append(split)  # the last is of the labels as they are settled
        return rare

    settled = settle_rare(labels, options.rare, rare_of)
    counts = {"duplicates_together": copies, **settled.counts(NEEDED)}
    return Division(splits[-1], settled.labels, settled.relabelled, counts)


@dataclass(frozen=True)
class Settled:
    """Labels after rare classes were merged or left out.

    Attributes
    ----------
    labels
        Class by guid.
    relabelled
        As ``Division.relabelled``.
    rare
        Rows of each rare class that was found first, copies counted once.
    train_only
        The same, of the classes that are still too rare.
    left_out
        How many rows were left out.
    """

    labels: dict[str, str]
    relabelled: dict[str, str | None]
    rare: dict[str, int]
    train_only: dict[str, int]
    left_out: int

    def counts(self, needed: int | None) -> dict[str, Any]:
        """Return what ``metrics.json`` says about rare classes; empty where there are none.

        Parameters
        ----------
        needed
            Rows that a class needs, copies counted once; None where it needs one in each part that was read.
        """
        if not self.rare:
            return {}
        names = {name: other for name, other in self.relabelled.items() if other is not None}
        return {
            "rare_classes": self.rare,
            "rare_classes_need": needed,
            "rare_train_only": sorted(self.train_only),
            "rare_merged": sorted(names),
            "rare_left_out": self.left_out,
        }


def settle_rare(labels: Mapping[str, str], how: str, find: Callable[[Mapping[str, str]], dict[str, int]]) -> Settled:
    """Merge or leave out rare classes, or keep them for training only.

    Parameters
    ----------
    how
        As ``SplitOptions.rare``.
    find
        Returns the rare classes of labels, with their numbers of rows.

    Raises
    ------
    DataError
        There is nothing to merge with, or a class is called ``other`` already.
    """
    rare = find(labels)
    if not rare or how == "train-only":
        return Settled(dict(labels), {}, rare, rare, 0)
    if how == "merge" and OTHER in labels.values():
        raise DataError(
            f"--rare merge makes a class {OTHER!r} of rare classes, and the labels file has one: rename it, or take "
            "--rare train-only or --rare drop"
        )
    if how == "merge" and len(rare) < 2:
        raise DataError(
            f"--rare merge needs two rare classes, and only {min(rare)!r} is rare: take --rare train-only or "
            "--rare drop"
        )
    relabelled: dict[str, str | None] = dict.fromkeys(rare, OTHER if how == "merge" else None)
    changed = relabel(labels, relabelled)
    return Settled(changed, relabelled, rare, find(changed), len(labels) - len(changed))


def relabel(labels: Mapping[str, str], relabelled: Mapping[str, str | None]) -> dict[str, str]:
    """Return labels under the names that a head knows, without the classes that were left out."""
    named = ((guid, relabelled.get(tag, tag)) for guid, tag in labels.items())
    return {guid: tag for guid, tag in named if tag is not None}


def renamed(labels: Mapping[str, str], relabelled: Mapping[str, str | None]) -> dict[str, str]:
    """Return labels under the names that a head knows; classes that were left out keep theirs, which it does not."""
    return {guid: relabelled.get(tag) or tag for guid, tag in labels.items()}


def settle_rare_in_folds(labels: Mapping[str, str], groups: Mapping[str, int], folds: int, how: str) -> Settled:
    """Merge or leave out classes with fewer rows than there are folds, or keep them for training only."""

    def find(tags: Mapping[str, str]) -> dict[str, int]:
        if not tags:
            return {}
        names, classes = np.unique(list(tags.values()), return_inverse=True)
        of_rows = np.fromiter((groups[guid] for guid in tags), np.int64, len(tags))
        counted = groups_per_class(classes, of_rows, len(names))
        return {str(names[number]): int(counted[number]) for number in rare_classes(classes, of_rows, folds)}

    return settle_rare(labels, how, find)


def _read(labels: Mapping[str, str], groups: Mapping[str, int], folder: Path, options: SplitOptions) -> Division:
    """Return the split in ``folder`` with the labels of today."""
    parts: dict[str, list[str]] = {}
    gone, changed = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    unlabelled: list[str] = []
    named: set[str] = set()
    for name, tags in read_split(folder).items():
        named |= tags.keys()
        parts[name] = [guid for guid in tags if guid in labels]
        changed[name] = sum(tags[guid] not in (None, labels[guid]) for guid in parts[name])
        if name == "test":
            unlabelled = [guid for guid, tag in tags.items() if guid not in labels and tag is None]
        gone[name] = len(tags) - len(parts[name]) - (len(unlabelled) if name == "test" else 0)
    new = [guid for guid in labels if guid not in named]
    held_out_groups = {groups[guid] for name in ("val", "test") for guid in parts[name]}
    copies = [guid for guid in new if groups[guid] in held_out_groups]
    if options.new == "train":
        parts["train"] += [guid for guid in new if groups[guid] not in held_out_groups]

    def lacking(tags: Mapping[str, str]) -> dict[str, int]:
        """Return the classes that a part has no row of, with their numbers of rows."""
        of_parts = [Counter(tags[guid] for guid in guids if guid in tags) for guids in parts.values() if guids]
        every = sum(of_parts, Counter[str]())
        return {name: every[name] for name in sorted(every) if any(name not in counted for counted in of_parts)}

    used = {guid: labels[guid] for guids in parts.values() for guid in guids}
    settled = settle_rare(used, options.rare, lacking)
    kept = {name: [guid for guid in guids if guid in settled.labels] for name, guids in parts.items()}
    _check_parts(folder, kept, settled.labels)
    counts: dict[str, Any] = {"new_rows": len(new), "new_rows_go_to": options.new, "new_copies": len(copies)}
    counts |= {"rows_gone": gone, "labels_changed": changed, "test_rows_unlabelled": len(unlabelled)}
    held_out = {settled.labels[guid] for name in ("val", "test") for guid in kept[name]}
    rare = settled.counts(None)
    if rare:
        rare["rare_train_only"] = [name for name in rare["rare_train_only"] if name not in held_out]
    counts |= rare
    return Division(Split(**kept, unlabelled=unlabelled), settled.labels, settled.relabelled, counts)


def _check_parts(folder: Path, parts: Mapping[str, Sequence[str]], labels: Mapping[str, str]) -> None:
    """Raise a DataError where a head cannot be trained on parts that were read."""
    for name in ("train", "val"):
        if not parts[name]:
            raise DataError(
                f"no pair of {folder / f'{name}_split.csv'} has a label and features: give the labels file and the "
                "cache that it belongs to"
            )
    known = {labels[guid] for guid in parts["train"]}
    if len(known) < 2:
        raise DataError(f"all training rows of {folder} are {min(known)!r}: two classes are needed")
    for name in ("val", "test"):
        unknown = sorted({labels[guid] for guid in parts[name]} - known)
        if unknown:
            count = sum(labels[guid] == unknown[0] for guid in parts[name])
            raise DataError(
                f"class {unknown[0]!r} has {count} row(s) in the {name} part of {folder} and none in the training "
                "part, so no head can learn it: name at least one in train_split.csv, or leave such classes out with "
                "--rare drop"
            )
