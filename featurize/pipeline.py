"""``featurize``: find what is missing in the cache, encode it block by block, merge."""

import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.atomic import remove_leftovers, write_text
from ..cache.errors import CacheError, DataError
from ..cache.labels import table_text
from ..cache.lock import writer_lock
from ..cache.parts import merge, parts_folder, read_parts, remove_parts, write_part
from ..cache.schema import Header
from ..cache.store import FeatureCache
from .backbone import DEFAULT_BACKBONE, Backbone
from .dataset import Dataset, Pair
from .encode import VIEW_SEED, How, encode_blocks
from .known import Known
from .loading import choose_device, choose_dtype, open_backbone
from .plan import Plan, make_plan
from .reading import Reject, unreadable

_LIBRARIES = ("torch", "transformers", "numpy", "h5py", "pillow")

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class FeaturizeOptions:
    """What ``featurize`` is asked for; see the command's help."""

    backbone: str | None = None  # that of the cache, else DEFAULT_BACKBONE
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    views: int = 0
    tokens: bool = False
    clean: bool = True
    resize: int | None = None
    batch_size: int | None = None
    max_reject_rate: float = 0.05
    prune: bool = False


@dataclass
class FeaturizeSummary:
    """What ``featurize`` did. ``gone`` are cached pairs whose files are no longer there."""

    out: str
    rows: int
    computed: int
    resumed: int
    unchanged: int
    gone: int
    pruned: int
    labelled: int
    unlabelled: int
    rejects: int
    rejects_file: str | None
    backbone: str
    dtype: str
    views: int
    tokens: bool
    seconds: float
    pairs_per_second: float
    bytes: int
    fingerprint: str


def identity_of(backbone: Backbone, dtype: str, clean: bool, resize: int | None) -> dict[str, Any]:
    """Return all that changes an embedding. The numbers are versions of this package's own steps."""
    return {
        "backbone": backbone.identity(),
        "dtype": dtype,
        "image": {"decoding": 1, "resize": resize},
        "text": {"decoding": 1, "cleaning": 1 if clean else 0},
        "augmentation": {"version": 1, "seed": VIEW_SEED},
    }


def featurize(
    data: str | Path,
    labels: str | Path | None = None,
    out: str | Path = "artifacts/features.h5",
    options: FeaturizeOptions | None = None,
    on_progress: OnProgress | None = None,
) -> FeaturizeSummary:
    """Encode every pair of ``data`` once and keep the embeddings in ``out``.

    Only what is missing is computed: pairs that are new, that changed, or that an interrupted run did not reach.

    Parameters
    ----------
    data
        A folder of ``<guid>.jpg`` + ``<guid>.txt``, or a manifest.
    labels
        CSV with header ``guid,tag``; its place is recorded in the cache, its content is not.
    out
        The cache file.
    options
        Backbone, precision, views, tokens and so on.
    on_progress
        Called with (pairs done, pairs to do) as pairs come through.

    Raises
    ------
    DataError
        Nothing to read at ``data``, a malformed labels file, or more pairs rejected than allowed.
    CacheError
        ``out`` was made by another backbone, schema or cleaning, from other data, or is not readable.
    LockedError, DiskFullError, BackboneError
        As they say. Finished blocks are kept and used by the next run.
    """
    started = time.perf_counter()
    options = options or FeaturizeOptions()
    out = Path(os.path.realpath(out))
    if out.is_dir():
        raise CacheError(f"{out} is a folder: give --out a file, such as {out / 'features.h5'}")
    dataset = Dataset.open(data, labels)
    with writer_lock(out):
        remove_leftovers(out)
        with FeatureCache.open(out) if out.exists() else contextlib.nullcontext() as cached:
            if dataset.labels_path is None and cached is not None:
                try:
                    dataset = Dataset.open(data, _recorded_labels(cached))
                except DataError as error:
                    raise DataError(
                        f"{error} It is the one recorded in {out}: give --labels with those of {data}, or another "
                        "--out for other data"
                    ) from error
            backbone = _backbone(options, cached)
            header = _header(dataset, backbone, options, cached)
            how = _how(options, header, cached)
            plan = make_plan(out, dataset, header, how, cached, options.prune)
            as_it_was = cached is not None and cached.header.dataset == header.dataset and len(cached)
        with _known(out, plan, header, how) as known:
            computed, rejects = _compute(out, plan, backbone, header, how, known, dataset, options, on_progress)
        rows = plan.rows()
        if not len(rows):
            raise DataError(f"no pair of {dataset.data} could be read; see {_rejects_path(out)}")
        if len(rows) != as_it_was or plan.files != [out]:
            merge(out, rows, header)
        remove_parts(out, header.fingerprint)
    seconds = time.perf_counter() - started
    labelled = sum(1 for guid, _, _ in rows if dataset.labels.get(guid) is not None) if dataset.labels else 0
    return FeaturizeSummary(
        out=str(out),
        rows=len(rows),
        computed=computed,
        resumed=plan.resumed,
        unchanged=plan.unchanged,
        gone=plan.gone,
        pruned=plan.pruned,
        labelled=labelled,
        unlabelled=len(rows) - labelled,
        rejects=len(rejects),
        rejects_file=str(_rejects_path(out)) if rejects else None,
        backbone=header.backbone["name"],
        dtype=header.identity["dtype"],
        views=how.views,
        tokens=how.tokens,
        seconds=seconds,
        pairs_per_second=computed / seconds,
        bytes=out.stat().st_size,
        fingerprint=header.fingerprint,
    )


def _recorded_labels(cached: FeatureCache) -> Path | None:
    """Return the labels file that a cache names, if it is still there."""
    labels = cached.header.dataset["labels"]
    return Path(labels) if labels is not None and Path(labels).is_file() else None


def _backbone(options: FeaturizeOptions, cached: FeatureCache | None) -> Backbone:
    if options.backbone is None and cached is not None:
        recorded = cached.header.backbone
        return open_backbone(recorded["name"], options.revision or recorded["revision"])
    return open_backbone(options.backbone or DEFAULT_BACKBONE, options.revision)


def _header(dataset: Dataset, backbone: Backbone, options: FeaturizeOptions, cached: FeatureCache | None) -> Header:
    dtype = options.dtype
    if dtype == "auto" and cached is not None:
        dtype = str(cached.header.identity["dtype"])  # adding pairs elsewhere must not need a flag
    dtype = choose_dtype(dtype, choose_device(options.device)) if dtype == "auto" else dtype
    labels = dataset.labels_path
    return Header(
        identity=identity_of(backbone, dtype, options.clean, options.resize),
        backbone={"name": backbone.name, "revision": backbone.revision},
        dataset={"data": str(dataset.data), "labels": None if labels is None else str(labels)},
        versions={"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    )


def _how(options: FeaturizeOptions, header: Header, cached: FeatureCache | None) -> How:
    """Take views and tokens as asked for, but never less than the cache has."""
    return How(
        clean=options.clean,
        views=max(options.views, cached.n_views if cached else 0),
        tokens=options.tokens or (cached is not None and cached.has_tokens),
        store=np.float16 if header.identity["dtype"] == "bfloat16" else np.float32,
        batch_size=options.batch_size,
    )


def _compute(
    out: Path,
    plan: Plan,
    backbone: Backbone,
    header: Header,
    how: How,
    known: Known,
    dataset: Dataset,
    options: FeaturizeOptions,
    on_progress: OnProgress | None,
) -> tuple[int, list[Reject]]:
    # A label without a pair is listed, but says nothing about how readable the pairs are.
    absent = {pair.guid for pair in dataset.pairs if pair.absent}
    allowed = options.max_reject_rate * (len(dataset.pairs) - len(absent))

    def too_many(rejected: Sequence[Reject]) -> bool:
        return sum(reject.guid not in absent for reject in rejected) > allowed

    folder = parts_folder(out, header.fingerprint)
    number = 1 + max((int(path.stem[5:]) for path in folder.glob("part-*.h5")), default=-1)
    computed = 0
    hopeless = [each for each in map(unreadable, filter(Pair.cannot_be_whole, plan.todo())) if each is not None]
    if too_many(hopeless):  # said before hours of encoding, not after
        _write_rejects(out, hopeless)
        raise DataError(_too_many(out, dataset, hopeless, options))
    # Where only unreadable pairs are missing, no backbone is needed to say so.
    todo = plan.count_todo()
    rejects = list(_leading_rejects(plan.todo()))
    if len(rejects) < todo:
        rejects = []
        device = choose_device(options.device)
        encoder = backbone.load(device, header.identity["dtype"], options.resize)
        if on_progress is not None:
            on_progress(0, todo)
        for block, rejected in encode_blocks(plan.blocks(), encoder, how, on_progress, known, todo):
            rejects += rejected
            if block.guids:
                path = write_part(folder, number, block, header)
                known.add(path)
                plan.found(path, block.guids)
                number += 1
            computed += len(block.guids)
            if too_many(rejects):
                break
    _write_rejects(out, rejects)
    if too_many(rejects):
        raise DataError(_too_many(out, dataset, rejects, options))
    return computed, rejects


def _known(out: Path, plan: Plan, header: Header, how: How) -> Known:
    """Return the embeddings that are in the cache and in parts already, whatever pairs they are of."""
    known = Known(how.clean)
    if plan.count_todo():
        for path in [out, *read_parts(parts_folder(out, header.fingerprint), header)]:
            if path.exists():
                with FeatureCache.open(path) as cache:
                    # Views are of a pair, not of an image: where only they are missing, only they are computed.
                    usable = cache.has_cleaned and (cache.has_tokens or not how.tokens)
                if usable:
                    known.add(path)
    return known


def _too_many(out: Path, dataset: Dataset, rejects: Sequence[Reject], options: FeaturizeOptions) -> str:
    return (
        f"at least {len(rejects)} of {len(dataset.pairs)} pairs cannot be read, more than --max-reject-rate "
        f"{options.max_reject_rate:g} allows: see {_rejects_path(out)}, mend them or raise the rate, and run the "
        "same command again; what was finished is kept"
    )


def _leading_rejects(todo: Iterable[Pair]) -> Iterator[Reject]:
    """Yield the rejects that ``todo`` begins with, up to the first pair that can be read."""
    for pair in todo:
        bad = unreadable(pair)
        if bad is None:
            return
        yield bad


def _rejects_path(out: Path) -> Path:
    return out.with_name(out.name + ".rejects.csv")


def _write_rejects(out: Path, rejects: Sequence[Reject]) -> None:
    path = _rejects_path(out)
    if not rejects:
        path.unlink(missing_ok=True)
        return
    rows = ([reject.guid, reject.reason, reject.path] for reject in rejects)
    write_text(path, table_text(["guid", "reason", "path"], rows))
