"""What the new cache holds, once all blocks are encoded, and writing it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..cache.errors import DataError
from ..cache.parts import merge, remove_parts
from .blocks import ComputedRows
from .cached_rows import FileRows
from .pairs.folder import LazySequence
from .pairs.hashing import Reject, unreadable
from .pairs.pair import natural_key
from .plan import Plan
from .rejects import rejects_path, write_rejects
from .request import Request, with_all_versions

RowSource = tuple[str, Path, int]  # guid, file, row in the file
_STAYS = "; its row stays in the cache until --prune"


@dataclass(frozen=True)
class CacheContents:
    """Rows of the new cache, and the pairs that cannot be read.

    Attributes
    ----------
    rows
        Where each row comes from, in natural order of guid.
    files
        The files that rows come from.
    left_out
        Pairs that are not in the new cache.
    kept
        Pairs whose row in the existing cache is kept although they cannot be read now.
    """

    rows: Sequence[RowSource]
    files: set[Path]
    left_out: list[Reject]
    kept: list[Reject]

    @property
    def rejects(self) -> list[Reject]:
        """All pairs that cannot be read, in natural order of guid."""
        return sorted([*self.left_out, *self.kept], key=lambda reject: natural_key(reject.guid))


def choose_contents(request: Request, plan: Plan, computed: ComputedRows) -> CacheContents:
    """Put together finished and computed rows. Rows of pairs that turned out unreadable are kept."""
    pairs, stale = request.dataset.pairs, plan.cached.stale
    rescued = [stale[reject.guid] for reject in computed.rejects if reject.guid in stale]
    numbers, rows = np.array(rescued, dtype=np.int64).reshape(-1, 2).T
    rows_of_files = [plan.cached.kept, FileRows(request.out, numbers, rows), *plan.resumed, *computed.parts]
    kept = [reject for reject in computed.rejects if reject.guid in stale]
    kept += [reject for number in plan.cached.unreadable if (reject := unreadable(pairs[number])) is not None]
    orphans = [(guid, request.out, row) for guid, row in plan.cached.orphans]
    row_sources = _in_order(request, rows_of_files)
    return CacheContents(
        sorted([*row_sources, *orphans], key=lambda source: natural_key(source[0])) if orphans else row_sources,
        {finished.path for finished in rows_of_files if len(finished)} | {path for _, path, _ in orphans[:1]},
        [reject for reject in computed.rejects if reject.guid not in stale],
        [replace(reject, reason=reject.reason + _STAYS) for reject in kept],
    )


def _in_order(request: Request, rows_of_files: Sequence[FileRows]) -> Sequence[RowSource]:
    """Return the source of each pair's row, in the order of the dataset, lazily to save memory."""
    pairs = request.dataset.pairs
    numbers = np.concatenate([finished.pairs for finished in rows_of_files])
    rows = np.concatenate([finished.rows for finished in rows_of_files])
    files = np.repeat(np.arange(len(rows_of_files), dtype=np.int32), [len(finished) for finished in rows_of_files])
    order = np.argsort(numbers, kind="stable")

    def source_of(position: int) -> RowSource:
        place = order[position]
        return pairs[int(numbers[place])].guid, rows_of_files[files[place]].path, int(rows[place])

    return LazySequence(len(order), source_of)


def write_cache(request: Request, contents: CacheContents, computed: int) -> None:
    """Merge the rows into the new cache and remove the parts. A cache that would not change is left as it is.

    Raises
    ------
    DataError
        There is no row at all.
    """
    out, cached_header = request.out, request.cached_header
    write_rejects(out, contents.rejects)
    if not len(contents.rows):
        raise DataError(f"no pair of {request.dataset.data} could be read: see {rejects_path(out)}")
    header = with_all_versions(request.header, cached_header, computed)
    if contents.files != {out} or len(contents.rows) != request.cached_rows or header != cached_header:
        merge(out, contents.rows, header)
    remove_parts(out, header.fingerprint)
