"""Pairs that are copies of each other: byte-identical images, or identical cleaned texts."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...cache.schema import EMPTY_SHA256
from ...cache.store import FeatureCache
from .splits import Split

_NOTHING = np.array([EMPTY_SHA256, bytes(32)], dtype="V32")  # an empty side, and one that is missing


def duplicate_groups(cache: FeatureCache, guids: Sequence[str]) -> NDArray[np.int64]:
    """Return a group number per pair, (n,) int64: the same where images or cleaned texts are the same.

    Groups are closed: a pair that shares its image with one and its text with another joins them. Texts of which
    cleaning leaves nothing, and images that are missing, are not copies of each other. Where a cache has no digests of
    cleaned texts, those of the raw ones are taken.
    """
    rows, n = cache.rows(guids), len(guids)
    text = "row/cleaned_sha256" if cache.has_cleaned else "row/text_sha256"
    left, right = [], []
    for name in ("row/image_sha256", text):
        digests = np.ascontiguousarray(cache.read(name, rows)).view("V32").reshape(n)
        mine = np.flatnonzero((digests != _NOTHING[0]) & (digests != _NOTHING[1]))
        _, first, inverse = np.unique(digests[mine], return_index=True, return_inverse=True)
        left.append(mine)
        right.append(mine[first[inverse]])
    return connected(n, np.concatenate(left), np.concatenate(right))


def connected(n: int, left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the number of the connected component of each of n nodes, (n,), given the two ends of each edge.

    Numbered by their first nodes, as ``scipy.sparse.csgraph.connected_components`` does, which takes longer to import
    than a million nodes take here.
    """
    first = np.arange(n)  # the least node that is known to be in the component
    while True:
        one, other = first[left], first[right]
        if np.array_equal(one, other):
            numbers: NDArray[np.int64] = np.unique(first, return_inverse=True)[1].astype(np.int64)
            return numbers
        least = np.minimum(one, other)
        np.minimum.at(first, one, least)
        np.minimum.at(first, other, least)
        while not np.array_equal(first, first[first]):
            first = first[first]


class Groups(Mapping[str, int]):
    """The group number of each of some pairs, by guid."""

    def __init__(self, cache: FeatureCache, guids: Sequence[str]) -> None:
        self._guids, self._row_of = guids, cache.row_of
        self._numbers = np.zeros(len(cache), dtype=np.int64)
        self._numbers[cache.rows(guids)] = duplicate_groups(cache, guids)

    def __getitem__(self, guid: str) -> int:
        return int(self._numbers[self._row_of[guid]])

    def __iter__(self) -> Iterator[str]:
        return iter(self._guids)

    def __len__(self) -> int:
        return len(self._guids)


def group_numbers(groups: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> dict[str, NDArray[np.int64]]:
    """Return the group number of each guid, (n,) int64, by part."""
    return {name: np.fromiter((groups[guid] for guid in guids), np.int64, len(guids)) for name, guids in parts.items()}


def separated(split: Split, groups: Mapping[str, int], of_parts: Sequence[str] = ("val", "test")) -> int:
    """Count the rows of ``of_parts`` that have a copy in another part of the split."""
    parts = group_numbers(groups, split.named())
    elsewhere = {name: np.concatenate([found for other, found in parts.items() if other != name]) for name in of_parts}
    return sum(int(np.isin(parts[name], others).sum()) for name, others in elsewhere.items())


def without_copies(guids: Sequence[str], learned_from: Sequence[str], groups: Mapping[str, int]) -> list[str]:
    """Return the guids that are no copies of rows that a head learned from."""
    known = {groups[guid] for guid in learned_from}
    return [guid for guid in guids if groups[guid] not in known]
