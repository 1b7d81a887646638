"""Using a best.pt of either stage: logits of cached rows and of raw pairs."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import CheckpointError
from ..cache.features import Features, Tokens, text_offsets
from ..cache.parts import Block
from ..cache.store import FeatureCache
from ..featurize.backbones.opening import moved_to
from ..featurize.embed import how_of, same_as_cached
from ..featurize.encode import encode_blocks
from ..featurize.pairs.hashing import TOWERS, Reject
from ..featurize.pairs.pair import Pair
from ..heads.runs.checkpoint import FINETUNED, read_best_pt
from ..heads.runs.trained import OnProgress, Scored, Trained
from .checkpoint import FinetunedCheckpoint
from .model import Finetuned, StateRows, predict_parts
from .source import Source
from .states import Part, States
from .store import StateStore

_AT_ONCE = 256  # pairs, so that the states of 100,000 are never in memory together


def open_best_pt(
    path: str | Path, device: str = "cpu", data: str | Path | None = None, backbone: str | None = None
) -> Trained:
    """Return what ``path`` holds, a best.pt or its run folder, of stage 1 or of stage 2.

    Parameters
    ----------
    device
        A torch device.
    data, backbone
        Of stage 2: where the raw pairs of the cache and the backbone are now; default: as recorded.

    Raises
    ------
    CheckpointError
        As ``heads.load_checkpoint``.
    """
    stored = read_best_pt(path)
    if stored.content["format"] == FINETUNED:
        return TrainedStage2(FinetunedCheckpoint.of(stored, device), device, data, backbone)
    return Trained(stored.checkpoint(device), device)


class TrainedStage2(Trained):
    """A head whose backbone was trained on: what changed is computed again, what did not comes from the cache."""

    def __init__(
        self,
        found: FinetunedCheckpoint,
        device: str,
        data: str | Path | None = None,
        backbone: str | None = None,
    ) -> None:
        super().__init__(found.checkpoint, device)
        self.found, self.data = found, data or found.checkpoint.made_from.get("data")
        self.place = moved_to(self.checkpoint.backbone, backbone)
        self.layers = found.settings.layers()
        self._models: list[Finetuned] = []
        self._stores: list[StateStore] = []  # of the cache that was asked for last
        self._sources: dict[str, Source] = {}  # by where the backbone is; kept, for the next pairs

    def models(self, source: Source) -> list[Finetuned]:
        """Return one model per head, its tops cut from the backbone that ``source`` names."""
        if not self._models:
            tops = source.tops(self.layers)
            for head, changed in zip(self.checkpoint.head.heads, self.found.changed, strict=True):
                model = Finetuned(copy.deepcopy(tops), head).to(self.device)  # type: ignore[arg-type]
                try:
                    model.load_changed(changed)
                except (KeyError, ValueError) as error:
                    raise CheckpointError(
                        f"the layers in {self.checkpoint.path} are not those of {source.place['name']} ({error})"
                    ) from error
                self._models.append(model.eval())
        return self._models

    def logits(self, rows: StateRows, source: Source) -> NDArray[np.float32]:
        """Return the logits of all heads together, (n, C)."""
        each = [predict_parts(model, rows, self.device).mean(dim=0) for model in self.models(source)]
        combined: NDArray[np.float32] = self.checkpoint.head.combined(each).cpu().numpy()
        return combined

    def _stores_of(self, cache: FeatureCache) -> list[StateStore]:
        if not self._stores or self._stores[0].cache is not cache:
            source = Source(self.checkpoint.identity, self.place, self.device, self.data)
            self._stores = [StateStore(cache, tower, count, source) for tower, count in self.layers.items()]
        return self._stores

    def get_ready(self, cache: FeatureCache, guids: Sequence[str], on_progress: OnProgress | None = None) -> None:
        """Compute states that are not kept beside ``cache`` from the raw pairs, and keep them where that can be."""
        stores = self._stores_of(cache)
        self.models(stores[0].source)  # so that layers which do not fit are found out before the work
        if os.access(cache.path.parent, os.W_OK):
            for store in stores:
                store.states(guids, on_progress)

    def of_rows(self, cache: FeatureCache, guids: Sequence[str], max_bytes: int | None = None) -> NDArray[np.float32]:
        """Return the logits of rows of a cache; states that are not kept beside it are computed from the raw pairs."""
        stores = self._stores_of(cache)
        found = []
        for start in range(0, len(guids), _AT_ONCE):
            some = guids[start : start + _AT_ONCE]
            states = {store.tower: store.states(some, keep=False) for store in stores}
            features = cache.features(some, self.needs_tokens, max_bytes=max_bytes)
            found.append(self.finite(some, self.logits(StateRows(features, states), stores[0].source)))
        return np.concatenate(found)

    def of_pairs(
        self,
        pairs: Sequence[Pair],
        backbone: dict[str, Any],
        cache: FeatureCache | None,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Scored]:
        """Yield the logits of raw pairs. Embeddings of a frozen tower come from ``cache`` where it has the bytes."""
        place = f"{backbone['name']}@{backbone['revision']}"
        if place not in self._sources:
            self._sources[place] = Source(self.checkpoint.identity, backbone, self.device)
        source = self._sources[place]
        for start in range(0, len(pairs), _AT_ONCE):
            guids, rows, rejects = self._read(pairs[start : start + _AT_ONCE], source, cache)
            none = np.zeros((0, len(self.checkpoint.classes)), np.float32)
            yield Scored(guids, self.finite(guids, self.logits(rows, source)) if guids else none, rejects)
            if on_progress is not None:
                on_progress(min(start + _AT_ONCE, len(pairs)), len(pairs))

    def _read(
        self, pairs: Sequence[Pair], source: Source, cache: FeatureCache | None
    ) -> tuple[list[str], StateRows, list[Reject]]:
        seen = tuple(tower for tower in TOWERS if self.checkpoint.recipe.modality in ("both", tower))
        frozen = tuple(tower for tower in seen if tower not in self.layers)
        found = _Columns()
        if frozen:
            known: list[str] = []
            if cache is not None and (cache.has_tokens or not self.needs_tokens):
                known = same_as_cached(pairs, cache)
                found.add_features(known, cache.features(known, self.needs_tokens), frozen)
            there = set(known)
            others = [pair for pair in pairs if pair.guid not in there]
            if others:
                found.add(self._encoded(others, source, towers=frozen, tokens=self.needs_tokens))
        blocks = {}
        for tower, count in self.layers.items():
            blocks[tower] = self._encoded(pairs, source, towers=(tower,), below=count)
            found.rejects |= {reject.guid: reject for reject in blocks[tower][1]}
        guids = [pair.guid for pair in pairs if pair.guid not in found.rejects]
        states = {}
        for tower, (block, _) in blocks.items():
            row_of = {guid: row for row, guid in enumerate(block.guids)}
            places = np.array([(0, row_of[guid]) for guid in guids], dtype=np.int64).reshape(-1, 2)
            states[tower] = States([Part.of_block(block)], places) if guids else States([], places)
        features = found.features(guids, self.checkpoint.sizes, self.needs_tokens)
        return guids, StateRows(features, states), list(found.rejects.values())

    def _encoded(self, pairs: Sequence[Pair], source: Source, **how: Any) -> tuple[Block, list[Reject]]:
        return next(encode_blocks([pairs], source.encoder(), how_of(self.checkpoint.identity, **how)))


@dataclass
class _Columns:
    """What was found of some pairs for the towers that stay frozen, by guid; zeros stand for the others."""

    image: dict[str, NDArray[Any]] = field(default_factory=dict)
    text: dict[str, NDArray[Any]] = field(default_factory=dict)
    image_tokens: dict[str, NDArray[Any]] = field(default_factory=dict)
    text_tokens: dict[str, NDArray[Any]] = field(default_factory=dict)
    rejects: dict[str, Reject] = field(default_factory=dict)

    def add(self, found: tuple[Block, list[Reject]]) -> None:
        block, rejects = found
        self.rejects |= {reject.guid: reject for reject in rejects}
        for name in ("image", "text", "image_tokens"):
            if name in block.columns:
                getattr(self, name).update(zip(block.guids, block.columns[name], strict=True))
        if block.text_tokens is not None:
            self.text_tokens |= zip(block.guids, block.text_tokens, strict=True)

    def add_features(self, guids: Sequence[str], features: Features, towers: Sequence[str]) -> None:
        for tower in towers:
            getattr(self, tower).update(zip(guids, getattr(features, tower), strict=True))
        if isinstance(features.tokens, Tokens):
            tokens = features.tokens
            for guid, row in zip(guids, tokens.rows.tolist(), strict=True):
                if "image" in towers:
                    self.image_tokens[guid] = tokens.image[row]
                if "text" in towers:
                    self.text_tokens[guid] = tokens.text[tokens.offsets[row] : tokens.offsets[row + 1]]

    def features(self, guids: Sequence[str], sizes: Any, with_tokens: bool) -> Features:
        image, text = (
            np.array([found.get(guid, np.zeros(size)) for guid in guids], dtype=np.float32).reshape(-1, size)
            for found, size in ((self.image, sizes.image), (self.text, sizes.text))
        )
        if not with_tokens:
            return Features(image, text)
        no_image, no_text = np.zeros((1, sizes.image_tokens)), np.zeros((0, sizes.text_tokens))
        texts = [self.text_tokens.get(guid, no_text).astype(np.float16) for guid in guids]
        images = np.array([self.image_tokens.get(guid, no_image) for guid in guids], dtype=np.float16)
        joined = np.concatenate([no_text.astype(np.float16), *texts])
        return Features(image, text, Tokens(images, joined, text_offsets(texts), np.arange(len(guids))))
