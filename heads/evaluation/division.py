"""Rows that a run trains, validates and tests on: drawn at random, or read from the splits folder of another run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...cache.errors import DataError, MmcliError
from .folds import groups_per_class
from .rare import settle_rare
from .splits import NEEDED, Split, read_split, split_rows

Rare = Literal["train-only", "merge", "drop"]
New = Literal["train", "none"]


@dataclass(frozen=True)
class SplitOptions:
    """How labelled rows are divided.

    Attributes
    ----------
    split_dir
        The splits folder of another run. Default: draw a split.
    seed
        Seed for drawing the split.
    group_duplicates
        Whether copies stay in one part of a drawn split.
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
        """Return the options that were used, as ``config.json`` holds them."""
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
        Class by guid, after rare classes were merged or dropped.
    relabelled
        New name of each class of the labels file that was merged; None for a class that was dropped.
    counts
        The entries of ``metrics.json`` about the split.
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
        Class by guid, for rows in the cache.
    groups
        Number of the group of copies, by guid.

    Raises
    ------
    DataError
        There are too few rows for a split, or the split folder does not fit the labels.
    """
    if options.split_dir is not None:
        return _read_division(labels, groups, Path(options.split_dir), options)
    numbers = np.arange(len(labels))
    if options.group_duplicates:
        numbers = np.fromiter((groups[guid] for guid in labels), np.int64, len(labels))
    group_of = dict(zip(labels, numbers.tolist(), strict=True))
    n_copies = len(numbers) - len(np.unique(numbers))
    remedy = ", or give your own parts with --split-dir"
    remedy += ", or count each copy as a row with --no-group-duplicates" if n_copies else ""
    split, rare = _draw_split(labels, group_of, options.seed, remedy)
    settled = settle_rare(labels, rare, options.rare)
    if settled.relabelled:
        split, still_rare = _draw_split(settled.labels, group_of, options.seed, remedy)
        settled = replace(settled, train_only=still_rare)
    counts = {"duplicates_together": n_copies, **settled.counts(NEEDED)}
    return Division(split, settled.labels, settled.relabelled, counts)


def _draw_split(
    labels: Mapping[str, str], group_of: Mapping[str, int], seed: int, remedy: str
) -> tuple[Split, dict[str, int]]:
    """Draw a split; also return the classes that train only, with their rows, copies counted once."""
    guids = list(labels)
    names, classes = np.unique(list(labels.values()), return_inverse=True)
    groups = np.fromiter((group_of[guid] for guid in guids), np.int64, len(guids))
    parts, rare = split_rows(classes, groups, names.tolist(), seed, remedy)
    counts = groups_per_class(classes, groups, len(names))
    split = Split(*([guids[row] for row in rows.tolist()] for rows in parts))
    return split, {str(names[number]): int(counts[number]) for number in rare}


@dataclass(frozen=True)
class _StoredSplit:
    """A split folder, compared with the labels and features of today.

    Attributes
    ----------
    parts
        Guids of each part that have a label and features today.
    unlabelled
        Test rows that have no label, neither in the folder nor today.
    named
        All guids in the folder.
    gone
        Rows of each part that have no label or no features today.
    changed
        Rows of each part with another label today.
    """

    parts: dict[str, list[str]]
    unlabelled: list[str]
    named: set[str]
    gone: dict[str, int]
    changed: dict[str, int]


def _read_stored(folder: Path, labels: Mapping[str, str]) -> _StoredSplit:
    """Read a split folder and compare it with the labels of today."""
    stored = read_split(folder)
    parts = {name: [guid for guid in tags if guid in labels] for name, tags in stored.items()}
    unlabelled = [guid for guid, tag in stored["test"].items() if guid not in labels and tag is None]
    gone = {name: len(tags) - len(parts[name]) for name, tags in stored.items()}
    gone["test"] -= len(unlabelled)
    changed = {
        name: sum(tags[guid] not in (None, labels[guid]) for guid in parts[name]) for name, tags in stored.items()
    }
    return _StoredSplit(parts, unlabelled, set().union(*stored.values()), gone, changed)


def _read_division(
    labels: Mapping[str, str], groups: Mapping[str, int], folder: Path, options: SplitOptions
) -> Division:
    """Return the split in ``folder`` with the labels of today."""
    stored = _read_stored(folder, labels)
    parts = dict(stored.parts)
    new = [guid for guid in labels if guid not in stored.named]
    held_out_groups = {groups[guid] for name in ("val", "test") for guid in parts[name]}
    new_without_copies = [guid for guid in new if groups[guid] not in held_out_groups]
    if options.new == "train":
        parts["train"] = parts["train"] + new_without_copies
    used = {guid: labels[guid] for guids in parts.values() for guid in guids}
    settled = settle_rare(used, _classes_missing_in_a_part(used, parts), options.rare)
    kept = {name: [guid for guid in guids if guid in settled.labels] for name, guids in parts.items()}
    _check_parts(folder, kept, settled.labels)
    held_out_classes = {settled.labels[guid] for name in ("val", "test") for guid in kept[name]}
    still_rare = _classes_missing_in_a_part(settled.labels, kept).keys() - held_out_classes
    counts = {
        "new_rows": len(new),
        "new_rows_go_to": options.new,
        "new_copies": len(new) - len(new_without_copies),
        "rows_gone": stored.gone,
        "labels_changed": stored.changed,
        "test_rows_unlabelled": len(stored.unlabelled),
        **replace(settled, train_only=still_rare).counts(None),
    }
    return Division(Split(**kept, unlabelled=stored.unlabelled), settled.labels, settled.relabelled, counts)


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
