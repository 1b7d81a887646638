"""Pairs that are copies of each other: byte-identical images, or identical cleaned texts."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...cache.schema import EMPTY_SHA256
from ...cache.store import FeatureCache
from .splits import Split

_NOTHING = np.array([EMPTY_SHA256, bytes(32)], dtype="V32")  # digests of an empty side and of a missing side


def duplicate_groups(cache: FeatureCache, guids: Sequence[str]) -> NDArray[np.int64]:
    """Return the group number of each pair, (n,) int64, from 0; copies of each other have the same number.

    Groups are closed: a pair that shares its image with a second pair and its text with a third joins all three.
    Missing images, and texts that are empty after cleaning, are not copies of each other. A cache without digests of
    cleaned texts is compared by its raw texts.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, n = cache.rows(guids), len(guids)
    text = "row/cleaned_sha256" if cache.has_cleaned else "row/text_sha256"
    pairs, first_copies = [], []
    for name in ("row/image_sha256", text):
        digests = np.ascontiguousarray(cache.read(name, rows)).view("V32").reshape(n)
        there = np.flatnonzero((digests != _NOTHING[0]) & (digests != _NOTHING[1]))
        _, first, inverse = np.unique(digests[there], return_index=True, return_inverse=True)
        pairs.append(there)
        first_copies.append(there[first[inverse]])
    edges = (np.concatenate(pairs), np.concatenate(first_copies))
    graph = coo_array((np.ones(len(edges[0]), dtype=np.bool_), edges), shape=(n, n))
    numbers: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return numbers


def groups_by_guid(cache: FeatureCache, guids: Sequence[str]) -> dict[str, int]:
    """Return the number of each pair's group of copies, by guid; see ``duplicate_groups``."""
    return dict(zip(guids, duplicate_groups(cache, guids).tolist(), strict=True))


def group_numbers(groups: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.int64]]:
    """Return the group number of each guid, (n,) int64, by part."""
    return {name: np.fromiter((groups[guid] for guid in guids), np.int64, len(guids)) for name, guids in parts.items()}


def separated(split: Split, groups: Mapping[str, int], of_parts: Sequence[str] = ("val", "test")) -> int:
    """Count the rows of ``of_parts`` that have a copy in another part of the split."""
    numbers = group_numbers(groups, split.named())
    count = 0
    for name in of_parts:
        elsewhere = np.concatenate([numbers[part] for part in numbers if part != name])
        count += int(np.isin(numbers[name], elsewhere).sum())
    return count


def without_copies(guids: Sequence[str], learned_from: Sequence[str], groups: Mapping[str, int]) -> list[str]:
    """Return the guids of pairs that are not copies of pairs that a head learned from."""
    known = {groups[guid] for guid in learned_from}
    return [guid for guid in guids if groups[guid] not in known]
