"""Which rows of the existing cache, or of a finished part, the new cache can use."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import CacheError
from ..cache.store import FeatureCache
from .encode_options import EncodeOptions
from .identity import is_cleaned, is_earlier
from .pairs.changes import Comparison, compare_rows
from .pairs.dataset import Dataset
from .pairs.pair import Pair
from .request import Request


@dataclass(frozen=True)
class FileRows:
    """Rows of one file, and the pairs whose features they hold.

    Attributes
    ----------
    path
        A cache file or a part.
    pairs, rows
        (n,) int64: numbers of the pairs in the dataset, and of their rows in the file.
    """

    path: Path
    pairs: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class CachedRows:
    """What the existing cache gives to the new one.

    Attributes
    ----------
    kept
        Rows that go into the new cache as they are.
    orphans
        (guid, row) of further such rows, whose pairs the dataset no longer has.
    stale
        (number of the pair, row) by guid, of pairs that changed: the row is used if the pair turns out unreadable.
    unreadable
        Numbers of the pairs in ``kept`` that cannot be read now.
    reusable
        Which rows' embeddings may be used for equal images and texts of other pairs, (N,) bool by tower. None: all.
    unchanged, gone, pruned
        Rows whose pair did not change, rows whose pair is gone, and how many of the latter are dropped.
    """

    kept: FileRows
    orphans: list[tuple[str, int]] = field(default_factory=list)
    stale: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: list[int] = field(default_factory=list)
    reusable: Mapping[str, NDArray[np.bool_]] | None = None
    unchanged: int = 0
    gone: int = 0
    pruned: int = 0


NO_CACHED_ROWS = CachedRows(FileRows(Path(), np.empty(0, np.int64), np.empty(0, np.int64)))


def find_cached_rows(request: Request, cached: FeatureCache) -> CachedRows:
    """Compare every row of the existing cache with its pair.

    Raises
    ------
    CacheError
        The cache is from another backbone or from other data, or cannot be upgraded because pairs of it are gone.
    """
    is_upgrade = is_earlier(cached.header.identity, request.header.identity)
    if not is_upgrade:
        cached.check(request.header.identity, request.header.backbone["name"])
    pairs, prune = request.dataset.pairs, request.options.prune
    number_of: dict[str, int] = {}
    absent: dict[str, int] = {}  # pairs that only a label names
    for number, pair in enumerate(pairs):
        (absent if pair.absent else number_of)[pair.guid] = number
    comparison = compare_all(cached, pairs, number_of, is_upgrade and cached.has_cleaned)
    _refuse_other_dataset(cached, request.dataset, int(comparison.same_bytes.sum()))
    is_complete = has_right_columns(cached, request.encode)
    sound = _sound_rows(cached) if is_complete else np.ones(len(cached), dtype=bool)
    usable = comparison.same & sound & is_complete
    keep_unreadable = ~comparison.readable & sound & (not prune)
    keep_stale = sound & (not prune and is_complete and not is_upgrade)
    pair_of_row = np.full(len(cached), -1, np.int64)
    orphans: list[tuple[str, int]] = []
    stale: dict[str, tuple[int, int]] = {}
    unreadable: list[int] = []
    gone = 0
    for row, guid in enumerate(cached.guids):
        pair_number = number_of.get(guid)
        if pair_number is None:
            gone += 1
            if not prune and guid in absent:
                pair_of_row[row] = absent[guid]
            elif not prune:
                orphans.append((guid, row))
        elif usable[row]:
            pair_of_row[row] = pair_number
        elif keep_unreadable[row]:
            pair_of_row[row] = pair_number
            unreadable.append(pair_number)
        elif keep_stale[row]:
            stale[guid] = pair_number, row
    _refuse_partial_upgrade(request, 0 if prune else gone + len(unreadable), is_upgrade, is_complete)
    kept_rows = np.flatnonzero(pair_of_row >= 0)
    return CachedRows(
        FileRows(request.out, pair_of_row[kept_rows], kept_rows),
        orphans,
        stale,
        unreadable,
        _reusable_rows(request, comparison) if is_upgrade else None,
        unchanged=int(usable.sum()),
        gone=gone,
        pruned=gone if prune else 0,
    )


def has_right_columns(cached: FeatureCache, options: EncodeOptions) -> bool:
    """Whether a file has exactly the columns that ``options`` ask for."""
    return cached.n_views == options.views and cached.has_tokens == options.tokens and cached.has_cleaned


def compare_all(
    cached: FeatureCache, pairs: Sequence[Pair], number_of: Mapping[str, int], is_upgrade: bool = False
) -> Comparison:
    """Compare every row of a file with its pair. A row without a pair counts as unreadable."""
    rows = np.array([row for row, guid in enumerate(cached.guids) if guid in number_of], dtype=np.int64)
    pairs_of_rows = (pairs[number_of[cached.guids[row]]] for row in rows.tolist())
    compared = compare_rows(cached, rows, pairs_of_rows, is_upgrade)
    flags = np.zeros((4, len(cached)), dtype=bool)
    flags[:, rows] = [compared.readable, compared.same_bytes, compared.image, compared.text]
    return Comparison(*flags)


def _sound_rows(cached: FeatureCache) -> NDArray[np.bool_]:
    """Return which rows `mmcli cache verify` would accept, (N,); the others are computed again."""
    not_finite, zero = cached.unsound()
    return ~(not_finite | zero)


def _reusable_rows(request: Request, comparison: Comparison) -> dict[str, NDArray[np.bool_]]:
    # Cleaned texts are looked up by the digest of the new cleaning, which old rows match only if nothing changed.
    text = np.ones_like(comparison.text) if is_cleaned(request.header.identity) else comparison.text
    return {"image": comparison.image, "text": text}


def _refuse_other_dataset(cached: FeatureCache, dataset: Dataset, same: int) -> None:
    if cached.header.dataset["data"] != str(dataset.data) and 2 * same < len(cached):
        raise CacheError(
            f"{cached.path} holds the pairs of {cached.header.dataset['data']}, but only {same} of {len(cached)} "
            f"are in {dataset.data}: give another --out for other data"
        )


def _refuse_partial_upgrade(request: Request, lost: int, is_upgrade: bool, is_complete: bool) -> None:
    if lost and (is_upgrade or not is_complete):
        why = "texts are cleaned differently now" if is_upgrade else "views, tokens or digests of cleaned texts are new"
        raise CacheError(
            f"{request.out} must be upgraded ({why}), but {lost} of its pairs are no longer in {request.dataset.data} "
            "or cannot be read: bring them back, drop them with --prune, or give another --out"
        )
