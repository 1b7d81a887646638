"""Checking that a cache agrees with its raw pairs and that its numbers are sound."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .rows import finite_rows, window_rows
from .store import FeatureCache

_BLOCK_ROWS = 4096

Digests = tuple[bytes, bytes]


@dataclass
class VerifyReport:
    """Guids of bad rows: source changed, source gone, embedding not finite, embedding all zero."""

    rows: int
    changed: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    non_finite: list[str] = field(default_factory=list)
    all_zero: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether there is no bad row."""
        return not (self.changed or self.gone or self.non_finite or self.all_zero)


def verify(cache: FeatureCache, digests_now: Callable[[str], Digests | None]) -> VerifyReport:
    """Compare each row with its raw bytes, and find embeddings that cannot be right.

    Parameters
    ----------
    cache
        An open cache.
    digests_now
        Returns the current (sha256 of image bytes, sha256 of text bytes) of a guid, or None if a file is gone. Called
        from several threads.

    Raises
    ------
    CacheError
        A checksum shows that the file itself is damaged.
    """
    report = VerifyReport(len(cache))
    digests = cache.digests()
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(cache), _BLOCK_ROWS):  # in blocks, because a pool queues all its input
            block = cache.guids[start : start + _BLOCK_ROWS]
            stored_block = digests[start : start + _BLOCK_ROWS]
            for guid, stored, now in zip(block, stored_block, pool.map(digests_now, block), strict=True):
                if now is None:
                    report.gone.append(guid)
                elif now != stored:
                    report.changed.append(guid)
    finite, zero = soundness(cache)
    report.non_finite = [cache.guids[row] for row in np.flatnonzero(~finite)]
    report.all_zero = [cache.guids[row] for row in np.flatnonzero(zero)]
    return report


def soundness(cache: FeatureCache) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which rows have only finite numbers, and which have an embedding that is all zero, each (n,) bool.

    Raises
    ------
    CacheError
        A checksum shows that the file itself is damaged.
    """
    finite, zero = np.ones(len(cache), dtype=bool), np.zeros(len(cache), dtype=bool)
    for name in cache.embedding_names():
        step = window_rows(cache.file[name])
        for start in range(0, len(cache), step):
            rows = np.arange(start, min(start + step, len(cache)))
            values = cache.read(name, rows)
            finite[rows] &= finite_rows(values)
            zero[rows] |= ~values.reshape(len(rows), -1).any(axis=1)
    return finite, zero
