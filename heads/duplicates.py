"""Pairs that are copies of each other: byte-identical images, or identical cleaned texts."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..cache.store import FeatureCache
from .splits import Split

_NO_TEXT = hashlib.sha256(b"").digest()


def duplicate_groups(cache: FeatureCache, guids: Sequence[str]) -> NDArray[np.int64]:
    """Return a group number per pair, (n,) int64: the same where images or cleaned texts are the same.

    Groups are closed: a pair that shares its image with one and its text with another joins them. Texts of which
    cleaning leaves nothing are not copies of each other. Where a cache has no digests of cleaned texts, those of the
    raw ones are taken.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows, n = cache.rows(guids), len(guids)
    text = "row/cleaned_sha256" if cache.has_cleaned else "row/text_sha256"
    edges = []
    for name in ("row/image_sha256", text):
        first: dict[bytes, int] = {}
        for number, digest in enumerate(map(bytes, cache.read(name, rows))):
            if name == "row/image_sha256" or digest != _NO_TEXT:
                edges.append((number, first.setdefault(digest, number)))
    left, right = np.array(edges, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), dtype=np.int8), (left, right)), shape=(n, n))
    groups: NDArray[np.int64] = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def separated(split: Split, groups: Mapping[str, int]) -> int:
    """Count the validation and test pairs that have a copy in another part of the split."""
    parts = split.named()
    of_part = {name: {groups[guid] for guid in guids} for name, guids in parts.items()}
    count = 0
    for name in ("val", "test"):
        elsewhere = set().union(*(found for other, found in of_part.items() if other != name))
        count += sum(groups[guid] in elsewhere for guid in parts[name])
    return count
