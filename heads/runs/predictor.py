"""Predict labels: of listed pairs, of a folder of pairs, or of a single pair."""

import contextlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import write_text
from ...cache.errors import CacheError, CheckpointError, DataError
from ...cache.labels import NO_COLUMNS, guid_of, read_ids, read_table, table_text
from ...cache.store import FeatureCache
from ...featurize.backbones.opening import choose_device
from ...featurize.encode import OnProgress, chunked
from ...featurize.pairs.dataset import Dataset
from ...featurize.pairs.hashing import Reject, compare_bytes
from ...featurize.pairs.pair import Pair
from ..evaluation.metrics import softmax
from .checkpoint import Checkpoint
from .trained import Trained, open_best_pt

_TOKENS_AT_ONCE, _POOLED_AT_ONCE = 256, 8192  # rows, so that features of all pairs are never in memory together
_DAY = 86_400  # seconds


@dataclass(frozen=True)
class Predictions:
    """Predicted labels and probabilities of some pairs.

    Attributes
    ----------
    guids, labels
        A guid and a label per pair, in the order asked for.
    classes
        Names, in the order of the columns of ``probs``.
    probs
        (n, C) float64; each row sums to 1.
    rejects
        Pairs of a folder that could not be read.
    head
        The head that predicted: its file, fusion and modality.
    notes
        Sentences for the user.
    """

    guids: list[str]
    labels: list[str]
    classes: list[str]
    probs: NDArray[np.float64]
    rejects: list[Reject]
    head: str
    notes: list[str] = field(default_factory=list)

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


class Predictor:
    """Predict with a head that stays loaded; its encoder is loaded when it is first needed, and stays loaded too.

    Examples
    --------
    >>> predictor = Predictor.open("artifacts/runs/latest")         # doctest: +SKIP
    >>> predictor.predict(pairs=[("a.jpg", "so good")]).labels       # doctest: +SKIP
    ['positive']
    >>> predictor.predict(ids=["29", "36"]).probs.shape              # doctest: +SKIP
    (2, 3)
    """

    def __init__(self, model: Trained, cache_path: str | Path | None = None) -> None:
        self.model, self.cache_path = model, cache_path

    @classmethod
    def open(
        cls,
        best_pt: str | Path | Trained,
        cache: str | Path | None = None,
        backbone: str | None = None,
        device: str = "auto",
    ) -> "Predictor":
        """Open a trained head.

        Parameters
        ----------
        best_pt
            The file or run folder of the head; or the result of ``open_best_pt``, which knows backbone and device.
        cache
            Default: the cache that the head was trained with, if it is still there.
        backbone
            Where the backbone is now, if it was moved.
        device
            A torch device, or ``auto``.

        Raises
        ------
        CheckpointError
            ``best_pt`` is missing or cannot be used.
        """
        return cls(open_best_pt(best_pt, choose_device(device), backbone=backbone), cache)

    def predict(
        self,
        ids: str | Path | Sequence[str] | None = None,
        data: str | Path | None = None,
        pairs: Sequence[tuple[str | Path, str]] | None = None,
        on_progress: OnProgress | None = None,
    ) -> Predictions:
        """Predict labels. Pairs in the cache are taken from it, and other pairs are encoded.

        Parameters
        ----------
        ids
            The pairs in their order: guids, or a CSV with the column ``guid``. Without ``data`` they are looked up in
            the cache, then in the dataset that the cache was made from.
        data
            A folder or manifest of pairs. Without ``ids``, all pairs are predicted in the order of the manifest, and
            pairs that cannot be read are listed in ``rejects``.
        pairs
            (image file, text) of each pair. The guids are the names of the images, or 1, 2, … if two names are equal.
        on_progress
            Called with (pairs encoded, pairs to encode).

        Raises
        ------
        DataError
            A listed pair is not found, or cannot be read.
        CheckpointError, CacheError, BackboneError
            Checkpoint, cache or backbone cannot be used.
        """
        if (pairs is None) == (ids is None and data is None):
            raise DataError("give ids, or data (with or without ids), or pairs")
        wanted = None if ids is None else _guids_of(ids)
        if pairs is not None:
            return self._of_pairs(_named_pairs(pairs), None, None, on_progress)
        with _open_cache(self.model.checkpoint, self.cache_path) or contextlib.nullcontext() as cache:
            if data is None:
                return self._of_rows(wanted or [], cache, on_progress)
            dataset = _open_like_cached(data, cache)
            chosen = dataset.pairs if wanted is None else _chosen(dataset, wanted)
            return self._of_pairs(chosen, dataset.order if wanted is None else None, cache, on_progress)

    def _of_rows(self, wanted: list[str], cache: FeatureCache | None, on_progress: OnProgress | None) -> Predictions:
        """Predict listed pairs from the cache, and pairs that are not in it from the dataset of the cache."""
        model, logits, notes = self.model, dict[str, NDArray[np.float32]](), list[str]()
        if cache is not None and (cache.has_tokens or not model.needs_tokens):
            cached = [guid for guid in wanted if guid in cache]
            notes = _edited_notes(cache, cached)
            model.get_ready(cache, cached, on_progress)
            cached.sort(key=cache.row_of.__getitem__)  # the file is read fast in its own order
            size = _TOKENS_AT_ONCE if model.needs_tokens else _POOLED_AT_ONCE
            for guids in chunked(cached, size):
                logits |= zip(guids, model.of_rows(cache, guids), strict=True)
        missing = [guid for guid in wanted if guid not in logits]
        uncached = _chosen(_recorded_dataset(cache, model.checkpoint), missing) if missing else []
        logits |= self._encoded(uncached, None, on_progress, must_be_read=True)[0]
        return self._predictions(wanted, logits, [], notes)

    def _of_pairs(
        self,
        pairs: Sequence[Pair],
        order: list[str] | None,
        cache: FeatureCache | None,
        on_progress: OnProgress | None,
    ) -> Predictions:
        """Predict raw pairs in their order, which must all be readable; with ``order``, predict the readable pairs."""
        logits, rejects = self._encoded(pairs, cache, on_progress, must_be_read=order is None)
        guids = [guid for guid in order or [pair.guid for pair in pairs] if guid in logits]
        return self._predictions(guids, logits, rejects)

    def _predictions(
        self,
        guids: list[str],
        logits_of: Mapping[str, NDArray[np.float32]],
        rejects: list[Reject],
        notes: Sequence[str] = (),
    ) -> Predictions:
        """Return the predictions for ``guids``, given the logits, (C,), of each guid."""
        checkpoint, logits = self.model.checkpoint, np.stack([logits_of[guid] for guid in guids])
        labels = [checkpoint.classes[index] for index in logits.argmax(axis=1)]
        head = f"{checkpoint.path} ({checkpoint.recipe.modality}, {checkpoint.recipe.fusion})"
        return Predictions(guids, labels, checkpoint.classes, softmax(logits), rejects, head, list(notes))

    def _encoded(
        self,
        pairs: Sequence[Pair],
        cache: FeatureCache | None,
        on_progress: OnProgress | None,
        must_be_read: bool,
    ) -> tuple[dict[str, NDArray[np.float32]], list[Reject]]:
        """Return the logits, (C,), of each pair by its guid, and the pairs that cannot be read."""
        logits: dict[str, NDArray[np.float32]] = {}
        rejects: list[Reject] = []
        for block_logits, block_rejects in self.model.of_pairs(pairs, cache, on_progress) if pairs else ():
            logits |= block_logits
            rejects += block_rejects
        if rejects and (must_be_read or not logits):
            raise DataError(
                f"{len(rejects)} of {len(pairs)} pairs cannot be read: "
                + ", ".join(f"{reject.guid!r} ({reject.reason}, {reject.path})" for reject in rejects[:10])
                + (", …" if len(rejects) > 10 else "")
                + ": repair these files, or leave the pairs out"
            )
        return logits, rejects


def predict(
    best_pt: str | Path | Trained,
    ids: str | Path | Sequence[str] | None = None,
    data: str | Path | None = None,
    pair: tuple[str | Path, str] | None = None,
    cache_path: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Predictions:
    """Open a head and predict once. A ``Predictor`` stays loaded; see ``Predictor.open`` and ``Predictor.predict``."""
    return Predictor.open(best_pt, cache_path).predict(ids, data, None if pair is None else [pair], on_progress)


def _edited_notes(cache: FeatureCache, guids: Sequence[str]) -> list[str]:
    """Return a note on how many of ``guids`` were edited since they were featurized; no note if none was.

    Files whose time of change is more than a day before the cache was written are not read: this time cannot be set
    back, so featurize read what they hold now. Nothing is said where the raw pairs are not at hand.
    """
    data = cache.header.dataset["data"]
    try:
        dataset = Dataset.recorded(cache.header.dataset)
    except (DataError, OSError):
        return []
    since, wanted = cache.path.stat().st_mtime - _DAY, set(guids)
    pairs = [pair for pair in dataset.pairs if pair.guid in wanted and _changed_since(pair, since)]
    rows = cache.rows([pair.guid for pair in pairs])
    # Of a pair that cannot be read, only the cached row is left.
    edited = sum(isinstance(same, tuple) and not all(same) for same in compare_bytes(cache, rows, pairs))
    if not edited:
        return []
    return [
        f"note: {edited} of {len(guids)} pairs were edited since featurize, and their old content is predicted: run "
        f"`mmcli featurize {data} --out {cache.path}`, or predict with --data {data}"
    ]


def _changed_since(pair: Pair, since: float) -> bool:
    """Return whether a file of the pair may have changed since then; a text in a manifest has no time of its own."""
    try:
        return any(path is None or os.stat(path).st_ctime >= since for path in (pair.image, pair.text_path))
    except OSError:
        return False


def _guids_of(ids: str | Path | Sequence[str]) -> list[str]:
    """Return the guids in a file or a list; raise a DataError if a guid is given twice."""
    if isinstance(ids, str | os.PathLike):
        return read_ids(ids)
    guids = [guid_of(str(guid)) for guid in ids]
    twice = [guid for guid, count in Counter(guids).items() if count > 1]
    if twice or not guids:
        raise DataError(f"guid {twice[0]!r} is given twice: keep one" if twice else "no guid is given")
    return guids


def _named_pairs(pairs: Sequence[tuple[str | Path, str]]) -> list[Pair]:
    if not pairs:
        raise DataError("no pair is given")
    names = [Path(image).stem for image, _ in pairs]
    if len(set(names)) < len(names):
        names = [str(number) for number in range(1, len(pairs) + 1)]
    return [Pair(name, str(image), text=text) for name, (image, text) in zip(names, pairs, strict=True)]


def _open_cache(checkpoint: Checkpoint, path: str | Path | None) -> FeatureCache | None:
    """Open the cache at ``path``; by default the cache of the training, or None if it no longer fits."""
    try:
        cache_path = checkpoint.cache_path(path)
    except CacheError:  # raw pairs can be predicted without a cache
        return None
    if path is None and not cache_path.exists():
        return None
    cache = FeatureCache.open(cache_path)
    try:
        checkpoint.check_cache(cache)
    except CheckpointError:
        cache.close()
        if path is None:
            return None
        raise
    return cache


def _recorded_dataset(cache: FeatureCache | None, checkpoint: Checkpoint) -> Dataset:
    if cache is None:
        raise DataError(
            f"the cache that {checkpoint.path} was trained with is gone, or holds other features now: give --data "
            "FOLDER with the pairs, or --cache FILE"
        )
    return Dataset.recorded(cache.header.dataset)


def _open_like_cached(data: str | Path, cache: FeatureCache | None) -> Dataset:
    """Open new pairs; a table is read as that of the cache was, if it has the columns that were chosen for it."""
    recorded = {} if cache is None else cache.header.dataset
    if not Path(data).is_file():
        return Dataset.open(data)
    header, _ = read_table(Path(data))
    chosen = recorded.get("columns", NO_COLUMNS)
    columns = {name: column for name, column in chosen.items() if name != "label" or column in header}
    has_all = {part.strip() for column in columns.values() for part in column.split("+")} <= set(header)
    return Dataset.open(data, None, columns if has_all else NO_COLUMNS, recorded.get("image_root"))


def _chosen(dataset: Dataset, wanted: list[str]) -> list[Pair]:
    pair_of = {pair.guid: pair for pair in dataset.pairs}
    missing = [guid for guid in wanted if guid not in pair_of]
    if missing:
        raise DataError(
            f"{len(missing)} of the listed pairs are not in {dataset.data}, the first is {missing[0]!r}: take them out "
            "of the list, or give their folder with --data"
        )
    return [pair_of[guid] for guid in wanted]
