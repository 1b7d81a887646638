"""``featurize``: plan what is missing from the cache, encode it, write each block as a part, merge the parts."""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.atomic import remove_leftovers, write_text, writer_lock
from ..cache.errors import CacheError, DataError
from ..cache.labels import NO_COLUMNS, table_text
from ..cache.parts import RowSource, merge, parts_folder, remove_parts, write_part
from ..cache.schema import Header
from ..cache.store import FeatureCache
from .backbones.base import DEFAULT_BACKBONE
from .backbones.opening import choose_device, open_backbone
from .encode import OnProgress, encode_blocks
from .identity import FeaturizeOptions, complete_options
from .outputs import EmbeddingIndex
from .pairs.dataset import Dataset, LazySequence
from .pairs.hashing import Reject, unreadable
from .pairs.pair import Pair, natural_key
from .plan import FileRows, Plan, make_plan, make_request, with_recorded_labels
from .summary import FeaturizeSummary, count_labels, count_rows

_STAYS = "; its row stays in the cache until --prune"


def featurize(
    data: str | Path,
    labels: str | Path | None = None,
    out: str | Path = "artifacts/features.h5",
    options: FeaturizeOptions | None = None,
    on_progress: OnProgress | None = None,
    on_dataset: Callable[[Dataset], None] | None = None,
) -> FeaturizeSummary:
    """Encode every pair of ``data`` once and keep the embeddings in ``out``.

    Only missing rows are computed: pairs that are new, that changed, or that an interrupted run did not reach.

    Parameters
    ----------
    data
        A folder of ``<guid>.jpg`` + ``<guid>.txt``, or a manifest.
    labels
        CSV with header ``guid,tag``. The cache records its path, not its content.
    out
        The cache file.
    options
        Backbone, precision, views, tokens and so on.
    on_progress
        Called with (pairs done, pairs to do).
    on_dataset
        Called with the dataset before anything is encoded.

    Raises
    ------
    DataError
        No pairs at ``data``, a malformed labels file, or more rejects than allowed.
    CacheError
        ``out`` is from another backbone, schema or cleaning, from other data, or cannot be read.
    LockedError, DiskFullError, BackboneError
        Another process is writing ``out``, the disk is full, or the backbone cannot be used. Finished blocks are kept
        for the next run.
    """
    started = time.perf_counter()
    out = Path(os.path.realpath(out))
    if out.is_dir():
        raise CacheError(f"{out} is a folder: give --out a file, such as {out / 'features.h5'}")
    options = options or FeaturizeOptions()
    dataset = Dataset.open(data, labels, *_table_options(options, out))
    if on_dataset is not None:
        on_dataset(dataset)
    with writer_lock(out):
        remove_leftovers(out)
        with FeatureCache.open(out) if out.exists() else contextlib.nullcontext() as cached:
            if labels is None and cached is not None:
                dataset = with_recorded_labels(dataset, cached)
            options = complete_options(options, cached)
            backbone = open_backbone(options.backbone or DEFAULT_BACKBONE, options.revision)
            plan = make_plan(make_request(out, dataset, backbone, options), cached)
        computed, rejects = _encode_parts(plan, on_progress)
        contents = _choose_contents(plan, computed, rejects)
        _write_cache(plan, contents)
        return _summarize(plan, contents, started)


def _table_options(options: FeaturizeOptions, out: Path) -> tuple[Mapping[str, str], str | Path | None]:
    """Return columns and image root of a manifest as given, or as the existing cache records them."""
    recorded: dict[str, Any] = {}
    if out.exists():
        with FeatureCache.open(out) as cached:
            recorded = cached.header.dataset
    columns = recorded.get("columns", NO_COLUMNS) if options.columns is None else options.columns
    return columns, options.image_root or recorded.get("image_root")


def _encode_parts(plan: Plan, on_progress: OnProgress | None) -> tuple[list[FileRows], list[Reject]]:
    """Encode the blocks of the plan and write each as a part. Nothing is loaded if nothing must be computed.

    Return the rows of each part, and all rejected pairs.
    """
    request, options, pairs = plan.request, plan.request.options, plan.request.dataset.pairs
    parts: list[FileRows] = []
    rejects = [*plan.rejects]
    _refuse_too_many(plan, rejects)
    if not plan.blocks:
        return parts, rejects
    encoder = request.backbone.load(choose_device(options.device), request.header.identity["dtype"], options.resize)
    total = sum(map(len, plan.blocks))
    if on_progress is not None:
        on_progress(0, total)
    folder = parts_folder(request.out, request.header.fingerprint)
    first = 1 + max((int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.h5")), default=-1)
    blocks = ([pairs[number] for number in numbers.tolist()] for numbers in plan.blocks)
    with (
        contextlib.closing(_index_of_disk(plan)) as index,
        contextlib.closing(encode_blocks(blocks, encoder, request.encode, on_progress, index, total)) as encoded,
    ):
        for numbers, (block, rejects_of_block) in zip(plan.blocks, encoded, strict=True):
            rejects += rejects_of_block
            if block.guids:
                path = write_part(folder, first + len(parts), block, request.header)
                index.add(path)
                number_of = {pairs[number].guid: number for number in numbers.tolist()}
                numbers_of_rows = np.array([number_of[guid] for guid in block.guids], dtype=np.int64)
                parts.append(FileRows(path, numbers_of_rows, np.arange(len(block.guids))))
            _refuse_too_many(plan, rejects)
    return parts, rejects


def _index_of_disk(plan: Plan) -> EmbeddingIndex:
    """Return an index of all embeddings that are on disk."""
    out, options = plan.request.out, plan.request.encode
    index = EmbeddingIndex(options.clean)
    for path in [out, *plan.parts] if plan.cached.header else plan.parts:
        with FeatureCache.open(path) as cache:
            # Files without views are welcome: views belong to a pair, so they are computed anyway.
            is_usable = cache.has_cleaned and (cache.has_tokens or not options.tokens)
        if is_usable:
            index.add(path, plan.cached.reusable if path == out else None)
    return index


def _refuse_too_many(plan: Plan, rejects: Sequence[Reject]) -> None:
    """Raise a DataError if more pairs are rejected than allowed. Labels without a pair do not count."""
    out, dataset, rate = plan.request.out, plan.request.dataset, plan.request.options.max_reject_rate
    if len(rejects) - plan.absent <= rate * (len(dataset.pairs) - dataset.join.labels_without_pair):
        return
    _write_rejects(out, rejects)
    raise DataError(
        f"at least {len(rejects)} of {len(dataset.pairs)} pairs cannot be read, more than --max-reject-rate {rate:g} "
        f"allows: see {_rejects_path(out)}, fix these pairs or raise the rate, and run the same command again; "
        "finished blocks are kept"
    )


def _rejects_path(out: Path) -> Path:
    return out.with_name(out.name + ".rejects.csv")


def _write_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    """Write the list of rejects beside the cache; remove the old list if there are none."""
    path = _rejects_path(out)
    if not rejects:
        path.unlink(missing_ok=True)
        return
    rows = ([reject.guid, reject.reason, reject.path] for reject in rejects)
    write_text(path, table_text(["guid", "reason", "path"], rows))


@dataclass(frozen=True)
class _Contents:
    """Rows of the new cache, and the pairs that cannot be read."""

    rows: Sequence[RowSource]  # in natural order of guid
    files: set[Path]  # that rows come from
    computed: int  # number of rows that this run computed
    left_out: list[Reject]
    kept: list[Reject]  # pairs whose row in the existing cache is kept although they cannot be read now


def _choose_contents(plan: Plan, computed: list[FileRows], rejects: list[Reject]) -> _Contents:
    """Put together finished and computed rows. Rows of pairs that turned out unreadable are kept."""
    pairs, out, stale = plan.request.dataset.pairs, plan.request.out, plan.cached.stale
    kept = [reject for reject in rejects if reject.guid in stale]
    numbers, rows = np.array([stale[reject.guid] for reject in kept], dtype=np.int64).reshape(-1, 2).T
    rows_of_files = [plan.cached.kept, FileRows(out, numbers, rows), *plan.resumed, *computed]
    kept += [reject for number in plan.cached.unreadable if (reject := unreadable(pairs[number])) is not None]
    orphans = [(guid, out, row) for guid, row in plan.cached.orphans]
    row_sources = _in_order(pairs, rows_of_files)
    return _Contents(
        sorted([*row_sources, *orphans], key=lambda source: natural_key(source[0])) if orphans else row_sources,
        {finished.path for finished in rows_of_files if len(finished)} | {path for _, path, _ in orphans[:1]},
        sum(map(len, computed)),
        [reject for reject in rejects if reject.guid not in stale],
        [replace(reject, reason=reject.reason + _STAYS) for reject in kept],
    )


def _in_order(pairs: Sequence[Pair], rows_of_files: Sequence[FileRows]) -> Sequence[RowSource]:
    """Return the source of each pair's row, in the order of the dataset, lazily to save memory."""
    numbers = np.concatenate([finished.pairs for finished in rows_of_files])
    rows = np.concatenate([finished.rows for finished in rows_of_files])
    files = np.repeat(np.arange(len(rows_of_files), dtype=np.int32), [len(finished) for finished in rows_of_files])
    order = np.argsort(numbers, kind="stable")

    def source_of(position: int) -> RowSource:
        place = order[position]
        return pairs[int(numbers[place])].guid, rows_of_files[files[place]].path, int(rows[place])

    return LazySequence(len(order), source_of)


def _write_cache(plan: Plan, contents: _Contents) -> None:
    """Merge the rows into the new cache and remove the parts. A cache that would not change is left as it is."""
    out, cached = plan.request.out, plan.cached
    _write_rejects(out, sorted([*contents.left_out, *contents.kept], key=lambda reject: natural_key(reject.guid)))
    if not len(contents.rows):
        raise DataError(f"no pair of {plan.request.dataset.data} could be read: see {_rejects_path(out)}")
    header = _with_all_versions(plan.request.header, cached.header, contents.computed)
    if contents.files != {out} or len(contents.rows) != cached.total or header != cached.header:
        merge(out, contents.rows, header)
    remove_parts(out, header.fingerprint)


def _with_all_versions(header: Header, cached: Header | None, computed: int) -> Header:
    """Return ``header`` with the library versions of all rows: those of the cache, and today's if rows are new."""
    if cached is None:
        return header
    if not computed:
        return replace(header, versions=cached.versions)
    versions = {}
    for name, version_now in header.versions.items():
        earlier = cached.versions.get(name, version_now).split(", ")
        versions[name] = ", ".join(earlier if version_now in earlier else [*earlier, version_now])
    return replace(header, versions=versions)


def _summarize(plan: Plan, contents: _Contents, started: float) -> FeaturizeSummary:
    """Return what a run did since ``started`` (``time.perf_counter``), and count what the finished cache holds."""
    out, dataset, encode, header = plan.request.out, plan.request.dataset, plan.request.encode, plan.request.header
    labels, kept = dataset.labels_path, contents.kept
    with FeatureCache.open(out) as cache:
        content = count_rows(cache)
        label_counts = count_labels(dataset, cache.guids, len(cache))
    seconds = time.perf_counter() - started
    return FeaturizeSummary(
        out=str(out),
        rows=len(contents.rows),
        computed=contents.computed,
        resumed=sum(map(len, plan.resumed)),
        unchanged=plan.cached.unchanged,
        gone=plan.cached.gone,
        pruned=plan.cached.pruned,
        unreadable=len(kept),
        unreadable_example=f"{kept[0].guid!r}: {kept[0].reason}" if kept else "",
        rejects=len(contents.left_out),
        rejects_file=str(_rejects_path(out)) if contents.left_out or kept else None,
        content=content,
        labels=label_counts,
        labels_missing=None if labels is None or labels.is_file() else str(labels),
        unused_columns=dataset.unused_columns,
        backbone=header.backbone["name"],
        dtype=header.identity["dtype"],
        views=encode.views,
        tokens=encode.tokens,
        seconds=seconds,
        pairs_per_second=contents.computed / seconds,
        bytes=out.stat().st_size,
        fingerprint=header.fingerprint,
    )
