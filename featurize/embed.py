"""Features of given pairs, for prediction: from the cache where it has them, encoded where it has not."""

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
from .encode import How, encode_blocks
from .identity import identity_of, is_cleaned
from .pairs.hashing import Reject, compare
from .pairs.pair import Pair
from .plan import BLOCK_ROWS


@dataclass(frozen=True)
class Embedded:
    """Features of some of the pairs asked for, and those that could not be read."""

    guids: list[str]
    features: Features
    rejects: list[Reject]


def embed_pairs(
    pairs: Sequence[Pair],
    identity: dict[str, Any],
    load: Callable[[], Encoder],
    cache: FeatureCache | None = None,
    tokens: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[Embedded]:
    """Yield the features of ``pairs`` as ``identity`` says, a block at a time: cached ones first.

    Parameters
    ----------
    pairs
        Raw pairs.
    identity
        Of the features that a head was trained on.
    load
        Returns the encoder of ``identity`` (see ``open_same``); called only where something has to be encoded.
    cache
        Rows whose raw bytes are the same are taken from it. Its fingerprint must be that of ``identity``.
    tokens
        Whether token states are wanted; a cache without them is then not looked at.
    on_progress
        Called with (pairs encoded, pairs to encode).
    """
    same: list[str] = []
    if cache is not None and (cache.has_tokens or not tokens):
        same = same_as_cached(pairs, cache)
        for guids in _blocks(same):
            yield Embedded(guids, cache.features(guids, tokens), [])
    there = set(same)
    missing = [pair for pair in pairs if pair.guid not in there]
    if missing:
        yield from _encode(missing, identity, load(), tokens, on_progress)


def same_as_cached(pairs: Sequence[Pair], cache: FeatureCache) -> list[str]:
    """Return the guids of the pairs whose raw bytes are those that ``cache`` was made from."""
    known = [pair for pair in pairs if pair.guid in cache]
    same = compare(cache, cache.rows([pair.guid for pair in known]), known, is_earlier=False).same
    return [pair.guid for pair, is_same in zip(known, same.tolist(), strict=True) if is_same]


def _blocks(items: list[Any]) -> list[list[Any]]:
    return [items[start : start + BLOCK_ROWS] for start in range(0, len(items), BLOCK_ROWS)]


def _encode(
    pairs: list[Pair],
    identity: dict[str, Any],
    encoder: Encoder,
    tokens: bool,
    on_progress: Callable[[int, int], None] | None,
) -> Iterator[Embedded]:
    for block, rejects in encode_blocks(_blocks(pairs), encoder, how_of(identity, tokens=tokens), on_progress):
        yield Embedded(block.guids, features_of(block), rejects)


def open_same(identity: dict[str, Any], backbone: dict[str, Any]) -> Backbone:
    """Open the backbone that features of ``identity`` were made with; ``backbone`` says where it is.

    Raises
    ------
    BackboneError
        It cannot be had, or what is there is another one.
    """
    source = open_backbone(backbone["name"], backbone["revision"])
    text, image = identity["text"], identity["image"]
    here = identity_of(source, identity["dtype"], is_cleaned(identity), image["resize"], text.get("encoding"))
    if fingerprint_of(here) != fingerprint_of(identity):
        raise BackboneError(
            f"{backbone['name']} is not the backbone that the head was trained with ("
            + "; ".join(describe_difference(here, identity))
            + "): give the folder of the right one with --backbone"
        )
    return source


def how_of(identity: dict[str, Any], **more: Any) -> How:
    """Return how pairs are encoded for features of ``identity``."""
    store = np.float16 if identity["dtype"] == "bfloat16" else np.float32
    return How(clean=is_cleaned(identity), encoding=identity["text"].get("encoding"), store=store, **more)


def features_of(block: Block) -> Features:
    """Return what a head may look at of the rows of a block."""
    image, text = (block.columns[name].astype(np.float32) for name in ("image", "text"))
    if not block.text_tokens:
        return Features(image, text)
    joined, offsets = np.concatenate(block.text_tokens), text_offsets(block.text_tokens)
    return Features(image, text, Tokens(block.columns["image_tokens"], joined, offsets, np.arange(len(block.guids))))
