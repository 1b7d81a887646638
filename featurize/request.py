"""The request of a run of ``featurize``: options, completed from the existing cache, and the new header."""

import codecs
import os
import platform
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from ..cache.errors import CacheError, DataError
from ..cache.schema import Header
from ..cache.store import FeatureCache
from .backbones.base import DEFAULT_BACKBONE, Backbone
from .backbones.opening import choose_device, choose_dtype
from .encode_options import EncodeOptions
from .identity import identity_of, is_cleaned
from .pairs.dataset import Dataset

_LIBRARIES = ("torch", "transformers", "numpy", "h5py", "pillow")


@dataclass(frozen=True)
class FeaturizeOptions:
    """Options of ``featurize``, as in the command's help. None means: as in the cache, or the default without one."""

    backbone: str | None = None  # default: DEFAULT_BACKBONE
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    views: int = 0
    tokens: bool = False
    clean: bool | None = None  # default: True
    encoding: str | None = None  # default: detected for each text
    resize: int | None = None  # default: the model's own
    batch_size: int | None = None
    max_reject_rate: float = 0.05
    prune: bool = False


@dataclass(frozen=True)
class Request:
    """All that a run needs to know before it compares and encodes pairs.

    Attributes
    ----------
    out
        The cache file.
    dataset, backbone
        The pairs to encode and what encodes them. The model is not loaded yet.
    options
        Options, completed from the existing cache.
    encode
        What the encoder computes for each pair.
    header
        Header of the new cache.
    cached_header, cached_rows
        Header and number of rows of the existing cache; None and 0 if there is no cache yet.
    """

    out: Path
    dataset: Dataset
    backbone: Backbone
    options: FeaturizeOptions
    encode: EncodeOptions
    header: Header
    cached_header: Header | None = None
    cached_rows: int = 0


def output_path(out: str | Path) -> Path:
    """Return the real path of the cache file; CacheError if it is a folder."""
    path = Path(os.path.realpath(out))
    if path.is_dir():
        raise CacheError(f"{path} is a folder: give --out a file, such as {path / 'features.h5'}")
    return path


def with_recorded_labels(dataset: Dataset, cached: FeatureCache | None) -> Dataset:
    """Return the dataset with the labels file that the cache records, unless both take labels from the manifest.

    A labels file that is gone stays recorded, because it may come back.
    """
    if cached is None:
        return dataset
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


def complete_options(options: FeaturizeOptions, cached: FeatureCache | None) -> FeaturizeOptions:
    """Fill in options that were not given from the cache, so that adding pairs needs no flags."""
    if options.encoding is not None:
        try:
            options = replace(options, encoding=codecs.lookup(options.encoding).name)
        except LookupError as error:
            raise DataError(
                f"unknown encoding {options.encoding!r}: give one that Python knows, such as cp1251"
            ) from error
    if cached is None:
        return replace(options, backbone=options.backbone or DEFAULT_BACKBONE, clean=options.clean is not False)
    identity, recorded = cached.header.identity, cached.header.backbone
    if options.backbone is None:
        options = replace(options, backbone=recorded["name"], revision=options.revision or recorded["revision"])
    return replace(
        options,
        dtype=identity["dtype"] if options.dtype == "auto" else options.dtype,
        clean=is_cleaned(identity) if options.clean is None else options.clean,
        encoding=options.encoding or identity["text"].get("encoding"),
        resize=options.resize or identity["image"]["resize"],
        views=max(options.views, cached.n_views),
        tokens=options.tokens or cached.has_tokens,
    )


def make_request(
    out: Path, dataset: Dataset, backbone: Backbone, options: FeaturizeOptions, cached: FeatureCache | None
) -> Request:
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
    if cached is None:
        return Request(out, dataset, backbone, options, encode, header)
    return Request(out, dataset, backbone, options, encode, header, cached.header, len(cached))


def with_all_versions(header: Header, cached: Header | None, computed: int) -> Header:
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
