"""``featurize``: plan what is missing from the cache, encode it, write each block as a part, merge the parts."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..cache.atomic import remove_leftovers
from ..cache.errors import DataError
from ..cache.lock import writer_lock
from ..cache.parts import merge, parts_folder, remove_parts, write_part
from ..cache.store import FeatureCache
from .backbones.base import DEFAULT_BACKBONE
from .backbones.opening import choose_device, open_backbone
from .cached_rows import FileRows
from .contents import CacheContents, ComputedRows, choose_contents
from .encode import EncodedBlocks, OnProgress, encode_blocks
from .index import EmbeddingIndex
from .pairs.dataset import Dataset
from .plan import Plan, make_plan
from .rejects import refuse_too_many, rejects_path, write_rejects
from .request import (
    FeaturizeOptions,
    Request,
    complete_options,
    make_request,
    output_path,
    with_all_versions,
    with_recorded_labels,
)
from .summary import FeaturizeSummary, summarize


def featurize(
    data: str | Path,
    labels: str | Path | None = None,
    out: str | Path = "artifacts/features.h5",
    options: FeaturizeOptions | None = None,
    on_progress: OnProgress | None = None,
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
    out = output_path(out)
    dataset = Dataset.open(data, labels)
    with writer_lock(out):
        remove_leftovers(out)
        with FeatureCache.open(out) if out.exists() else contextlib.nullcontext() as cached:
            if labels is None:
                dataset = with_recorded_labels(dataset, cached)
            options = complete_options(options or FeaturizeOptions(), cached)
            backbone = open_backbone(options.backbone or DEFAULT_BACKBONE, options.revision)
            request = make_request(out, dataset, backbone, options, cached)
            plan = make_plan(request, cached)
        with open_index(request, plan) as index:
            blocks = encode_plan(request, plan, index, on_progress)
            computed = write_parts(request, plan, blocks, index)
        contents = choose_contents(request, plan, computed)
        write_cache(request, contents, len(computed))
        return summarize(request, plan, computed, contents, time.perf_counter() - started)


@contextlib.contextmanager
def open_index(request: Request, plan: Plan) -> Iterator[EmbeddingIndex]:
    """Give an index of all embeddings that are on disk; it is empty if nothing must be computed."""
    with EmbeddingIndex(request.encode.clean) as index:
        for path in [request.out, *plan.parts] if len(plan.todo) else ():
            if path.exists():
                with FeatureCache.open(path) as cache:
                    # Files without views are welcome: views belong to a pair, so they are computed anyway.
                    is_usable = cache.has_cleaned and (cache.has_tokens or not request.encode.tokens)
                if is_usable:
                    index.add(path, plan.cached.reusable if path == request.out else None)
        yield index


def encode_plan(request: Request, plan: Plan, index: EmbeddingIndex, on_progress: OnProgress | None) -> EncodedBlocks:
    """Load the backbone and encode the blocks of the plan, in order. Nothing is loaded if nothing must be computed."""
    if not len(plan.todo):
        return
    options, pairs, total = request.options, request.dataset.pairs, len(plan.todo)
    encoder = request.backbone.load(choose_device(options.device), request.header.identity["dtype"], options.resize)
    if on_progress is not None:
        on_progress(0, total)
    blocks = ([pairs[number] for number in numbers.tolist()] for numbers in plan.blocks())
    yield from encode_blocks(blocks, encoder, request.encode, on_progress, index, total)


def write_parts(request: Request, plan: Plan, blocks: EncodedBlocks, index: EmbeddingIndex) -> ComputedRows:
    """Write each block as a part and add it to the index.

    Raises
    ------
    DataError
        More pairs are rejected than allowed; checked before the first block, and after each.
    """
    pairs = request.dataset.pairs
    folder = parts_folder(request.out, request.header.fingerprint)
    first = 1 + max((int(path.stem.removeprefix("part-")) for path in folder.glob("part-*.h5")), default=-1)
    parts: list[FileRows] = []
    rejects = [*plan.rejects]
    refuse_too_many(request, plan, rejects)
    with contextlib.closing(blocks):
        for numbers, (block, rejects_of_block) in zip(plan.blocks(), blocks, strict=True):
            rejects += rejects_of_block
            if block.guids:
                path = write_part(folder, first + len(parts), block, request.header)
                index.add(path)
                number_of = {pairs[number].guid: number for number in numbers.tolist()}
                numbers_of_rows = np.array([number_of[guid] for guid in block.guids], dtype=np.int64)
                parts.append(FileRows(path, numbers_of_rows, np.arange(len(block.guids))))
            refuse_too_many(request, plan, rejects)
    return ComputedRows(parts, rejects)


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
