"""Classes too rare to be scored: they train only, are merged into one class, or are dropped."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...cache.errors import DataError
from .folds import groups_per_class, rare_classes

OTHER = "other"  # the class that rare classes are merged into


@dataclass(frozen=True)
class SettledLabels:
    """Labels after rare classes were merged or dropped.

    Attributes
    ----------
    labels
        Class by guid.
    relabelled
        New name of each class that was merged; None for a class that was dropped.
    rare
        Rows of each class that was rare at first, copies counted once.
    train_only
        Classes that are still too rare to be scored.
    n_dropped
        Number of rows dropped.
    """

    labels: dict[str, str]
    relabelled: dict[str, str | None]
    rare: dict[str, int]
    train_only: Collection[str]
    n_dropped: int

    def counts(self, needed: int | None) -> dict[str, Any]:
        """Return the entries of ``metrics.json`` about rare classes; empty where no class is rare.

        Parameters
        ----------
        needed
            Rows that a class needs, copies counted once. None if it needs a row in each part of a split folder.
        """
        if not self.rare:
            return {}
        return {
            "rare_classes": self.rare,
            "rare_classes_need": needed,
            "rare_train_only": sorted(self.train_only),
            "rare_merged": sorted(name for name, new_name in self.relabelled.items() if new_name is not None),
            "rare_left_out": self.n_dropped,
        }


def settle_rare(labels: Mapping[str, str], rare: dict[str, int], how: str) -> SettledLabels:
    """Merge or drop rare classes, or let them train only.

    ``train_only`` of the result is right where no label changed. Otherwise the caller finds out which classes are still
    rare.

    Parameters
    ----------
    labels
        Class by guid.
    rare
        Rows of each rare class.
    how
        As ``SplitOptions.rare``.

    Raises
    ------
    DataError
        There is no second rare class to merge with, or a class is already called ``other``.
    """
    if not rare or how == "train-only":
        return SettledLabels(dict(labels), {}, rare, rare.keys(), 0)
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
    changed = relabel(labels, relabelled)
    return SettledLabels(changed, relabelled, rare, (), len(labels) - len(changed))


def settle_rare_in_folds(labels: Mapping[str, str], groups: Mapping[str, int], folds: int, how: str) -> SettledLabels:
    """Merge or drop classes with fewer rows than folds, copies counted once, or let them train only."""
    settled = settle_rare(labels, _rare_in_folds(labels, groups, folds), how)
    if not settled.relabelled:
        return settled
    return replace(settled, train_only=_rare_in_folds(settled.labels, groups, folds))


def _rare_in_folds(labels: Mapping[str, str], groups: Mapping[str, int], folds: int) -> dict[str, int]:
    """Return the classes with fewer rows than folds, and their rows, copies counted once."""
    if not labels:
        return {}
    names, classes = np.unique(list(labels.values()), return_inverse=True)
    numbers = np.fromiter((groups[guid] for guid in labels), np.int64, len(labels))
    counts = groups_per_class(classes, numbers, len(names))
    return {str(names[number]): int(counts[number]) for number in rare_classes(classes, numbers, folds)}


def relabel(labels: Mapping[str, str], relabelled: Mapping[str, str | None]) -> dict[str, str]:
    """Return labels by the class names that a head knows, without classes that were dropped."""
    known = ((guid, relabelled.get(tag, tag)) for guid, tag in labels.items())
    return {guid: tag for guid, tag in known if tag is not None}


def renamed(labels: Mapping[str, str], relabelled: Mapping[str, str | None]) -> dict[str, str]:
    """Return labels by the class names that a head knows; dropped classes keep their own names."""
    return {guid: relabelled.get(tag) or tag for guid, tag in labels.items()}
