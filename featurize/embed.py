"""Embeddings of given pairs, for prediction: from the cache where it has them, encoded where it has not."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import BackboneError
from ..cache.schema import describe_difference, fingerprint_of
from ..cache.store import FeatureCache
from .dataset import Pair
from .encode import How, Reject, encode_blocks
from .loading import choose_device, open_backbone
from .pipeline import BLOCK_ROWS, identity_of

Embeddings = tuple[NDArray[np.float32], NDArray[np.float32]]


def embed_pairs(
    pairs: Sequence[Pair],
    identity: dict[str, Any],
    backbone: dict[str, Any],
    cache: FeatureCache | None = None,
    device: str = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], Embeddings, list[Reject]]:
    """Return embeddings of ``pairs`` as ``identity`` says, in the same order, without those that cannot be read.

    Parameters
    ----------
    pairs
        Raw pairs.
    identity, backbone
        Of the features that a head was trained on.
    cache
        Rows whose raw bytes are the same are taken from it. Its fingerprint must be that of ``identity``.
    device
        For encoding.
    on_progress
        Called with (pairs encoded, pairs to encode).

    Returns
    -------
    guids, (image, text), rejects
        image and text (n, d) float32.

    Raises
    ------
    BackboneError
        The backbone cannot be had, or is not the one of ``identity``.
    """
    found: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]] = {}
    if cache is not None:
        known = [pair for pair in pairs if pair.guid in cache]
        stored = cache.digests()
        same = [pair.guid for pair in known if pair.digests() == stored[cache.row_of[pair.guid]]]
        found = {guid: (image, text) for guid, image, text in zip(same, *cache.embeddings(same), strict=True)}
    missing = [pair for pair in pairs if pair.guid not in found]
    rejects: list[Reject] = []
    if missing:
        for guids, images, texts, rejected in _encode(missing, identity, backbone, device, on_progress):
            found |= {guid: (image, text) for guid, image, text in zip(guids, images, texts, strict=True)}
            rejects += rejected
    kept = [pair.guid for pair in pairs if pair.guid in found]
    if not kept:
        return [], (np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)), rejects
    image, text = (np.stack([found[guid][side] for guid in kept]) for side in (0, 1))
    return kept, (image, text), rejects


def _encode(
    pairs: Sequence[Pair],
    identity: dict[str, Any],
    backbone: dict[str, Any],
    device: str,
    on_progress: Callable[[int, int], None] | None,
) -> Any:
    source = open_backbone(backbone["name"], backbone["revision"])
    resize, clean = identity["image"]["resize"], identity["text"]["cleaning"] > 0
    here = identity_of(source, identity["dtype"], clean, resize)
    if fingerprint_of(here) != fingerprint_of(identity):
        raise BackboneError(
            f"{backbone['name']} is not the backbone that the head was trained with ("
            + "; ".join(describe_difference(here, identity))
            + "): give the folder of the right one with --backbone"
        )
    encoder = source.load(choose_device(device), identity["dtype"], resize)
    how = How(clean=clean, store=np.float16 if identity["dtype"] == "bfloat16" else np.float32)
    blocks = [pairs[start : start + BLOCK_ROWS] for start in range(0, len(pairs), BLOCK_ROWS)]
    for block, rejects in encode_blocks(blocks, encoder, how, on_progress):
        image, text = (block.columns[name].astype(np.float32) for name in ("image", "text"))
        yield block.guids, image, text, rejects
