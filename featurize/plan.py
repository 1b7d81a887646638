"""Where each row of the new cache comes from, and which pairs must be computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.parts import parts_folder, read_parts
from ..cache.store import FeatureCache
from .cached_rows import NO_CACHED_ROWS, CachedRows, FileRows, compare_all, find_cached_rows, has_right_columns
from .pairs.hashing import Reject, unreadable
from .pairs.pair import Pair
from .request import Request

BLOCK_ROWS = 256  # a crash costs at most the blocks that are being encoded


@dataclass(frozen=True)
class Plan:
    """What is finished, and what must be computed. Pairs are identified by their number in the dataset.

    Attributes
    ----------
    cached
        Rows of the existing cache.
    resumed
        Rows of an interrupted run, one entry per part.
    parts
        All readable parts of that run, whether or not their rows are used.
    blocks
        Pairs to compute, (n,) int64 for each block.
    rejects
        Pairs that cannot be read, as far as this is known before encoding.
    absent
        How many of ``rejects`` are named by a label only.
    """

    cached: CachedRows
    resumed: list[FileRows]
    parts: list[Path]
    blocks: list[NDArray[np.int64]]
    rejects: list[Reject]
    absent: int


def make_plan(request: Request, cached: FeatureCache | None) -> Plan:
    """Find what the existing cache and the parts of an interrupted run hold.

    Raises
    ------
    CacheError
        The cache is from another backbone or from other data, or cannot be upgraded because pairs of it are gone.
    """
    pairs = request.dataset.pairs
    cached_rows = NO_CACHED_ROWS if cached is None else find_cached_rows(request, cached)
    missing = np.setdiff1d(np.arange(len(pairs)), cached_rows.kept.pairs)
    parts = read_parts(parts_folder(request.out, request.header.fingerprint), request.header)
    resumed = _find_resumed_rows(request, parts, missing)
    is_todo = np.zeros(len(pairs), dtype=bool)
    is_todo[missing] = True
    for finished in resumed:
        is_todo[finished.pairs] = False
    rejects = _find_rejects(pairs, np.flatnonzero(is_todo).tolist())
    is_todo[list(rejects)] = False
    # Cut blocks before taking out finished pairs: a block that is computed again after a crash then holds the same
    # pairs as in an uninterrupted run, so it gives the same bits.
    blocks = np.split(missing, range(BLOCK_ROWS, len(missing), BLOCK_ROWS))
    blocks = [block[is_todo[block]] for block in blocks]
    return Plan(
        cached_rows,
        resumed,
        parts,
        [block for block in blocks if len(block)],
        list(rejects.values()),
        absent=sum(pairs[number].absent for number in rejects),
    )


def _find_resumed_rows(request: Request, parts: list[Path], missing: NDArray[np.int64]) -> list[FileRows]:
    """Return the rows of parts whose pairs have not changed since. Of two rows of a pair, the later part counts."""
    pairs = request.dataset.pairs
    number_of = {pairs[number].guid: number for number in missing.tolist()} if parts else {}
    resumed = []
    for path in reversed(parts):
        with FeatureCache.open(path) as part:
            if has_right_columns(part, request.encode):
                rows = np.flatnonzero(compare_all(part, pairs, number_of).same)
                numbers = np.array([number_of.pop(part.guids[row]) for row in rows], dtype=np.int64)
                resumed.append(FileRows(path, numbers, rows))
    return resumed


def _find_rejects(pairs: Sequence[Pair], todo: list[int]) -> dict[int, Reject]:
    """Return the rejects that are known before encoding, by number: pairs that lack a file, or all if none is readable.

    The second case saves loading the backbone when only unreadable pairs are left.
    """
    incomplete = [number for number in todo if pairs[number].is_incomplete()]
    rejects = {number: reject for number in incomplete if (reject := unreadable(pairs[number])) is not None}
    others = {}
    for number in todo:
        if number not in rejects:
            reject = unreadable(pairs[number])
            if reject is None:
                return rejects
            others[number] = reject
    return rejects | others
