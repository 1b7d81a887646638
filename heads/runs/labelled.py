"""Labelled rows of a cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError
from ...cache.labels import read_labels
from ...cache.machine import give_back_freed_memory
from ...cache.store import FeatureCache
from ..model.fusions import fusion_class
from ..model.inputs import Rows
from ..recipe import Recipe

_PROCESS_BYTES, _BYTES_PER_ROW, _LEAST = 600 * 10**6, 500, 64 * 10**6


def labels_of(cache: FeatureCache, path: str | Path | None) -> tuple[Path, dict[str, str], int]:
    """Return (labels file, label by guid of the rows in the cache, number of labels without a row).

    Raises
    ------
    DataError
        No labels file given or recorded, or no label for any row.
    """
    found = path if path is not None else cache.header.dataset["labels"]
    if found is None:
        raise DataError(f"{cache.path} was made without labels: give --labels FILE, a CSV with header guid,tag")
    if not Path(found).is_file():
        raise DataError(f"no such labels file: {found}; say with --labels where it is")
    labels: dict[str, str] = {}
    absent = 0
    for guid, tag in read_labels(found).items():
        if tag is not None and guid in cache:
            labels[cache.guids[cache.row_of[guid]]] = tag  # the cache's own string: one for both
        elif tag is not None:
            absent += 1
    if not labels:
        raise DataError(
            f"none of the {absent} labels in {found} is of a pair in {cache.path}: is it the labels file of "
            f"{cache.header.dataset['data']}?"
        )
    return Path(found).absolute(), labels, absent


def rows_of(
    cache: FeatureCache,
    guids: Sequence[str],
    labels: dict[str, str],
    classes: Sequence[str],
    recipes: Sequence[Recipe],
    max_bytes: int | None = None,
    of_rows: int | None = None,
) -> Rows:
    """Return what heads of any of ``recipes`` look at, and class numbers, of ``guids`` in their order.

    Raises
    ------
    DataError
        Where a label is not one of ``classes``.
    CacheError
        Where tokens or views are needed and not there, or an embedding is not finite.
    """
    numbers = class_numbers(guids, labels, classes)
    tokens = any(fusion_class(recipe.fusion, recipe.modality).needs_tokens for recipe in recipes)
    features = cache.features(guids, tokens, any(recipe.views for recipe in recipes), max_bytes, of_rows)
    return Rows(features, numbers)


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
        What the process may take: features that are more than it leaves are read as they are needed.
    """
    give_back_freed_memory()  # of tables of text
    each, together = left_for_features(cache, max_bytes), sum(map(len, parts.values()))
    if each is not None and together * cache.row_bytes(bool(recipe.views)) > each:
        each //= len(parts) + 1  # a part may be in memory, or a block of it
    return {name: rows_of(cache, guids, labels, classes, [recipe], each, together) for name, guids in parts.items()}


def left_for_features(cache: FeatureCache, max_bytes: int | None) -> int | None:
    """Return what is left of ``max_bytes`` beside Python, PyTorch, and guids and labels of the rows of ``cache``."""
    if max_bytes is None:
        return None
    return max(max_bytes - _PROCESS_BYTES - _BYTES_PER_ROW * len(cache), _LEAST)


def share_of(max_bytes: int | None, processes: int) -> int | None:
    """Return the share of ``max_bytes`` for each of several processes, and for the one that waits for them."""
    return None if max_bytes is None else max_bytes // (processes + 1 if processes > 1 else 1)


def class_numbers(guids: Sequence[str], labels: dict[str, str], classes: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each guid's label among ``classes``, (n,) int64.

    Raises
    ------
    DataError
        A label is not one of them.
    """
    number = {name: index for index, name in enumerate(classes)}
    for guid in guids:
        if labels[guid] not in number:
            raise DataError(
                f"guid {guid!r} has the label {labels[guid]!r}, the head knows {', '.join(classes)}: correct it, "
                "or train a head on these labels"
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
        How many have no label or no features any more.
    unknown
        How many have a label that the head does not know.
    """

    guids: list[str]
    gone: int
    unknown: int


def usable_rows(part: str, guids: Sequence[str], labels: Mapping[str, str], classes: Sequence[str]) -> UsableRows:
    """Return the rows of a part of a split that have features and a known label today.

    Raises
    ------
    DataError
        There is none.
    """
    known = set(classes)
    here = [guid for guid in guids if guid in labels]
    usable = [guid for guid in here if labels[guid] in known]
    if not here:
        raise DataError(
            f"none of the {len(guids)} {part} rows has a label and features here, the first is {guids[0]!r}: give the "
            "labels file and the cache that the head was trained with"
        )
    if not usable:
        raise DataError(
            f"none of the {len(here)} {part} rows has a label that the head knows: {here[0]!r} is {labels[here[0]]!r}, "
            f"the head knows {', '.join(classes)}"
        )
    return UsableRows(usable, len(guids) - len(here), len(here) - len(usable))


def changed_labels(
    best_pt: Path | None, parts: Mapping[str, Sequence[str]], labels: Mapping[str, str]
) -> dict[str, int]:
    """Count by part the rows whose label is not the one in the splits folder beside ``best_pt``, if there is one."""
    changed = dict.fromkeys(parts, 0)
    for name, guids in parts.items():
        path = None if best_pt is None else best_pt.parent / "splits" / f"{name}_split.csv"
        if path is not None and path.is_file():
            tags = read_labels(path)
            changed[name] = sum(tags.get(guid) not in (None, labels[guid]) for guid in guids)
    return changed
