"""Labelled rows of a cache, and the share of memory for their features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError
from ...cache.features import Features
from ...cache.labels import read_labels
from ...cache.machine import give_back_freed_memory
from ...cache.store import FeatureCache
from ..model.fusions import fusion_class
from ..model.inputs import Rows
from ..recipe import Recipe

_PROCESS_BYTES, _BYTES_PER_ROW, _LEAST_BYTES = 600 * 10**6, 500, 64 * 10**6


def labels_of(cache: FeatureCache, path: str | Path | None) -> tuple[Path, dict[str, str], int]:
    """Return (labels file, label by guid of the rows in the cache, number of labels without a row).

    Raises
    ------
    DataError
        No labels file is given or recorded, or it has no label for any row.
    """
    labels_file = path if path is not None else cache.header.dataset["labels"]
    if labels_file is None:
        raise DataError(f"{cache.path} was made without labels: give --labels FILE, a CSV with header guid,tag")
    if not Path(labels_file).is_file():
        raise DataError(f"no such labels file: {labels_file}; give it with --labels")
    labels: dict[str, str] = {}
    absent = 0
    for guid, tag in read_labels(labels_file).items():
        if tag is not None and guid in cache:
            labels[cache.guids[cache.row_of[guid]]] = tag  # the string of the cache, so that no copy takes memory
        elif tag is not None:
            absent += 1
    if not labels:
        raise DataError(
            f"none of the {absent} labels in {labels_file} belongs to a pair in {cache.path}: is it the labels file "
            f"of {cache.header.dataset['data']}?"
        )
    return Path(labels_file).absolute(), labels, absent


def features_for(
    cache: FeatureCache,
    guids: Sequence[str],
    recipes: Sequence[Recipe],
    max_bytes: int | None = None,
    of_rows: int | None = None,
) -> Features:
    """Return the features of ``guids``, in their order, that heads of any of ``recipes`` need.

    Parameters
    ----------
    max_bytes, of_rows
        See ``FeatureCache.features``.

    Raises
    ------
    CacheError
        Tokens or views are needed and not in the cache, or an embedding is not finite.
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

    Parameters
    ----------
    max_bytes
        Limit for the memory of the process; features that do not fit are read as they are needed.
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
    """Return the number of each guid's label among ``classes``, (n,) int64.

    Raises
    ------
    DataError
        A label is not among ``classes``.
    """
    number = {name: index for index, name in enumerate(classes)}
    for guid in guids:
        if labels[guid] not in number:
            raise DataError(
                f"guid {guid!r} has the label {labels[guid]!r}, but the head knows {', '.join(classes)}: correct the "
                "label, or train a head on these labels"
            )
    return np.array([number[labels[guid]] for guid in guids], dtype=np.int64)


@dataclass(frozen=True)
class UsableRows:
    """The rows of a part that can be scored, and how many cannot.

    Attributes
    ----------
    guids
        Rows with features and a label that the head knows.
    gone
        Number of rows that have lost their label or features.
    unknown
        Number of rows with a label that the head does not know.
    """

    guids: list[str]
    gone: int
    unknown: int


def usable_rows(part: str, guids: Sequence[str], labels: Mapping[str, str], classes: Sequence[str]) -> UsableRows:
    """Return the rows of a part of a split that have features and a known label today.

    Raises
    ------
    DataError
        No row can be scored.
    """
    known = set(classes)
    labelled = [guid for guid in guids if guid in labels]
    usable = [guid for guid in labelled if labels[guid] in known]
    if not labelled:
        raise DataError(
            f"none of the {len(guids)} {part} rows has a label and features here, the first is {guids[0]!r}: give the "
            "labels file and the cache that the head was trained with"
        )
    if not usable:
        first = labelled[0]
        raise DataError(
            f"none of the {len(labelled)} {part} rows has a label that the head knows: {first!r} is "
            f"{labels[first]!r}, but the head knows {', '.join(classes)}"
        )
    return UsableRows(usable, len(guids) - len(labelled), len(labelled) - len(usable))


def counts_of_unusable(usable: Mapping[str, UsableRows]) -> dict[str, dict[str, int]]:
    """Return ``rows_gone`` and ``labels_unknown`` by part."""
    return {
        "rows_gone": {name: rows.gone for name, rows in usable.items()},
        "labels_unknown": {name: rows.unknown for name, rows in usable.items()},
    }


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
