"""Labels for pairs: listed ones, a folder of them, or a single one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.atomic import write_text
from ..cache.errors import CheckpointError, DataError
from ..cache.labels import read_ids, table_text
from ..cache.store import FeatureCache
from ..featurize.dataset import Dataset
from ..featurize.loading import choose_device, moved_to
from ..featurize.pair import Pair
from ..featurize.reading import Reject
from .checkpoint import Checkpoint
from .metrics import softmax
from .trained import Trained, trained

# Rows, so that features of all pairs are never in memory together; with token states, and without.
_TOKENS_AT_ONCE, _POOLED_AT_ONCE = 256, 8192


@dataclass(frozen=True)
class Predictions:
    """What a head says of some pairs.

    Attributes
    ----------
    guids, labels
        One of each per pair, in the order asked for.
    classes
        Names, in the order of the columns of ``probs``.
    probs
        (n, C) float64, rows sum to 1.
    rejects
        Pairs of a folder that could not be read.
    head
        Which head said so: its file, fusion and modality.
    """

    guids: list[str]
    labels: list[str]
    classes: list[str]
    probs: NDArray[np.float64]
    rejects: list[Reject]
    head: str

    def to_csv(self, with_probs: bool = False) -> str:
        """Return a CSV with header ``guid,tag``, and with ``with_probs`` a column per class."""
        rows = zip(self.guids, self.labels, self.probs, strict=True)
        return table_text(
            ["guid", "tag", *(self.classes if with_probs else [])],
            ([guid, tag, *([f"{prob:.6f}" for prob in probs] if with_probs else [])] for guid, tag, probs in rows),
        )

    def write(self, path: str | Path, with_probs: bool = False) -> None:
        """Write ``to_csv`` to a file, atomically."""
        write_text(Path(path), self.to_csv(with_probs))


def predict(
    best_pt: str | Path | Trained,
    ids: str | Path | None = None,
    data: str | Path | None = None,
    pair: tuple[str | Path, str] | None = None,
    cache_path: str | Path | None = None,
    backbone: str | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predict labels. Rows that the cache has come from it, the others are encoded.

    Parameters
    ----------
    best_pt
        A trained head: its file or run folder, or opened.
    ids
        CSV with the column ``guid``: which pairs, in which order. Without ``data`` they are looked up in the cache,
        then in the dataset that the cache was made from.
    data
        A folder or manifest of pairs. Without ``ids``: all of them, those that cannot be read in ``rejects``.
    pair
        (image file, text).
    cache_path
        Default: the cache that the head was trained with, if it is still there.
    backbone
        Where the backbone is now, if it was moved.
    device
        A torch device, or ``auto``; a head that was opened stays where it is.
    on_progress
        Called with (pairs encoded, pairs to encode).

    Raises
    ------
    DataError
        A listed pair is nowhere, or cannot be read.
    CheckpointError, CacheError, BackboneError
        As they say.
    """
    model = trained(best_pt, choose_device(device))
    checkpoint, tokens = model.checkpoint, model.needs_tokens
    cache = None if pair is not None else _open_cache(checkpoint, cache_path)
    logits: dict[str, NDArray[np.float32]] = {}
    rejects: list[Reject] = []
    pairs: Sequence[Pair]
    try:
        wanted = None if ids is None else read_ids(ids)
        compared = cache
        if pair is not None:
            pairs = [Pair(Path(pair[0]).stem, str(pair[0]), text=pair[1])]
        elif data is not None:
            pairs = _pairs_of(Dataset.open(data), wanted)
        else:  # rows of the cache are taken as they are, the others are looked for where the cache was made from
            usable = cache is not None and (cache.has_tokens or not tokens)
            cached = [guid for guid in wanted or [] if usable and cache is not None and guid in cache]
            if cache is not None:
                model.get_ready(cache, cached, on_progress)
                cached.sort(key=cache.row_of.__getitem__)  # as the file is read fast
                size = _TOKENS_AT_ONCE if tokens else _POOLED_AT_ONCE
                for start in range(0, len(cached), size):
                    guids = cached[start : start + size]
                    logits |= zip(guids, model.of_rows(cache, guids), strict=True)
            missing = [guid for guid in wanted or [] if guid not in logits]
            pairs = _pairs_of(_recorded_dataset(cache, checkpoint), missing) if missing else []
            compared = None
        for found in model.of_pairs(pairs, moved_to(checkpoint.backbone, backbone), compared, on_progress):
            logits |= zip(found.guids, found.logits, strict=True)
            rejects += found.rejects
    finally:
        if cache is not None:
            cache.close()
    if rejects and (wanted is not None or not logits):
        raise DataError(
            f"{len(rejects)} of {len(pairs)} pairs cannot be read: "
            + ", ".join(f"{reject.guid!r} ({reject.reason}, {reject.path})" for reject in rejects[:10])
            + (", …" if len(rejects) > 10 else "")
            + (": mend them or take them out of the list" if pair is None else ": give another image and text")
        )
    guids = [guid for guid in wanted or [each.guid for each in pairs] if guid in logits]
    return _predictions(checkpoint, guids, np.stack([logits[guid] for guid in guids]), rejects)


def _open_cache(checkpoint: Checkpoint, path: str | Path | None) -> FeatureCache | None:
    """Open the cache asked for, or the one of the training if it is still there and still of the same kind."""
    if path is None:
        default = Path(checkpoint.made_from["cache"])
        if not default.is_file():
            return None
        cache = FeatureCache.open(default)
        if cache.fingerprint != checkpoint.fingerprint:
            cache.close()
            return None
        return cache
    cache = FeatureCache.open(path)
    try:
        checkpoint.check_cache(cache)
    except CheckpointError:
        cache.close()
        raise
    return cache


def _recorded_dataset(cache: FeatureCache | None, checkpoint: Checkpoint) -> Dataset:
    if cache is None:
        raise DataError(
            f"the cache that {checkpoint.path} was trained with is gone or was made anew otherwise: give --data FOLDER "
            "with the pairs, or --cache FILE"
        )
    return Dataset.open(cache.header.dataset["data"])


def _pairs_of(dataset: Dataset, wanted: list[str] | None) -> Sequence[Pair]:
    if wanted is None:
        return dataset.pairs
    there = {pair.guid: pair for pair in dataset.pairs}
    missing = [guid for guid in wanted if guid not in there]
    if missing:
        raise DataError(
            f"{len(missing)} of the listed pairs are not in {dataset.data}, the first is {missing[0]!r}: take them out "
            "of the list, or say with --data where they are"
        )
    return [there[guid] for guid in wanted]


def _predictions(
    checkpoint: Checkpoint, guids: list[str], logits: NDArray[np.float32], rejects: list[Reject]
) -> Predictions:
    probs = softmax(logits)
    labels = [checkpoint.classes[index] for index in logits.argmax(axis=1)]
    head = f"{checkpoint.path} ({checkpoint.recipe.modality}, {checkpoint.recipe.fusion})"
    return Predictions(guids, labels, checkpoint.classes, probs, rejects, head)
