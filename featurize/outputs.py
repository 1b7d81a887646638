"""What a tower gives for an image or a text: computed for a batch in the thread that calls, or found on disk."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import DataError
from ..cache.parts import OpenCaches
from .backbones.base import Encoder
from .identity import VIEW_SEED, EncodeOptions
from .pairs.hashing import SIDES, Reject, digest_column, reject_pair
from .pairs.image import augment, decode_image
from .pairs.pair import Pair

TowerOutput = dict[str, Any]  # what a tower returned for one image or text, by column of the cache file

_COLUMNS = {"image": ("image", "image_tokens"), "text": ("text", "row/truncated")}


@dataclass(frozen=True)
class ImageRequest:
    """An image to encode, with its views.

    ``digest`` is the sha256 of its bytes when they were hashed. With ``views_only``, another pair provides the
    embedding of the same image.
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
    prepared = [_prepare(encoder, options, request) for request in requests]
    outputs = iter(_encode_pixels(encoder, options, [image for pixels, _ in prepared for image in pixels]))
    encoded = []
    for request, (pixels, reject) in zip(requests, prepared, strict=True):
        own = [next(outputs) for _ in pixels]
        output = own.pop(0) if own and not request.views_only else None
        encoded.append(EncodedImage(output, [view["image"] for view in own], reject))
    return encoded


def _prepare(
    encoder: Encoder, options: EncodeOptions, request: ImageRequest
) -> tuple[list[NDArray[np.float32]], Reject | None]:
    """Return the pixels of an image (unless ``views_only``) and of its views, as far as they can be prepared."""
    pixels: list[NDArray[np.float32]] = []
    try:
        raw = request.pair.read_image()
        if hashlib.sha256(raw).digest() != request.digest:  # its copies would get the embedding of another image
            raise DataError("the image changed while it was read: run the same command again")
        image = decode_image(raw)
        if not request.views_only:
            pixels.append(encoder.prepare_image(image))
        for view in range(options.views):
            pixels.append(encoder.prepare_image(augment(image, VIEW_SEED, request.pair.guid, view)))
    except DataError as error:
        return pixels, reject_pair(request.pair, str(error))
    except Exception as error:  # one odd image must not end the work on 100,000
        return pixels, reject_pair(request.pair, f"image cannot be prepared: {error}")
    return pixels, None


def _encode_pixels(
    encoder: Encoder, options: EncodeOptions, pixels: Sequence[NDArray[np.float32]]
) -> list[TowerOutput]:
    if not pixels:
        return []
    batch = np.stack(pixels)
    if options.below:
        return [{"image_tokens": states} for states in encoder.images_below(batch, options.below)]
    encoded = encoder.encode_images(batch, options.tokens)
    outputs: list[TowerOutput] = [{"image": embedding} for embedding in encoded.pooled.astype(options.dtype)]
    for output, states in zip(outputs, encoded.tokens or [], strict=options.tokens):
        output["image_tokens"] = states
    return outputs


def encode_texts(
    encoder: Encoder, options: EncodeOptions, ids: Sequence[Sequence[int]], truncated: Sequence[bool]
) -> list[TowerOutput]:
    """Encode a batch of token lists; ``truncated`` says which were cut to the model's length."""
    outputs: list[TowerOutput] = [{"row/truncated": was_cut} for was_cut in truncated]
    if options.below:
        for output, text_ids, states in zip(outputs, ids, encoder.texts_below(ids, options.below), strict=True):
            output["text_tokens"] = states
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


def is_sound(output: TowerOutput, tower: str) -> bool:
    """Whether the numbers of an output are finite and its embedding is not all zero."""
    numbers = [output[name] for name in (tower, f"{tower}_tokens") if name in output]
    return all(np.isfinite(values).all() for values in numbers) and (tower not in output or bool(output[tower].any()))


class EmbeddingIndex:
    """Finds outputs in cache files and parts by the digest of the image or text that they were made from.

    It takes 16 bytes of memory per row and tower. If texts are cleaned (``clean``), texts that are equal after cleaning
    share an embedding.
    """

    def __init__(self, clean: bool) -> None:
        self._column = {tower: digest_column(tower, clean) for tower in SIDES}
        self._places = {tower: _Places() for tower in SIDES}
        self._paths: list[Path] = []
        self._open = OpenCaches()

    def close(self) -> None:
        """Close the files."""
        self._open.close()

    def add(self, path: Path, usable: Mapping[str, NDArray[np.bool_]] | None = None) -> None:
        """Add the rows of a file that are ``usable``, (N,) bool by tower; default: all. The file must not change."""
        cache = self._open.get(path)
        for tower, column in self._column.items():
            rows = np.arange(len(cache)) if usable is None else np.flatnonzero(usable[tower])
            places = (np.uint64(len(self._paths)) << np.uint64(32)) | rows.astype(np.uint64)
            self._places[tower].add(_key(cache.read(column, rows)), places)
        self._paths.append(path)

    def find(self, tower: str, digest: bytes) -> TowerOutput | None:
        """Return the output of ``tower`` for the image or text with this digest, or None if it is not on disk."""
        place = self._places[tower].find(_key(np.frombuffer(digest, np.uint8)[None])[0])
        if place is None:
            return None
        cache, row = self._open.get(self._paths[place >> 32]), place & 0xFFFFFFFF
        rows = np.array([row])
        if cache.read(self._column[tower], rows).tobytes() != digest:
            return None  # only the first eight bytes are equal
        output = {name: cache.read(name, rows)[0] for name in _COLUMNS[tower] if name in cache.file}
        if not is_sound({tower: output[tower]}, tower):
            return None  # damaged
        if tower == "text" and cache.has_tokens:
            output["text_tokens"] = cache.text_tokens(row)
        return output


class _Places:
    """Where each key is: two sorted arrays."""

    def __init__(self) -> None:
        self.keys = np.empty(0, np.uint64)
        self.places = np.empty(0, np.uint64)

    def add(self, keys: NDArray[np.uint64], places: NDArray[np.uint64]) -> None:
        order = np.argsort(keys, kind="stable")
        positions = np.searchsorted(self.keys, keys[order])
        self.keys = np.insert(self.keys, positions, keys[order])
        self.places = np.insert(self.places, positions, places[order])

    def find(self, key: np.uint64) -> int | None:
        position = int(np.searchsorted(self.keys, key))
        return int(self.places[position]) if position < len(self.keys) and self.keys[position] == key else None


def _key(digests: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the first eight bytes of each digest, (n, 32), as a number."""
    keys: NDArray[np.uint64] = np.ascontiguousarray(digests[:, :8]).view(np.uint64)[:, 0]
    return keys
