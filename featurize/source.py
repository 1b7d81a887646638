"""The backbone and the raw pairs of a cache, for prediction and stage 2. Each is opened on first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import BackboneError, DataError
from ..cache.features import Features, Tokens, text_offsets
from ..cache.parts import Block
from ..cache.schema import describe_difference, fingerprint_of
from ..cache.store import FeatureCache
from .backbones.base import Backbone, Encoder
from .backbones.opening import open_backbone
from .backbones.towers import Top, check_layers
from .encode import OnProgress, chunked, encode_blocks
from .identity import EncodeOptions, identity_of, is_cleaned
from .pairs.dataset import Dataset
from .pairs.hashing import SIDES, Reject, compare_rows
from .pairs.pair import Pair
from .plan import BLOCK_ROWS


@dataclass(frozen=True)
class EmbeddedPairs:
    """Features of some of the requested pairs, and those that could not be read."""

    guids: list[str]
    features: Features
    rejects: list[Reject]


class Source:
    """The backbone that made features of ``identity``, and the raw pairs (for both, see ``cache.schema.Header``).

    ``backbone``, ``{"name", "revision"}``, and ``data`` say where these are now. Default of ``data``: as in the cache.
    """

    def __init__(
        self, identity: dict[str, Any], backbone: dict[str, Any], device: str = "cpu", data: str | Path | None = None
    ) -> None:
        self.identity, self.place, self.device, self.data = identity, backbone, device, data
        self._backbone: Backbone | None = None
        self._encoders: dict[str, Encoder] = {}
        self._datasets: dict[str, Dataset] = {}

    def encoder(self, dtype: str | None = None) -> Encoder:
        """Return the loaded backbone, in the precision of the features or in ``dtype``.

        Raise a BackboneError if it cannot be opened, or is a different one.
        """
        dtype = dtype or self.identity["dtype"]
        if dtype not in self._encoders:
            if self._backbone is None:
                self._backbone = self._open_same()
            self._encoders[dtype] = self._backbone.load(self.device, dtype, self.identity["image"]["resize"])
        return self._encoders[dtype]

    def _open_same(self) -> Backbone:
        backbone = open_backbone(self.place["name"], self.place["revision"])
        identity = self.identity
        text, image = identity["text"], identity["image"]
        here = identity_of(backbone, identity["dtype"], is_cleaned(identity), image["resize"], text.get("encoding"))
        if fingerprint_of(here) != fingerprint_of(identity):
            raise BackboneError(
                f"{self.place['name']} is not the backbone that the head was trained with ("
                + "; ".join(describe_difference(here, identity))
                + "): give the folder of the right backbone with --backbone"
            )
        return backbone

    def layer_counts(self, layers: Mapping[str, int]) -> dict[str, int]:
        """Return the number of unfrozen layers by tower; a negative number means all layers.

        Raise a BackboneError if a tower has fewer layers.
        """
        encoder = self.encoder("float32")
        counts = {}
        for tower, count in layers.items():
            present = encoder.text_layers() if tower == "text" else encoder.vision_layers()
            counts[tower] = len(present) if count < 0 else count
            check_layers(present, counts[tower], tower)
        return counts

    def tops(self, layers: Mapping[str, int]) -> dict[str, Top]:
        """Return the last layers of each tower, in float32; copy them before training."""
        encoder = self.encoder("float32")
        cutters = {"text": encoder.text_top, "image": encoder.image_top}
        tops = {tower: cutters[tower](count) for tower, count in layers.items()}
        if self.identity["dtype"] != "float32":
            del self._encoders["float32"]  # large, and not used for anything else
        return tops

    def forget(self) -> None:
        """Release the loaded backbone."""
        self._encoders.clear()

    def dataset(self, cache: FeatureCache) -> Dataset:
        """Return the raw pairs of ``cache``."""
        place = str(self.data or cache.header.dataset["data"])
        _check_exists(place)
        if place not in self._datasets:
            self._datasets[place] = Dataset.recorded(cache.header.dataset, place)
        return self._datasets[place]

    def embed(
        self,
        pairs: Sequence[Pair],
        cache: FeatureCache | None = None,
        tokens: bool = False,
        sides: tuple[str, ...] = SIDES,
        on_progress: OnProgress | None = None,
    ) -> Iterator[EmbeddedPairs]:
        """Yield the features of raw pairs, one block at a time; ``on_progress`` counts the pairs that are encoded.

        Rows whose raw bytes have not changed are taken first, from ``cache``, a cache with the same fingerprint. It is
        not used if ``tokens`` are needed and it has none. Of other pairs only the ``sides`` are read and encoded; the
        embeddings of another side are (n, 0).
        """
        cached_guids: list[str] = []
        if cache is not None and (cache.has_tokens or not tokens):
            cached_guids = _same_as_cached(pairs, cache)
            for guids in chunked(cached_guids, BLOCK_ROWS):
                yield EmbeddedPairs(list(guids), cache.features(guids, tokens), [])
        cached_set = set(cached_guids)
        missing = [pair for pair in pairs if pair.guid not in cached_set]
        if missing:
            options = EncodeOptions.for_identity(self.identity, sides, tokens)
            blocks = list(chunked(missing, BLOCK_ROWS))
            for block, rejects in encode_blocks(blocks, self.encoder(), options, on_progress):
                yield EmbeddedPairs(block.guids, _features_of(block), rejects)


def _check_exists(data: str | Path) -> None:
    if not Path(data).exists():
        raise DataError(f"no such folder or manifest: {data}: give the path of the raw pairs with --data")


def _same_as_cached(pairs: Sequence[Pair], cache: FeatureCache) -> list[str]:
    """Return the guids of the pairs whose raw bytes are those that ``cache`` was made from."""
    in_cache = [pair for pair in pairs if pair.guid in cache]
    valid = compare_rows(cache, cache.rows([pair.guid for pair in in_cache]), in_cache).valid
    return [pair.guid for pair, is_valid in zip(in_cache, valid.tolist(), strict=True) if is_valid]


def _features_of(block: Block) -> Features:
    """Return the features that a head can use from a block."""
    nothing = np.zeros((len(block.guids), 0), np.float32)
    image, text = (block.columns.get(side, nothing).astype(np.float32) for side in SIDES)
    if not block.text_tokens:
        return Features(image, text)
    joined, offsets = np.concatenate(block.text_tokens), text_offsets(block.text_tokens)
    return Features(image, text, Tokens(block.columns["image_tokens"], joined, offsets, np.arange(len(block.guids))))
