"""``featurize``: find what is missing in the cache, encode it block by block, merge."""

import codecs
import contextlib
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.atomic import remove_leftovers, write_text
from ..cache.errors import CacheError, DataError
from ..cache.labels import table_text
from ..cache.lock import writer_lock
from ..cache.parts import merge, parts_folder, remove_parts, write_part
from ..cache.schema import Header
from ..cache.store import FeatureCache
from .backbones.base import DEFAULT_BACKBONE, Backbone
from .backbones.opening import choose_device, choose_dtype, open_backbone
from .encode import How, encode_blocks
from .identity import identity_of, is_cleaned
from .index import Known
from .pairs.dataset import Dataset
from .pairs.hashing import Reject, unreadable
from .pairs.pair import Pair
from .plan import Plan, make_plan
from .summary import LabelCounts, RowCounts, count_labels, count_rows

_LIBRARIES = ("torch", "transformers", "numpy", "h5py", "pillow")

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class FeaturizeOptions:
    """What ``featurize`` is asked for, see the command's help. None: as in the cache, if there is one."""

    backbone: str | None = None  # else DEFAULT_BACKBONE
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    views: int = 0
    tokens: bool = False
    clean: bool | None = None  # else True
    encoding: str | None = None  # else found out for each text
    resize: int | None = None  # else the model's own
    batch_size: int | None = None
    max_reject_rate: float = 0.05
    prune: bool = False


@dataclass(frozen=True)
class FeaturizeSummary:
    """What ``featurize`` did, and what the cache holds now.

    Attributes
    ----------
    gone
        Cached pairs whose files are no longer there.
    unreadable
        Cached pairs that are kept though their files cannot be read now; ``unreadable_example`` names one and says why.
    rejects
        Pairs that are left out; ``rejects_file`` lists them, and those that are kept though unreadable.
    content, labels
        Counts over the rows.
    labels_missing
        The labels file that the cache records, where it is no longer there.
    unused_columns
        Columns of the manifest that were not looked at.
    """

    out: str
    rows: int
    computed: int
    resumed: int
    unchanged: int
    gone: int
    pruned: int
    unreadable: int
    unreadable_example: str
    rejects: int
    rejects_file: str | None
    content: RowCounts
    labels: LabelCounts
    labels_missing: str | None
    unused_columns: list[str]
    backbone: str
    dtype: str
    views: int
    tokens: bool
    seconds: float
    pairs_per_second: float
    bytes: int
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data, with the numbers of labelled and unlabelled rows on top."""
        return asdict(self) | {"labelled": self.labels.labelled, "unlabelled": self.labels.unlabelled}


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
            recorded = _recorded_labels(cached, dataset) if labels is None else None
            if recorded is not None and Path(recorded).is_file():
                try:
                    dataset = Dataset.open(data, recorded)
                except DataError as error:
                    raise DataError(
                        f"{error} It is the one recorded in {out}: give --labels with those of {data}, or another "
                        "--out for other data"
                    ) from error
            elif recorded is not None:  # kept, for the file may be back tomorrow
                dataset = replace(dataset, labels_path=Path(recorded))
            options = _settled(options, cached)
            backbone = _backbone(options, cached)
            header = _header(dataset, backbone, options)
            how = _how(options, header, cached)
            plan = make_plan(out, dataset, header, how, cached, options.prune)
            with _known(out, plan, how) as known:
                computed, rejects = _compute(out, plan, backbone, header, how, known, dataset, options, on_progress)
            rows = plan.rows()
            is_as_before = False
            if cached is not None:
                header = replace(header, versions=_versions(cached.header, header, computed))
                is_as_before = cached.header == header and len(cached) == len(rows) and plan.files == [out]
        if not len(rows):
            raise DataError(f"no pair of {dataset.data} could be read; see {_rejects_path(out)}")
        if not is_as_before:
            merge(out, rows, header)
        remove_parts(out, header.fingerprint)
        with FeatureCache.open(out) as made:
            content = count_rows(made)
            labels_counted = count_labels(dataset, made.guids, len(made))
    seconds = time.perf_counter() - started
    kept_guids = set(plan.unreadable)
    kept = [each for each in rejects if each.guid in kept_guids]
    return FeaturizeSummary(
        out=str(out),
        rows=len(rows),
        computed=computed,
        resumed=plan.resumed,
        unchanged=plan.unchanged,
        gone=plan.gone,
        pruned=plan.pruned,
        unreadable=len(kept),
        unreadable_example=f"{kept[0].guid!r}: {kept[0].reason}" if kept else "",
        rejects=len(rejects) - len(kept),
        rejects_file=str(_rejects_path(out)) if rejects else None,
        content=content,
        labels=labels_counted,
        labels_missing=None if recorded is None or Path(recorded).is_file() else recorded,
        unused_columns=dataset.unused_columns,
        backbone=header.backbone["name"],
        dtype=header.identity["dtype"],
        views=how.views,
        tokens=how.tokens,
        seconds=seconds,
        pairs_per_second=computed / seconds,
        bytes=out.stat().st_size,
        fingerprint=header.fingerprint,
    )


def _recorded_labels(cached: FeatureCache | None, dataset: Dataset) -> str | None:
    """Return the labels file that the cache records; None where its labels are those of a manifest, then and now."""
    if cached is None:
        return None
    place: str | None = cached.header.dataset["labels"]
    return None if place == cached.header.dataset["data"] and dataset.labels_path is not None else place


def _settled(options: FeaturizeOptions, cached: FeatureCache | None) -> FeaturizeOptions:
    """Return the options with what was not said taken from the cache: adding pairs must not need a flag."""
    if options.encoding is not None:
        try:
            options = replace(options, encoding=codecs.lookup(options.encoding).name)
        except LookupError as error:
            raise DataError(f"unknown encoding {options.encoding!r}: give one that Python knows, as cp1251") from error
    if cached is None:
        return replace(options, clean=options.clean is not False)
    identity = cached.header.identity
    return replace(
        options,
        dtype=identity["dtype"] if options.dtype == "auto" else options.dtype,
        clean=is_cleaned(identity) if options.clean is None else options.clean,
        encoding=options.encoding or identity["text"].get("encoding"),
        resize=options.resize or identity["image"]["resize"],
    )


def _versions(before: Header, now: Header, computed: int) -> dict[str, str]:
    """Return the library versions that rows were made with: those of before, and those of now where any row is new."""
    if not computed:
        return before.versions
    versions = {}
    for name, version_now in now.versions.items():
        earlier = before.versions.get(name, version_now).split(", ")
        versions[name] = ", ".join(earlier if version_now in earlier else [*earlier, version_now])
    return versions


def _backbone(options: FeaturizeOptions, cached: FeatureCache | None) -> Backbone:
    if options.backbone is None and cached is not None:
        recorded = cached.header.backbone
        return open_backbone(recorded["name"], options.revision or recorded["revision"])
    return open_backbone(options.backbone or DEFAULT_BACKBONE, options.revision)


def _header(dataset: Dataset, backbone: Backbone, options: FeaturizeOptions) -> Header:
    dtype = choose_dtype(options.dtype, choose_device(options.device)) if options.dtype == "auto" else options.dtype
    labels = dataset.labels_path
    return Header(
        identity=identity_of(backbone, dtype, bool(options.clean), options.resize, options.encoding),
        backbone={"name": backbone.name, "revision": backbone.revision},
        dataset={"data": str(dataset.data), "labels": None if labels is None else str(labels)},
        versions={"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
    )


def _how(options: FeaturizeOptions, header: Header, cached: FeatureCache | None) -> How:
    """Take views and tokens as asked for, but never less than the cache has."""
    return How(
        clean=bool(options.clean),
        encoding=options.encoding,
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
    if too_many(rejects):
        _write_rejects(out, rejects)
        raise DataError(_too_many(out, dataset, rejects, options))
    rejects += _kept_though_unreadable(plan, dataset, rejects)
    _write_rejects(out, rejects)
    return computed, rejects


def _kept_though_unreadable(plan: Plan, dataset: Dataset, rejects: list[Reject]) -> list[Reject]:
    """Keep the rows of pairs that cannot be read now; mark their rejects, and return those not among ``rejects``."""
    stays = "; its row stays in the cache until --prune"
    for number, each in enumerate(rejects):
        if plan.keep(each.guid):
            rejects[number] = replace(each, reason=each.reason + stays)
    missing = set(plan.unreadable) - {each.guid for each in rejects}
    found = [unreadable(pair) for pair in dataset.pairs if pair.guid in missing] if missing else []
    return [replace(each, reason=each.reason + stays) for each in found if each is not None]


def _known(out: Path, plan: Plan, how: How) -> Known:
    """Return the embeddings that are in the cache and in parts already, whatever pairs they are of."""
    known = Known(how.clean)
    if plan.count_todo():
        for path in [out, *plan.parts]:
            if path.exists():
                with FeatureCache.open(path) as cache:
                    # Views are of a pair, not of an image: where only they are missing, only they are computed.
                    usable = cache.has_cleaned and (cache.has_tokens or not how.tokens)
                if usable:
                    known.add(path, plan.reusable if path == out else None)
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
