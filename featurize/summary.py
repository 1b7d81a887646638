"""What the rows of a cache are made of, counted: texts by codec, repeated pairs, labels by class."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.schema import EMPTY_SHA256
from ..cache.store import FeatureCache
from .pairs.dataset import Dataset
from .pairs.spelling import alike_names


@dataclass(frozen=True)
class RowCounts:
    """Counts over the rows of a cache.

    Attributes
    ----------
    codecs
        Texts by the codec that decoded them.
    empty_texts, truncated_texts
        Texts of which cleaning leaves nothing; texts with more tokens than the backbone takes.
    repeated_pairs, repeated_images, repeated_texts
        Rows that repeat an earlier row: image and cleaned text, the image, the cleaned text (empty ones not counted).
    """

    codecs: dict[str, int]
    empty_texts: int
    truncated_texts: int
    repeated_pairs: int
    repeated_images: int
    repeated_texts: int

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data."""
        return asdict(self)


def count_rows(cache: FeatureCache) -> RowCounts:
    """Count what the rows of an open cache are made of."""
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
    """Count the rows, (n, width), that are equal to an earlier one."""
    whole = np.ascontiguousarray(digests).view(f"V{digests.shape[1]}")
    return len(whole) - len(np.unique(whole))


@dataclass(frozen=True)
class LabelCounts:
    """How the labels fit the rows of a cache.

    Attributes
    ----------
    file
        The labels file; None where there is none.
    classes
        Labelled rows by class, in alphabetical order.
    labelled, unlabelled
        Rows with a label and without.
    alike_classes
        Classes that differ in spelling alone, such as ``Shoes`` and ``shoes``.
    read_as_unlabelled
        Labels that are none, by what the file says: ``""`` for an empty cell.
    labels_without_pair, pairs_without_label, label, pair, said
        What is left over on both sides, an example of each, and a sentence about it (see ``spelling.Join``).
    """

    file: str | None
    classes: dict[str, int]
    labelled: int
    unlabelled: int
    alike_classes: list[list[str]] = field(default_factory=list)
    read_as_unlabelled: dict[str, int] = field(default_factory=dict)
    labels_without_pair: int = 0
    pairs_without_label: int = 0
    label: str = ""
    pair: str = ""
    said: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data."""
        return asdict(self)


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
        said=join.describe(),
    )


def count_without_files(dataset: Dataset, guids: Iterable[str]) -> dict[str, Any]:
    """Count the rows whose files are not both there now, by a look at the names.

    Returns
    -------
    dict
        ``rows`` and ``example``, a guid, or "".
    """
    whole = {pair.guid for pair in dataset.pairs if not pair.cannot_be_whole()}
    missing = [guid for guid in guids if guid not in whole]
    return {"rows": len(missing), "example": missing[0] if missing else ""}
