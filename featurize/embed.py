"""Features of given pairs, for prediction: taken from a cache if it has them, else encoded."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cache.errors import BackboneError
from ..cache.features import Features, Tokens, text_offsets
from ..cache.parts import Block
from ..cache.schema import describe_difference, fingerprint_of
from ..cache.store import FeatureCache
from .backbones.base import Backbone, Encoder
from .backbones.opening import open_backbone
from .encode import OnProgress, encode_blocks
from .encode_options import EncodeOptions
from .identity import identity_of, is_cleaned
from .pairs.changes import compare_rows
from .pairs.hashing import Reject
from .pairs.pair import Pair
from .plan import BLOCK_ROWS


@dataclass(frozen=True)
class EmbeddedPairs:
    """Features of some of the requested pairs, and those that could not be read."""

    guids: list[str]
    features: Features
    rejects: list[Reject]


def embed_pairs(
    pairs: Sequence[Pair],
    identity: dict[str, Any],
    load: Callable[[], Encoder],
    cache: FeatureCache | None = None,
    tokens: bool = False,
    on_progress: OnProgress | None = None,
) -> Iterator[EmbeddedPairs]:
    """Yield the features of ``pairs``, one block at a time, those from the cache first.

    Parameters
    ----------
    pairs
        Raw pairs.
    identity
        Identity of the features that the head was trained on.
    load
        Returns the encoder for ``identity`` (see ``open_same``). Called only if a pair must be encoded.
    cache
        A cache with the fingerprint of ``identity``. Rows whose raw bytes have not changed are taken from it.
    tokens
        Whether token states are needed. If so, a cache without them is not used.
    on_progress
        Called with (pairs encoded, pairs to encode).
    """
    cached_guids: list[str] = []
    if cache is not None and (cache.has_tokens or not tokens):
        cached_guids = same_as_cached(pairs, cache)
        for guids in _blocks(cached_guids):
            yield EmbeddedPairs(guids, cache.features(guids, tokens), [])
    cached_set = set(cached_guids)
    missing = [pair for pair in pairs if pair.guid not in cached_set]
    if missing:
        options = EncodeOptions.for_identity(identity, tokens=tokens)
        for block, rejects in encode_blocks(_blocks(missing), load(), options, on_progress):
            yield EmbeddedPairs(block.guids, features_of(block), rejects)


def same_as_cached(pairs: Sequence[Pair], cache: FeatureCache) -> list[str]:
    """Return the guids of the pairs whose raw bytes are those that ``cache`` was made from."""
    in_cache = [pair for pair in pairs if pair.guid in cache]
    same = compare_rows(cache, cache.rows([pair.guid for pair in in_cache]), in_cache).same
    return [pair.guid for pair, is_same in zip(in_cache, same.tolist(), strict=True) if is_same]


def _blocks(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + BLOCK_ROWS] for start in range(0, len(items), BLOCK_ROWS)]


def open_same(identity: dict[str, Any], backbone: dict[str, Any]) -> Backbone:
    """Open the backbone that made features of ``identity``; ``backbone`` says where it is.

    Raises
    ------
    BackboneError
        The backbone cannot be opened, or is a different one.
    """
    source = open_backbone(backbone["name"], backbone["revision"])
    text, image = identity["text"], identity["image"]
    here = identity_of(source, identity["dtype"], is_cleaned(identity), image["resize"], text.get("encoding"))
    if fingerprint_of(here) != fingerprint_of(identity):
        raise BackboneError(
            f"{backbone['name']} is not the backbone that the head was trained with ("
            + "; ".join(describe_difference(here, identity))
            + "): give the folder of the right backbone with --backbone"
        )
    return source


def features_of(block: Block) -> Features:
    """Return the features that a head can use from a block."""
    image, text = (block.columns[name].astype(np.float32) for name in ("image", "text"))
    if not block.text_tokens:
        return Features(image, text)
    joined, offsets = np.concatenate(block.text_tokens), text_offsets(block.text_tokens)
    return Features(image, text, Tokens(block.columns["image_tokens"], joined, offsets, np.arange(len(block.guids))))
