"""Labels for pairs: listed ones, a folder of them, or a single one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.atomic import write_text
from ..cache.errors import CheckpointError, DataError
from ..cache.labels import read_ids, table_text
from ..cache.store import FeatureCache
from ..featurize.dataset import Dataset, Pair
from ..featurize.embed import embed_pairs
from ..featurize.encode import Reject
from .checkpoint import Checkpoint, load_checkpoint
from .training import predict_logits


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
        (n, C) float32, rows sum to 1.
    rejects
        Pairs of a folder that could not be read.
    head
        Which head said so: its file, fusion and modality.
    """

    guids: list[str]
    labels: list[str]
    classes: list[str]
    probs: NDArray[np.float32]
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
    best_pt: str | Path,
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
        A trained head.
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
    on_progress
        Called with (pairs encoded, pairs to encode).

    Raises
    ------
    DataError
        A listed pair is nowhere, or cannot be read.
    CheckpointError, CacheError, BackboneError
        As they say.
    """
    checkpoint = load_checkpoint(best_pt)
    cache = None if pair is not None else _open_cache(checkpoint, cache_path)
    try:
        source = checkpoint.backbone if backbone is None else {"name": backbone, "revision": None}
        wanted = None if ids is None else read_ids(ids)
        if pair is not None:
            pairs = [Pair(Path(pair[0]).stem, str(pair[0]), text=pair[1])]
        elif data is not None:
            pairs = _pairs_of(Dataset.open(data), wanted)
        elif cache is not None and wanted is not None and all(guid in cache for guid in wanted):
            return _classify(checkpoint, wanted, *cache.embeddings(wanted), [])
        else:
            dataset, wanted = _recorded_dataset(cache, best_pt), wanted or []
            pairs = _pairs_of(dataset, [guid for guid in wanted if cache is None or guid not in cache])
        guids, (image, text), rejects = embed_pairs(pairs, checkpoint.identity, source, cache, device, on_progress)
        if cache is not None and data is None and wanted is not None and not rejects:
            image, text = _in_order(cache, wanted, guids, image, text)
            guids = wanted
    finally:
        if cache is not None:
            cache.close()
    if rejects and (wanted is not None or not guids):
        raise DataError(
            f"{len(rejects)} of {len(pairs)} pairs cannot be read: "
            + ", ".join(f"{reject.guid!r} ({reject.reason}, {reject.path})" for reject in rejects[:10])
            + (", …" if len(rejects) > 10 else "")
            + ": mend them or take them out of the list"
        )
    return _classify(checkpoint, guids, image, text, rejects)


def _in_order(
    cache: FeatureCache, wanted: list[str], guids: list[str], image: NDArray[np.float32], text: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return embeddings of ``wanted``: cached rows as they are cached, the others as they were just encoded."""
    cached = [guid for guid in wanted if guid in cache]
    place = {guid: row for row, guid in enumerate([*guids, *cached])}
    order = [place[guid] for guid in wanted]
    old_image, old_text = cache.embeddings(cached)
    if cached:
        image, text = np.concatenate([image, old_image]), np.concatenate([text, old_text])
    return image[order], text[order]


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


def _recorded_dataset(cache: FeatureCache | None, best_pt: str | Path) -> Dataset:
    if cache is None:
        raise DataError(
            f"the cache that {best_pt} was trained with is gone or was made anew otherwise: give --data FOLDER with "
            "the pairs, or --cache FILE"
        )
    return Dataset.open(cache.header.dataset["data"])


def _pairs_of(dataset: Dataset, wanted: list[str] | None) -> list[Pair]:
    if wanted is None:
        return dataset.pairs
    there = {pair.guid: pair for pair in dataset.pairs}
    missing = [guid for guid in wanted if guid not in there]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(wanted)} listed pairs are not in {dataset.data}, the first is {missing[0]!r}"
        )
    return [there[guid] for guid in wanted]


def _classify(
    checkpoint: Checkpoint,
    guids: list[str],
    image: NDArray[np.float32],
    text: NDArray[np.float32],
    rejects: list[Reject],
) -> Predictions:
    logits = predict_logits(checkpoint.head, image, text).astype(np.float64)
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs = (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)
    labels = [checkpoint.classes[index] for index in logits.argmax(axis=1)]
    head = f"{checkpoint.path} ({checkpoint.recipe.modality}, {checkpoint.recipe.fusion})"
    return Predictions(guids, labels, checkpoint.classes, probs, rejects, head)
