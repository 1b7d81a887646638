"""What ``featurize`` did, and what a cache holds: texts by codec, repeated pairs, labels by class."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.schema import EMPTY_SHA256
from ..cache.store import FeatureCache
from .pairs.dataset import Dataset
from .pairs.spelling import alike_names


@dataclass(frozen=True)
class RowCounts:
    """Counts over the rows of a cache. A row is repeated if it has the same content as an earlier row."""

    codecs: dict[str, int]  # texts by codec
    empty_texts: int  # after cleaning
    truncated_texts: int  # with more tokens than the backbone takes
    repeated_pairs: int  # image and cleaned text
    repeated_images: int
    repeated_texts: int  # cleaned, and not empty


def count_rows(cache: FeatureCache) -> RowCounts:
    """Count codecs, empty, truncated and repeated texts, and repeated images in an open cache."""
    everything = np.arange(len(cache))
    image = cache.read("row/image_sha256", everything)
    text = cache.read("row/cleaned_sha256" if cache.has_cleaned else "row/text_sha256", everything)
    empty = (text == np.frombuffer(EMPTY_SHA256, np.uint8)).all(axis=1)
    return RowCounts(
        codecs=dict(Counter(cache.codecs()).most_common()),
        empty_texts=int(empty.sum()),
        truncated_texts=int(cache.read("row/truncated", everything).sum()),
        repeated_pairs=_repeated(np.hstack([image, text])),
        repeated_images=_repeated(image),
        repeated_texts=_repeated(text[~empty]),
    )


def _repeated(digests: NDArray[np.uint8]) -> int:
    """Count the rows of ``digests``, (n, width), that equal an earlier row."""
    whole = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}")
    return len(whole) - len(np.unique(whole))


@dataclass(frozen=True)
class LabelCounts:
    """How the labels fit the rows of a cache. For the last five entries, see ``spelling.Join``."""

    file: str | None
    classes: dict[str, int]  # labelled rows by class, in alphabetical order
    labelled: int
    unlabelled: int
    alike_classes: list[list[str]]  # classes that differ only in spelling, such as Shoes and shoes
    read_as_unlabelled: dict[str, int]  # missing labels by the content of the cell, such as ""
    labels_without_pair: int
    pairs_without_label: int
    label: str
    pair: str
    said: str


def count_labels(dataset: Dataset, guids: Iterable[str], n: int) -> LabelCounts:
    """Count the labels of ``n`` rows."""
    labels, join = dataset.labels, dataset.join
    classes = Counter(labels.get(guid) for guid in guids) if labels else Counter({None: n})
    named = sorted((name, count) for name, count in classes.items() if name is not None)
    return LabelCounts(
        file=None if dataset.labels_path is None else str(dataset.labels_path),
        classes=dict(named),
        labelled=sum(count for _, count in named),
        unlabelled=classes[None],
        alike_classes=alike_names(name for name, _ in named),
        read_as_unlabelled=dict(labels.unlabelled),
        labels_without_pair=join.labels_without_pair,
        pairs_without_label=join.pairs_without_label,
        label=join.label,
        pair=join.pair,
        said=join.describe() if join.alike else "",
    )


def describe_manifest(dataset: Dataset) -> list[str]:
    """Return how a manifest was understood, before anything is encoded; nothing for a folder."""
    if not dataset.manifest:
        return []
    first = next(pair for pair in dataset.pairs if pair.guid == dataset.manifest[0])
    text = f"file {first.text_path}" if first.text_path else repr((first.text or "")[:60])
    columns = ", ".join(f"{name}={column}" for name, column in dataset.used_columns.items())
    unused = f"; not used: {', '.join(dataset.unused_columns)}" if dataset.unused_columns else ""
    counts = count_labels(dataset, dataset.manifest, len(dataset.manifest))
    classes = ", ".join(f"{name} {count:,}" for name, count in list(counts.classes.items())[:12])
    more = f" and {len(counts.classes) - 12} more classes" if len(counts.classes) > 12 else ""
    empty = sum(not (pair.text or "").strip() for pair in dataset.pairs if not pair.text_path and not pair.absent)
    return [
        f"columns: {columns}{unused}",
        f"first row: {first.guid!r}, image {first.image}, text {text}",
        f"{len(dataset.manifest):,} rows; labels: {classes or 'none'}{more}; {counts.unlabelled:,} without a label, "
        f"{empty:,} with an empty text",
    ]


def count_without_files(dataset: Dataset, guids: Iterable[str]) -> dict[str, Any]:
    """Count the ``rows`` that lack a file now, judging by file names; the ``example`` is a guid or ""."""
    complete = {pair.guid for pair in dataset.pairs if not pair.is_incomplete()}
    missing = [guid for guid in guids if guid not in complete]
    return {"rows": len(missing), "example": missing[0] if missing else ""}


@dataclass(frozen=True)
class FeaturizeSummary:
    """What ``featurize`` did, and what the cache holds now.

    Attributes
    ----------
    computed, resumed, unchanged
        Pairs that this run encoded, that an interrupted run had encoded, and whose cached row is still valid.
    gone, pruned
        Cached pairs whose files are gone, and how many of them were dropped.
    unreadable, unreadable_example
        Cached pairs that are kept although their files cannot be read now; one of them, with the reason.
    rejects, rejects_file
        Pairs that are left out; the file that lists them, and those that are kept although unreadable.
    content, labels
        Counts over the rows.
    labels_missing
        The labels file that the cache records, if it is gone.
    unused_columns
        Columns of the manifest that mmcli does not use.
    seconds, pairs_per_second, bytes
        Time of the run, its speed over computed pairs, and the size of the cache file.
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
