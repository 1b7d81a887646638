"""A trained head of either stage, ready to compute logits of rows of a cache and of raw pairs."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import CheckpointError
from ...cache.features import Features
from ...cache.store import FeatureCache
from ...featurize.backbones.opening import moved_to
from ...featurize.encode import OnProgress, chunked
from ...featurize.pairs.hashing import SIDES, Reject
from ...featurize.pairs.pair import Pair
from ...featurize.source import Source
from ...featurize.state_store import StateStore, states_of_pairs
from ..model.head import Head, predict_logits
from .checkpoint import Checkpoint, load_checkpoint

_AT_ONCE = 256  # pairs, so that the states of 100,000 are never in memory together


class Trained:
    """A trained head with its part of the backbone, which is opened when it is first needed.

    ``data`` and ``backbone`` say where the raw pairs and the backbone are now; default: as recorded.
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
        self._stores: list[StateStore] = []  # for the cache of the last call

    @property
    def needs_tokens(self) -> bool:
        """Whether the head reads token states."""
        return self.checkpoint.head.needs_tokens

    def get_ready(self, cache: FeatureCache, guids: Sequence[str], on_progress: OnProgress | None = None) -> None:
        """Compute the missing states of ``guids`` from the raw pairs; keep them beside ``cache`` if it is writable.

        ``on_progress`` is called with (pairs computed, pairs to compute), unless no state is missing.
        """
        if self.layers:
            self._attach_tops()  # before the work, so that wrong layers are found early
            if os.access(cache.path.parent, os.W_OK):
                for store in self._stores_of(cache):
                    store.states(guids, on_progress)

    def of_rows(self, cache: FeatureCache, guids: Sequence[str], max_bytes: int | None = None) -> NDArray[np.float32]:
        """Return the logits, (n, C) float32, of rows of a cache with the checkpoint's fingerprint.

        Features that take more than ``max_bytes`` are read as they are needed. Raise a CacheError if tokens are needed
        and not in the cache, or if a number is not finite. In stage 2, raise a DataError if a raw pair is gone or has
        changed, and a BackboneError if the backbone cannot be opened, or is another backbone.
        """
        if not self.layers:
            return self._logits(guids, cache.features(guids, self.needs_tokens, max_bytes=max_bytes))
        self._attach_tops()
        stores = self._stores_of(cache)
        logits = []
        for block in chunked(guids, _AT_ONCE):
            features = cache.features(block, self.needs_tokens, max_bytes=max_bytes)
            states = {store.tower: store.states(block, keep=False) for store in stores}
            logits.append(self._logits(block, replace(features, states=states)))
        return np.concatenate(logits)

    def of_pairs(
        self, pairs: Sequence[Pair], cache: FeatureCache | None, on_progress: OnProgress | None = None
    ) -> Iterator[tuple[dict[str, NDArray[np.float32]], list[Reject]]]:
        """Yield by block the logits, (C,) float32, of raw pairs by guid, and the pairs that cannot be read.

        Pairs whose raw bytes are in ``cache`` are taken from it. Raise a BackboneError if the backbone cannot be
        opened, or is another backbone.
        """
        if self.layers:
            self._attach_tops()
        pair_of = {pair.guid: pair for pair in pairs}
        size = _AT_ONCE if self.layers else max(len(pairs), 1)
        done = 0
        for block in chunked(pairs, size):
            progress = None if self.layers else on_progress
            for embedded in self.source.embed(block, cache, self.needs_tokens, self._frozen_sides(), progress):
                guids, features, rejects = embedded.guids, embedded.features, embedded.rejects
                if self.layers and guids:
                    pairs_of_block = [pair_of[guid] for guid in guids]
                    with_states, states, refused = states_of_pairs(pairs_of_block, self.source, self.layers)
                    rows = np.flatnonzero(np.isin(guids, with_states))
                    guids, features = with_states, replace(features.take(rows), states=states)
                    rejects = rejects + refused
                logits = self._logits(guids, features) if guids else ()
                yield dict(zip(guids, logits, strict=True)), rejects
            done += len(block)
            if self.layers and on_progress is not None:
                on_progress(done, len(pairs))

    def _frozen_sides(self) -> tuple[str, ...]:
        """Return the sides whose frozen embeddings the head sees."""
        if self.needs_tokens:
            return SIDES
        modality = self.checkpoint.recipe.modality
        return tuple(side for side in SIDES if modality in ("both", side) and side not in self.layers)

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

    @cached_property
    def source(self) -> Source:
        """The backbone and the raw pairs, each opened when it is first needed, and kept for the next pairs."""
        return Source(self.checkpoint.identity, self.place, self.device, self.data)

    def _stores_of(self, cache: FeatureCache) -> list[StateStore]:
        if not self._stores or self._stores[0].cache is not cache:
            self._stores = [StateStore(cache, tower, count, self.source) for tower, count in self.layers.items()]
        return self._stores

    def _attach_tops(self) -> None:
        """Attach the layers of the backbone to each head, with the weights that stage 2 learned."""
        if self.checkpoint.head.tops:
            return
        tops = self.source.tops(self.layers)
        heads = [head for head in self.checkpoint.head.heads if isinstance(head, Head)]
        for head, changed in zip(heads, self.checkpoint.changed, strict=True):
            try:
                head.attach(tops, changed)
            except (KeyError, ValueError) as error:
                for attached in heads:  # all of them: a second try must not find the first head ready and stop there
                    attached.tops.clear()
                raise CheckpointError(
                    f"the layers in {self.checkpoint.path} do not fit {self.place['name']} ({error}): give the "
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
