"""One batch of images or texts through its tower, in the thread that calls."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import DataError
from .backbones.base import Encoder
from .encode_options import EncodeOptions
from .identity import VIEW_SEED
from .index import TowerOutput
from .pairs.hashing import Reject, reject_pair
from .pairs.image import augment, decode_image
from .pairs.pair import Pair


@dataclass(frozen=True)
class ImageRequest:
    """An image to encode, with its views.

    Attributes
    ----------
    digest
        sha256 of the image bytes when they were hashed.
    views_only
        Whether only the views are needed, because another pair provides the embedding of the same image.
    """

    pair: Pair
    digest: bytes
    views_only: bool


@dataclass(frozen=True)
class EncodedImage:
    """What became of an ``ImageRequest``: the image's output (unless ``views_only``), its views, or a reject."""

    output: TowerOutput | None
    views: list[NDArray[Any]]
    reject: Reject | None


def encode_images(encoder: Encoder, options: EncodeOptions, requests: Sequence[ImageRequest]) -> list[EncodedImage]:
    """Read, decode and encode a batch of images with their views.

    If a view fails, the pair is rejected, but the output of its image is still returned: copies use it.
    """
    pixels: list[list[NDArray[np.float32]]] = []  # of each request: the image first (unless views_only), then views
    rejects: list[Reject | None] = []
    for request in requests:
        prepared: list[NDArray[np.float32]] = []
        reason = None
        try:
            for image in _prepare(encoder, options, request):
                prepared.append(image)
        except DataError as error:
            reason = str(error)
        except Exception as error:  # one odd image must not end the work on 100,000
            reason = f"image cannot be prepared: {error}"
        pixels.append(prepared)
        rejects.append(None if reason is None else reject_pair(request.pair, reason))
    outputs = _encode_pixels(encoder, options, [image for prepared in pixels for image in prepared])
    encoded = []
    for request, prepared, reject in zip(requests, pixels, rejects, strict=True):
        own = [next(outputs) for _ in prepared]
        output = own.pop(0) if own and not request.views_only else None
        encoded.append(EncodedImage(output, [view["image"] for view in own], reject))
    return encoded


def _prepare(encoder: Encoder, options: EncodeOptions, request: ImageRequest) -> Iterator[NDArray[np.float32]]:
    """Yield the pixels of an image (unless ``views_only``), then of its views."""
    raw = request.pair.read_image()
    if hashlib.sha256(raw).digest() != request.digest:  # its copies would get the embedding of another image
        raise DataError("the image changed while it was read: run the same command again")
    image = decode_image(raw)
    if not request.views_only:
        yield encoder.prepare_image(image)
    for view in range(options.views):
        yield encoder.prepare_image(augment(image, VIEW_SEED, request.pair.guid, view))


def _encode_pixels(
    encoder: Encoder, options: EncodeOptions, pixels: Sequence[NDArray[np.float32]]
) -> Iterator[TowerOutput]:
    if not pixels:
        return
    batch = np.stack(pixels)
    if options.below:
        for states in clip_to_range(encoder.images_below(batch, options.below), options.dtype):
            yield {"image_tokens": states}
        return
    encoded = encoder.encode_images(batch, options.tokens)
    outputs: list[TowerOutput] = [{"image": embedding} for embedding in encoded.pooled.astype(options.dtype)]
    for output, states in zip(outputs, encoded.tokens or [], strict=options.tokens):
        output["image_tokens"] = states
    yield from outputs


def encode_texts(
    encoder: Encoder, options: EncodeOptions, ids: Sequence[Sequence[int]], truncated: Sequence[bool]
) -> list[TowerOutput]:
    """Encode a batch of token lists; ``truncated`` says which were cut to the model's length."""
    outputs: list[TowerOutput] = [{"row/truncated": was_cut} for was_cut in truncated]
    if options.below:
        for output, text_ids, states in zip(outputs, ids, encoder.texts_below(ids, options.below), strict=True):
            output["text_tokens"] = clip_to_range(states, options.dtype)
            # SigLIP attends to padding too, so it has more states than ids. Repeat the end token for these.
            padding = [text_ids[-1]] * (len(states) - len(text_ids))
            output["text_ids"] = np.array([*text_ids, *padding], dtype=np.int32)
        return outputs
    encoded = encoder.encode_texts(ids, options.tokens)
    for output, embedding in zip(outputs, encoded.pooled.astype(options.dtype), strict=True):
        output["text"] = embedding
    for output, tokens in zip(outputs, encoded.tokens or [], strict=options.tokens):
        output["text_tokens"] = tokens
    return outputs


def cut_into_batches(positions: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield ``positions`` in batches of ``size``."""
    return (positions[start : start + size] for start in range(0, len(positions), size))


def cut_into_text_batches(ids: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Yield positions of texts in order of length, so that each padded batch has at most ``max_tokens`` tokens."""
    batch: list[int] = []
    for position in sorted(range(len(ids)), key=lambda position: len(ids[position])):
        if batch and (len(batch) + 1) * len(ids[position]) > max_tokens:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def is_sound(output: TowerOutput, tower: str) -> bool:
    """Whether the numbers of an output are finite and its embedding is not all zero."""
    numbers = [output[name] for name in (tower, f"{tower}_tokens") if name in output]
    return all(np.isfinite(values).all() for values in numbers) and (tower not in output or bool(output[tower].any()))


def clip_to_range(states: NDArray[np.float32], dtype: Any) -> NDArray[Any]:
    """Convert ``states`` to ``dtype``. Finite numbers beyond its range become its largest or smallest number."""
    limits = np.finfo(dtype)
    return np.where(np.isinf(states), states, np.clip(states, limits.min, limits.max)).astype(dtype)
