"""Everything that decides whether a pair is encoded again.

A row of the existing cache, or of a part that an interrupted run finished, is used if its pair still has the same bytes
and nothing else that changes an embedding is different.
"""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import CacheError, DataError
from ..cache.parts import parts_folder, read_parts
from ..cache.schema import Header
from ..cache.store import FeatureCache
from ..cache.verify import soundness
from .backbones.base import Backbone
from .backbones.opening import choose_device, choose_dtype
from .identity import EncodeOptions, FeaturizeOptions, identity_of, is_cleaned, is_earlier
from .pairs.dataset import Dataset
from .pairs.hashing import Comparison, Reject, compare_rows, unreadable
from .pairs.pair import Pair

BLOCK_ROWS = 256  # a crash costs at most the blocks that are being encoded
_LIBRARIES = ("torch", "transformers", "numpy", "h5py", "pillow")


@dataclass(frozen=True)
class Request:
    """What a run is to make: the features that ``encode`` asks for, of each pair of ``dataset``, in the file ``out``.

    The options are complete (see ``complete_options``), and the model is not loaded yet.
    """

    out: Path
    dataset: Dataset
    backbone: Backbone
    options: FeaturizeOptions
    encode: EncodeOptions
    header: Header


def make_request(out: Path, dataset: Dataset, backbone: Backbone, options: FeaturizeOptions) -> Request:
    """Return the request for ``options`` that ``complete_options`` returned."""
    dtype = options.dtype
    if dtype == "auto":
        dtype = choose_dtype(dtype, choose_device(options.device))
    identity = identity_of(backbone, dtype, bool(options.clean), options.resize, options.encoding)
    encode = EncodeOptions.for_identity(identity, tokens=options.tokens)
    labels = dataset.labels_path
    header = Header(
        identity=identity,
        backbone={"name": backbone.name, "revision": backbone.revision},
        dataset={"data": str(dataset.data), "labels": None if labels is None else str(labels)},
        versions={"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    )
    encode = replace(encode, views=options.views, batch_size=options.batch_size)
    return Request(out, dataset, backbone, options, encode, header)


def with_recorded_labels(dataset: Dataset, cached: FeatureCache) -> Dataset:
    """Return the dataset with the labels file that the cache records, unless both take labels from the manifest.

    A labels file that is gone stays recorded, because it may come back.
    """
    recorded = cached.header.dataset["labels"]
    has_manifest_labels = recorded == cached.header.dataset["data"] and dataset.labels_path is not None
    if recorded is None or has_manifest_labels:
        return dataset
    if not Path(recorded).is_file():
        return replace(dataset, labels_path=Path(recorded))
    try:
        return Dataset.open(dataset.data, recorded)
    except DataError as error:
        raise DataError(
            f"{error} {cached.path} records this labels file: give --labels for {dataset.data}, or another --out for "
            "other data"
        ) from error


@dataclass(frozen=True)
class FileRows:
    """Rows of a cache file or a part, and the pairs whose features they hold.

    ``pairs`` are numbers of the pairs in the dataset, ``rows`` their rows in the file, each (n,) int64.
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
    header, total
        Header of the existing cache, and its number of rows; None and 0 if there is no cache yet.
    """

    kept: FileRows
    orphans: list[tuple[str, int]] = field(default_factory=list)
    stale: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: list[int] = field(default_factory=list)
    reusable: Mapping[str, NDArray[np.bool_]] | None = None
    unchanged: int = 0
    gone: int = 0
    pruned: int = 0
    header: Header | None = None
    total: int = 0


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

    request: Request
    cached: CachedRows
    resumed: list[FileRows]
    parts: list[Path]
    blocks: list[NDArray[np.int64]]
    rejects: list[Reject]
    absent: int


def make_plan(request: Request, cached: FeatureCache | None) -> Plan:
    """Find what the existing cache and the parts of an interrupted run hold.

    Raise a CacheError if the cache is from another backbone or from other data, or cannot be upgraded because pairs of
    it are gone.
    """
    pairs = request.dataset.pairs
    nothing = np.empty(0, np.int64)
    cached_rows = CachedRows(FileRows(request.out, nothing, nothing))
    if cached is not None:
        cached_rows = _find_cached_rows(request, cached)
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
    blocks = [block[is_todo[block]] for block in np.split(missing, range(BLOCK_ROWS, len(missing), BLOCK_ROWS))]
    blocks = [block for block in blocks if len(block)]
    absent = sum(pairs[number].absent for number in rejects)
    return Plan(request, cached_rows, resumed, parts, blocks, list(rejects.values()), absent)


def _find_cached_rows(request: Request, cached: FeatureCache) -> CachedRows:
    """Compare every row of the existing cache with its pair."""
    dataset, prune = request.dataset, request.options.prune
    is_upgrade = is_earlier(cached.header.identity, request.header.identity)
    if not is_upgrade:
        cached.check(request.header.identity, request.header.backbone["name"])
    number_of: dict[str, int] = {}
    absent: dict[str, int] = {}  # pairs that only a label names
    for number, pair in enumerate(dataset.pairs):
        (absent if pair.absent else number_of)[pair.guid] = number
    comparison = _compare_all(cached, dataset.pairs, number_of, is_upgrade and cached.has_cleaned)
    _refuse_other_dataset(cached, dataset, int(comparison.same_bytes.sum()))
    is_complete = _has_right_columns(cached, request.encode)
    sound = np.ones(len(cached), dtype=bool)
    if is_complete:
        finite, zero = soundness(cached)
        sound = finite & ~zero  # `mmcli cache verify` refuses the others, so they are computed again
    usable = comparison.same & sound & is_complete
    keep_unreadable = ~comparison.readable & sound & (not prune)
    keep_stale = sound & (not prune and is_complete and not is_upgrade)
    pair_of_row = np.full(len(cached), -1, np.int64)
    orphans: list[tuple[str, int]] = []
    stale: dict[str, tuple[int, int]] = {}
    unreadable_pairs: list[int] = []
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
            unreadable_pairs.append(pair_number)
        elif keep_stale[row]:
            stale[guid] = pair_number, row
    if is_upgrade or not is_complete:
        _refuse_partial_upgrade(request, 0 if prune else gone + len(unreadable_pairs), is_upgrade)
    kept_rows = np.flatnonzero(pair_of_row >= 0)
    return CachedRows(
        FileRows(request.out, pair_of_row[kept_rows], kept_rows),
        orphans,
        stale,
        unreadable_pairs,
        _reusable_rows(request, comparison) if is_upgrade else None,
        unchanged=int(usable.sum()),
        gone=gone,
        pruned=gone if prune else 0,
        header=cached.header,
        total=len(cached),
    )


def _has_right_columns(cached: FeatureCache, options: EncodeOptions) -> bool:
    """Whether a file has exactly the columns that ``options`` ask for."""
    return cached.n_views == options.views and cached.has_tokens == options.tokens and cached.has_cleaned


def _compare_all(
    cached: FeatureCache, pairs: Sequence[Pair], number_of: Mapping[str, int], is_upgrade: bool = False
) -> Comparison:
    """Compare every row of a file with its pair. A row without a pair counts as unreadable."""
    rows = np.array([row for row, guid in enumerate(cached.guids) if guid in number_of], dtype=np.int64)
    pairs_of_rows = (pairs[number_of[cached.guids[row]]] for row in rows.tolist())
    compared = compare_rows(cached, rows, pairs_of_rows, is_upgrade)
    flags = np.zeros((4, len(cached)), dtype=bool)
    flags[:, rows] = [compared.readable, compared.same_bytes, compared.image, compared.text]
    return Comparison(*flags)


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


def _refuse_partial_upgrade(request: Request, lost: int, is_upgrade: bool) -> None:
    if lost:
        why = "texts are cleaned differently now" if is_upgrade else "views, tokens or digests of cleaned texts are new"
        raise CacheError(
            f"{request.out} must be upgraded ({why}), but {lost} of its pairs are no longer in {request.dataset.data} "
            "or cannot be read: bring them back, drop them with --prune, or give another --out"
        )


def _find_resumed_rows(request: Request, parts: list[Path], missing: NDArray[np.int64]) -> list[FileRows]:
    """Return the rows of parts whose pairs have not changed since. Of two rows of a pair, the later part counts."""
    pairs = request.dataset.pairs
    number_of = {pairs[number].guid: number for number in missing.tolist()} if parts else {}
    resumed = []
    for path in reversed(parts):
        with FeatureCache.open(path) as part:
            if _has_right_columns(part, request.encode):
                rows = np.flatnonzero(_compare_all(part, pairs, number_of).same)
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
