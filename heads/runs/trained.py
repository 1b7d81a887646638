"""A trained head of either stage, ready to compute logits of rows of a cache and of raw pairs."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import CheckpointError
from ...cache.features import Features
from ...cache.store import FeatureCache
from ...featurize.backbones.opening import moved_to
from ...featurize.embed import EmbeddedPairs, embed_pairs
from ...featurize.frozen.source import Source
from ...featurize.frozen.state_store import StateStore, states_of_pairs
from ...featurize.pairs.hashing import Reject
from ...featurize.pairs.pair import Pair
from ..model.head import Head, predict_logits
from .best_pt import load_checkpoint
from .checkpoint import Checkpoint

_AT_ONCE = 256  # pairs, so that the states of 100,000 are never in memory together

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class PairLogits:
    """Logits, (n, C) float32, of a block of pairs, and the pairs of the block that could not be read."""

    guids: list[str]
    logits: NDArray[np.float32]
    rejects: list[Reject]


class Trained:
    """A trained head with its part of the backbone, which is opened when it is first needed.

    Parameters
    ----------
    checkpoint
        The content of best.pt.
    device
        A torch device.
    data
        Where the raw pairs of the cache are now, which stage 2 reads again; default: as recorded.
    backbone
        Where the backbone is now; default: as recorded.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: str = "cpu",
        data: str | Path | None = None,
        backbone: str | None = None,
    ) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.data = data or checkpoint.made_from.get("data")
        self.place = moved_to(checkpoint.backbone, backbone)
        finetune = checkpoint.recipe.finetune
        self.layers = {} if finetune is None else finetune.layers()
        self._sources: dict[str, Source] = {}  # by place of the backbone, so that the next pairs need not open it
        self._stores: list[StateStore] = []  # for the cache of the last call

    @property
    def needs_tokens(self) -> bool:
        """Whether the head reads token states."""
        return self.checkpoint.head.needs_tokens

    def get_ready(self, cache: FeatureCache, guids: Sequence[str], on_progress: OnProgress | None = None) -> None:
        """Compute the missing states of ``guids`` from the raw pairs; keep them beside ``cache`` if it is writable.

        Parameters
        ----------
        on_progress
            Called with (pairs computed, pairs to compute), unless no state is missing.
        """
        if self.layers:
            self._attach_tops(self._source(self.place))  # before the work, so that wrong layers are found early
            if os.access(cache.path.parent, os.W_OK):
                for store in self._stores_of(cache):
                    store.states(guids, on_progress)

    def of_rows(self, cache: FeatureCache, guids: Sequence[str], max_bytes: int | None = None) -> NDArray[np.float32]:
        """Return the logits, (n, C) float32, of rows of a cache with the checkpoint's fingerprint.

        Parameters
        ----------
        max_bytes
            Embeddings or token states that take more than this are read as they are needed.

        Raises
        ------
        CacheError
            Tokens are needed and not in the cache, or a number is not finite.
        DataError
            In stage 2, a raw pair is gone or has changed.
        BackboneError
            In stage 2, the backbone cannot be opened, or is another backbone.
        """
        if not self.layers:
            return self._logits(guids, cache.features(guids, self.needs_tokens, max_bytes=max_bytes))
        self._attach_tops(self._source(self.place))
        stores = self._stores_of(cache)
        logits = []
        for start in range(0, len(guids), _AT_ONCE):
            block = guids[start : start + _AT_ONCE]
            features = cache.features(block, self.needs_tokens, max_bytes=max_bytes)
            states = {store.tower: store.states(block, keep=False) for store in stores}
            logits.append(self._logits(block, replace(features, states=states)))
        return np.concatenate(logits)

    def of_pairs(
        self,
        pairs: Sequence[Pair],
        backbone: dict[str, Any],
        cache: FeatureCache | None,
        on_progress: OnProgress | None = None,
    ) -> Iterator[PairLogits]:
        """Yield the logits of raw pairs block by block. Pairs whose raw bytes are in ``cache`` are taken from it.

        Raises
        ------
        BackboneError
            ``backbone`` cannot be opened, or is not the backbone of the checkpoint.
        """
        source = self._source(backbone)
        if self.layers:
            self._attach_tops(source)
        pair_of = {pair.guid: pair for pair in pairs}
        size = _AT_ONCE if self.layers else max(len(pairs), 1)
        done = 0
        for start in range(0, len(pairs), size):
            block = pairs[start : start + size]
            progress = None if self.layers else on_progress
            for embedded in embed_pairs(
                block, self.checkpoint.identity, source.encoder, cache, self.needs_tokens, progress
            ):
                yield self._of_embedded(embedded, pair_of, source)
            done += len(block)
            if self.layers and on_progress is not None:
                on_progress(done, len(pairs))

    def _of_embedded(self, embedded: EmbeddedPairs, pair_of: Mapping[str, Pair], source: Source) -> PairLogits:
        if not embedded.guids:
            return PairLogits([], np.zeros((0, len(self.checkpoint.classes)), np.float32), embedded.rejects)
        features = embedded.features
        if self.layers:
            pairs = [pair_of[guid] for guid in embedded.guids]
            features = replace(features, states=states_of_pairs(pairs, source, self.layers))
        return PairLogits(embedded.guids, self._logits(embedded.guids, features), embedded.rejects)

    def _logits(self, guids: Sequence[str], features: Features) -> NDArray[np.float32]:
        """Return the logits, (n, C), of ``guids``; raise a CheckpointError that names the first non-finite row."""
        logits = predict_logits(self.checkpoint.head, features)
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            raise CheckpointError(
                f"{self.checkpoint.path} gives {np.count_nonzero(~finite)} of {len(guids)} pairs scores that are not "
                f"finite, the first is {guids[int(np.argmin(finite))]!r}: train the head again"
            )
        return logits

    def _source(self, backbone: dict[str, Any]) -> Source:
        place = f"{backbone['name']}@{backbone['revision']}"
        if place not in self._sources:
            self._sources[place] = Source(self.checkpoint.identity, backbone, self.device, self.data)
        return self._sources[place]

    def _stores_of(self, cache: FeatureCache) -> list[StateStore]:
        if not self._stores or self._stores[0].cache is not cache:
            source = self._source(self.place)
            self._stores = [StateStore(cache, tower, count, source) for tower, count in self.layers.items()]
        return self._stores

    def _attach_tops(self, source: Source) -> None:
        """Attach the layers of the backbone to each head, with the weights that stage 2 learned."""
        if self.checkpoint.head.tops:
            return
        tops = source.tops(self.layers)
        heads = [head for head in self.checkpoint.head.heads if isinstance(head, Head)]
        for head, changed in zip(heads, self.checkpoint.changed, strict=True):
            try:
                head.attach(tops, changed)
            except (KeyError, ValueError) as error:
                for attached in heads:  # all of them: a second try must not find the first head ready and stop there
                    attached.tops.clear()
                raise CheckpointError(
                    f"the layers in {self.checkpoint.path} do not fit {source.place['name']} ({error}): give the "
                    "backbone of the training with --backbone"
                ) from error
        self.checkpoint.head.to(self.device).eval()


def open_best_pt(
    best_pt: "str | Path | Trained",
    device: str = "cpu",
    data: str | Path | None = None,
    backbone: str | None = None,
) -> Trained:
    """Return the head in a best.pt or its run folder, on ``device``; a ``Trained`` is returned unchanged."""
    if isinstance(best_pt, Trained):
        return best_pt
    return Trained(load_checkpoint(best_pt, device), device, data, backbone)
