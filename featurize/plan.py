"""Which pairs are encoded again.

A row of the existing cache, or of a part that an interrupted run finished, is used if its pair still has the same bytes
(``pairs/hashing.py`` compares them) and nothing else that changes an embedding is different (``identity.py``).
All other pairs are encoded, except images and texts that ``outputs.EmbeddingIndex`` finds on disk for another pair.
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
from .backbones.base import Backbone
from .backbones.opening import choose_device, choose_dtype
from .identity import EncodeOptions, FeaturizeOptions, identity_of, is_cleaned, is_earlier
from .pairs.dataset import Dataset
from .pairs.hashing import Reject, RowComparison, compare_rows, unreadable
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
    encode = replace(
        EncodeOptions.for_identity(identity, tokens=options.tokens), views=options.views, batch_size=options.batch_size
    )
    header = Header(
        identity=identity,
        backbone={"name": backbone.name, "revision": backbone.revision},
        dataset=dataset.to_header(),
        versions={"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    )
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
        return Dataset.open(dataset.data, recorded, dataset.columns, dataset.image_root)
    except DataError as error:
        raise DataError(
            f"{error}; {cached.path} records this labels file: give --labels for {dataset.data}, or another --out for "
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
    """What the existing cache gives to the new one. Without a cache, ``header`` is None.

    ``reusable`` says by tower which rows' embeddings may be used for equal images and texts of other pairs, (N,) bool;
    None: all.
    """

    kept: FileRows  # rows that go into the new cache as they are
    orphans: list[tuple[str, int]] = field(default_factory=list)  # (guid, row) of further such rows, without a pair
    # (number of the pair, row) by guid, of pairs that changed: the row is used if the pair turns out unreadable.
    stale: dict[str, tuple[int, int]] = field(default_factory=dict)
    unreadable: list[int] = field(default_factory=list)  # numbers of the pairs in ``kept`` that cannot be read now
    reusable: Mapping[str, NDArray[np.bool_]] | None = None
    unchanged: int = 0
    gone: int = 0  # rows without a pair
    pruned: int = 0  # how many of these are dropped
    header: Header | None = None
    total: int = 0  # number of rows


@dataclass(frozen=True)
class Plan:
    """What is finished, and what must be computed. Pairs are identified by their number in the dataset."""

    request: Request
    cached: CachedRows
    resumed: list[FileRows]  # rows of an interrupted run, by part
    parts: list[Path]  # all readable parts of that run, whether or not their rows are used
    blocks: list[NDArray[np.int64]]  # pairs to compute
    rejects: list[Reject]  # as far as they are known before encoding
    absent: int  # how many of the rejects are named by a label only


def make_plan(request: Request, cached: FeatureCache | None) -> Plan:
    """Find what the existing cache and the parts of an interrupted run hold.

    Raise a CacheError if the cache is from another backbone or from other data, or cannot be upgraded because pairs of
    it are gone.
    """
    pairs, nothing = request.dataset.pairs, np.empty(0, np.int64)
    no_rows = CachedRows(FileRows(request.out, nothing, nothing))
    cached_rows = no_rows if cached is None else _find_cached_rows(request, cached)
    to_encode = np.setdiff1d(np.arange(len(pairs)), cached_rows.kept.pairs)
    parts = read_parts(parts_folder(request.out, request.header.fingerprint), request.header)
    resumed = _find_resumed_rows(request, parts, to_encode)
    is_todo = np.zeros(len(pairs), dtype=bool)
    is_todo[to_encode] = True
    for finished in resumed:
        is_todo[finished.pairs] = False
    rejects = _find_rejects(pairs, np.flatnonzero(is_todo).tolist())
    is_todo[list(rejects)] = False
    # Cut blocks before taking out finished pairs: a block that is computed again after a crash then holds the same
    # pairs as in an uninterrupted run, so it gives the same bits.
    blocks = [block[is_todo[block]] for block in np.split(to_encode, range(BLOCK_ROWS, len(to_encode), BLOCK_ROWS))]
    blocks = [block for block in blocks if len(block)]
    absent = sum(pairs[number].absent for number in rejects)
    return Plan(request, cached_rows, resumed, parts, blocks, list(rejects.values()), absent)


def _find_cached_rows(request: Request, cached: FeatureCache) -> CachedRows:
    """Compare every row of the existing cache with its pair."""
    dataset, prune, identity = request.dataset, request.options.prune, request.header.identity
    is_upgrade = is_earlier(cached.header.identity, identity)
    if not is_upgrade:
        cached.check(identity, request.header.backbone["name"])
    number_of: dict[str, int] = {}
    absent = np.zeros(len(dataset.pairs), dtype=bool)
    for number, pair in enumerate(dataset.pairs):
        number_of[pair.guid], absent[number] = number, pair.absent
    numbers, comparison = _compare_all(cached, dataset.pairs, number_of, is_upgrade and cached.has_cleaned)
    same = int(comparison.same_bytes.sum())
    if cached.header.dataset["data"] != str(dataset.data) and 2 * same < len(cached):
        raise CacheError(
            f"{cached.path} holds the pairs of {cached.header.dataset['data']}, but only {same} of {len(cached)} "
            f"are in {dataset.data}: give another --out for other data"
        )
    is_complete = _has_right_columns(cached, request.encode)
    sound = np.ones(len(cached), dtype=bool)
    if is_complete:
        not_finite, zero = cached.unsound()
        sound = ~(not_finite | zero)  # `mmcli cache verify` refuses the others, so they are computed again
    has_pair = numbers >= 0
    is_absent = has_pair & absent[numbers]
    is_gone = is_absent | ~has_pair
    is_unchanged = comparison.valid & sound & is_complete
    is_unreadable = ~comparison.readable & sound & ~is_gone & (not prune)
    is_stale = sound & ~(is_unchanged | is_unreadable | is_gone) & (not prune and is_complete and not is_upgrade)
    gone, unreadable_pairs = int(is_gone.sum()), numbers[is_unreadable].tolist()
    lost = 0 if prune else gone + len(unreadable_pairs)
    if lost and (is_upgrade or not is_complete):
        why = "texts are cleaned differently now" if is_upgrade else "views, tokens or digests of cleaned texts are new"
        raise CacheError(
            f"{request.out} must be upgraded ({why}), but {lost} of its pairs are no longer in {dataset.data} "
            "or cannot be read: bring them back, drop them with --prune, or give another --out"
        )
    is_kept = is_unchanged | is_unreadable | (is_absent & (not prune))
    reusable = None
    if is_upgrade:
        # Cleaned texts are looked up by the digest of the new cleaning, which old rows match only if nothing changed.
        text = np.ones_like(comparison.text) if is_cleaned(identity) else comparison.text
        reusable = {"image": comparison.image, "text": text}
    return CachedRows(
        FileRows(request.out, numbers[is_kept], np.flatnonzero(is_kept)),
        orphans=[(cached.guids[row], row) for row in np.flatnonzero(~has_pair & (not prune)).tolist()],
        stale={cached.guids[row]: (int(numbers[row]), row) for row in np.flatnonzero(is_stale).tolist()},
        unreadable=unreadable_pairs,
        reusable=reusable,
        unchanged=int(is_unchanged.sum()),
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
) -> tuple[NDArray[np.int64], RowComparison]:
    """Return the number of each row's pair, (N,), and how they compare. A row without a pair, -1, is unreadable."""
    numbers = np.array([number_of.get(guid, -1) for guid in cached.guids], dtype=np.int64)
    rows = np.flatnonzero(numbers >= 0)
    compared = compare_rows(cached, rows, (pairs[number] for number in numbers[rows].tolist()), is_upgrade)
    flags = np.zeros((4, len(cached)), dtype=bool)
    flags[:, rows] = [compared.readable, compared.same_bytes, compared.image, compared.text]
    return numbers, RowComparison(*flags)


def _find_resumed_rows(request: Request, parts: list[Path], to_encode: NDArray[np.int64]) -> list[FileRows]:
    """Return the rows of parts whose pairs have not changed since. Of two rows of a pair, the later part counts."""
    pairs = request.dataset.pairs
    number_of = {pairs[number].guid: number for number in to_encode.tolist()} if parts else {}
    resumed = []
    for path in reversed(parts):
        with FeatureCache.open(path) as part:
            if _has_right_columns(part, request.encode):
                numbers, comparison = _compare_all(part, pairs, number_of)
                rows = np.flatnonzero(comparison.valid)
                resumed.append(FileRows(path, numbers[rows], rows))
                for row in rows.tolist():
                    del number_of[part.guids[row]]
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
