"""Labelled rows of a cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import DataError
from ..cache.labels import read_labels
from ..cache.store import FeatureCache
from .fusions import fusion_class
from .inputs import Rows
from .recipe import Recipe


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
    labelled = {guid: tag for guid, tag in read_labels(found).items() if tag is not None}
    labels = {guid: tag for guid, tag in labelled.items() if guid in cache}
    if not labels:
        raise DataError(
            f"none of the {len(labelled)} labels in {found} is of a pair in {cache.path}: is it the labels file of "
            f"{cache.header.dataset['data']}?"
        )
    return Path(found).absolute(), labels, len(labelled) - len(labels)


def rows_of(
    cache: FeatureCache,
    guids: Sequence[str],
    labels: dict[str, str],
    classes: Sequence[str],
    recipes: Sequence[Recipe],
    max_bytes: int | None = None,
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
    features = cache.features(guids, tokens, any(recipe.views for recipe in recipes), max_bytes)
    return Rows(features, numbers)


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
            raise DataError(f"guid {guid!r} has the label {labels[guid]!r}, the head knows {', '.join(classes)}")
    return np.array([number[labels[guid]] for guid in guids], dtype=np.int64)


def check_labelled(part: str, guids: Sequence[str], labels: Mapping[str, str]) -> None:
    """Raise a DataError where a row of a part of a split has no label, or no features, any more."""
    missing = [guid for guid in guids if guid not in labels]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(guids)} {part} rows have no label or no features here, the first is "
            f"{missing[0]!r}: give the labels file and the cache that the head was trained with"
        )
