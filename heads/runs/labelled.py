"""Labelled rows of a cache, what became of them, and the share of memory for their features."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError
from ...cache.features import Features
from ...cache.labels import NO_COLUMNS, read_labels
from ...cache.machine import give_back_freed_memory
from ...cache.store import FeatureCache
from ..model.fusions import fusion_class
from ..model.inputs import Rows
from ..recipe import Recipe

_PROCESS_BYTES, _BYTES_PER_ROW, _LEAST_BYTES = 600 * 10**6, 500, 64 * 10**6


def labels_of(cache: FeatureCache, path: str | Path | None) -> tuple[Path, dict[str, str], int]:
    """Return (labels file, label by guid of the rows in the cache, number of labels without a row).

    Raise a DataError if no labels file is given or recorded, or if it has no label for any row.
    """
    labels_file = path if path is not None else cache.header.dataset["labels"]
    if labels_file is None:
        raise DataError(f"{cache.path} was made without labels: give --labels FILE, a CSV with header guid,tag")
    if not Path(labels_file).is_file():
        raise DataError(f"no such labels file: {labels_file}; give it with --labels")
    labels: dict[str, str] = {}
    absent = 0
    for guid, tag in read_labels(labels_file, cache.header.dataset.get("columns", NO_COLUMNS)).items():
        if tag is not None and guid in cache:
            labels[cache.guids[cache.row_of[guid]]] = tag  # the string of the cache, so that no copy takes memory
        elif tag is not None:
            absent += 1
    if not labels and not absent:
        raise DataError(f"{labels_file} has no label: fill in the column, or give another file with --labels")
    if not labels:
        raise DataError(
            f"none of the {absent} labels in {labels_file} belongs to a pair in {cache.path}: is it the labels file "
            f"of {cache.header.dataset['data']}?"
        )
    return Path(labels_file).absolute(), labels, absent


@contextlib.contextmanager
def absent_labels_are_named(cache: FeatureCache, absent: int) -> Iterator[None]:
    """Add to a DataError that the labels of ``absent`` pairs were left out, which may be its cause."""
    try:
        yield
    except DataError as error:
        if not absent:
            raise
        raise DataError(f"{error}; {absent} more labels belong to pairs that {cache.path} does not hold") from error


def features_for(
    cache: FeatureCache,
    guids: Sequence[str],
    recipes: Sequence[Recipe],
    max_bytes: int | None = None,
    of_rows: int | None = None,
) -> Features:
    """Return the features of ``guids``, in their order, that heads of any of ``recipes`` need.

    ``max_bytes`` and ``of_rows`` are those of ``FeatureCache.features``.
    """
    tokens = any(fusion_class(recipe.fusion, recipe.modality).needs_tokens for recipe in recipes)
    return cache.features(guids, tokens, any(recipe.views for recipe in recipes), max_bytes, of_rows)


def rows_of_parts(
    cache: FeatureCache,
    parts: Mapping[str, Sequence[str]],
    labels: dict[str, str],
    classes: Sequence[str],
    recipe: Recipe,
    max_bytes: int | None = None,
) -> dict[str, Rows]:
    """Return the rows of each part, by its name.

    ``max_bytes`` limits the memory of the process; features that do not fit are read as they are needed.
    """
    give_back_freed_memory()  # tables of text have just been read
    limit, n_rows = left_for_features(cache, max_bytes), sum(map(len, parts.values()))
    if limit is not None and n_rows * cache.row_bytes(bool(recipe.views)) > limit:
        limit //= len(parts) + 1  # each part, or a block of it, takes one share
    numbers = {name: class_numbers(guids, labels, classes) for name, guids in parts.items()}
    return {
        name: Rows(features_for(cache, guids, [recipe], limit, n_rows), numbers[name]) for name, guids in parts.items()
    }


def left_for_features(cache: FeatureCache, max_bytes: int | None) -> int | None:
    """Return ``max_bytes`` less the memory of Python, PyTorch, and the guids and labels of ``cache``."""
    if max_bytes is None:
        return None
    return max(max_bytes - _PROCESS_BYTES - _BYTES_PER_ROW * len(cache), _LEAST_BYTES)


def share_of(max_bytes: int | None, processes: int) -> int | None:
    """Return the share of ``max_bytes`` for each worker process; the process that waits for them takes one share."""
    return None if max_bytes is None else max_bytes // (processes + 1 if processes > 1 else 1)


def class_numbers(guids: Sequence[str], labels: dict[str, str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each guid's label among ``classes``, (n,) int64; raise a DataError for another label."""
    number = {name: index for index, name in enumerate(classes)}
    for guid in guids:
        if labels[guid] not in number:
            raise DataError(
                f"guid {guid!r} has the label {labels[guid]!r}, but the head knows {', '.join(classes)}: correct the "
                "label, or train a head on these labels"
            )
    return np.array([number[labels[guid]] for guid in guids], dtype=np.int64)


@dataclass(frozen=True)
class RowReport:
    """What became of the labelled rows. None: does not apply.

    Attributes
    ----------
    labels_without_features
        Labels of pairs that the cache does not hold.
    parts_without_rows
        Parts that were to be scored and have no row.
    rows_gone, labels_changed, labels_unknown
        By part: rows of a split that have no label or features any more; rows whose label differs from the split;
        rows left out because the head does not know their class.
    new_rows, new_rows_go_to, new_copies
        Labelled rows that a split folder does not name, their part, and how many are left out as copies of held-out
        rows.
    test_rows_unlabelled
        Test rows of a split folder without a label.
    duplicates_together, duplicates_separated, duplicates_left_out
        Copies kept in one part with their originals, validation and test rows with a copy in another part, and copies
        that were not scored.
    rare_classes, rare_classes_need, rare_train_only, rare_merged, rare_left_out
        Rows of each class that is too rare, copies counted once; the rows that a class needs (None: one in each part
        of the split folder); the classes that train only, that were merged, and the number of rows dropped.
    train_only_rows, classes_not_scored
        Rows that no fold scores, and their classes.
    """

    labels_without_features: int
    parts_without_rows: list[str] | None = None
    rows_gone: dict[str, int] | None = None
    labels_changed: dict[str, int] | None = None
    labels_unknown: dict[str, int] | None = None
    new_rows: int | None = None
    new_rows_go_to: str | None = None
    new_copies: int | None = None
    test_rows_unlabelled: int | None = None
    duplicates_together: int | None = None
    duplicates_separated: int | None = None
    duplicates_left_out: int | None = None
    rare_classes: dict[str, int] | None = None
    rare_classes_need: int | None = None
    rare_train_only: list[str] | None = None
    rare_merged: list[str] | None = None
    rare_left_out: int | None = None
    train_only_rows: int | None = None
    classes_not_scored: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what applies, as plain data."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def usable_rows(
    parts: Mapping[str, Sequence[str]], labels: Mapping[str, str], classes: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, int], dict[str, int]]:
    """Return by part the rows that can be used, and the numbers of rows that are gone and that have an unknown label.

    A row is gone if it has lost its label or its features. Raise a DataError if no row of a part can be used.
    """
    usable: dict[str, list[str]] = {}
    gone: dict[str, int] = {}
    unknown: dict[str, int] = {}
    for part, guids in parts.items():
        labelled = [guid for guid in guids if guid in labels]
        usable[part] = [guid for guid in labelled if labels[guid] in classes]
        gone[part], unknown[part] = len(guids) - len(labelled), len(labelled) - len(usable[part])
        if not labelled:
            raise DataError(
                f"none of the {len(guids)} {part} rows has a label and features here, the first is {guids[0]!r}: give "
                "the labels file and the cache that the head was trained with"
            )
        if not usable[part]:
            raise DataError(
                f"none of the {len(labelled)} {part} rows has a label that the head knows: {labelled[0]!r} is "
                f"{labels[labelled[0]]!r}, but the head knows {', '.join(classes)}"
            )
    return usable, gone, unknown


def changed_labels(
    best_pt: Path | None, parts: Mapping[str, Sequence[str]], labels: Mapping[str, str]
) -> dict[str, int]:
    """Count by part the rows whose label differs from the splits folder beside ``best_pt``, if there is one."""
    changed = dict.fromkeys(parts, 0)
    for name, guids in parts.items():
        path = None if best_pt is None else best_pt.parent / "splits" / f"{name}_split.csv"
        if path is not None and path.is_file():
            tags = read_labels(path)
            changed[name] = sum(tags.get(guid) not in (None, labels[guid]) for guid in guids)
    return changed
