"""From raw pairs to blocks of embeddings: reading in threads, encoding in batches, bad pairs set aside."""

import contextlib
import hashlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from ..cache.errors import DataError
from ..cache.features import finite_rows
from ..cache.parts import Block
from .backbone import Encoder
from .dataset import Pair
from .image import augment, decode_image
from .text import clean_text, decode_text

VIEW_SEED = 0
TOWERS = ("image", "text")


@dataclass(frozen=True)
class Reject:
    """A pair that was left out, and why."""

    guid: str
    reason: str
    path: str


@dataclass(frozen=True)
class How:
    """What decides what is computed for a pair, beside the encoder.

    Attributes
    ----------
    clean
        Whether texts are cleaned.
    views
        Augmented views per image.
    tokens
        Whether last hidden states are kept.
    store
        dtype of stored embeddings.
    batch_size
        Images, or texts, per call of the encoder.
    towers
        Which are run; of a pair, only what they look at is read.
    below
        Layers at the top of the towers that are left out: what enters them is kept (``image_tokens``, ``text_tokens``
        in ``store``, and ``text_ids``) instead of embeddings. 0: the towers are run to their end.
    """

    clean: bool = True
    views: int = 0
    tokens: bool = False
    store: type[np.float16] | type[np.float32] = np.float32
    batch_size: int = 64
    towers: tuple[str, ...] = TOWERS
    below: int = 0


@dataclass
class _Loaded:
    """A pair that was read; of a side that no tower looks at, there is nothing."""

    pair: Pair
    pixels: NDArray[np.float32]  # (1 + views, 3, H, W)
    text: str = ""
    codec: str = ""
    digests: dict[str, bytes] = field(default_factory=dict)  # by column


def load_text(raw: bytes, clean: bool) -> tuple[str, str]:
    """Return (the text that the backbone sees, codec)."""
    text, codec = decode_text(raw)
    return (clean_text(text) if clean else text.strip()), codec


def read_pair(pair: Pair, towers: tuple[str, ...] = TOWERS) -> tuple[bytes, bytes, Image | None] | Reject:
    """Return (image bytes, text bytes, decoded image) as far as ``towers`` look at them, or why that cannot be done."""
    try:
        if pair.problem is not None:
            raise DataError(pair.problem)
        raw_image = pair.read_image() if "image" in towers else b""
        raw_text = pair.read_text() if "text" in towers else b""
        return raw_image, raw_text, decode_image(raw_image) if "image" in towers else None
    except DataError as error:
        return Reject(pair.guid, str(error), pair.image or pair.text_path or "")


def _load(pair: Pair, encoder: Encoder, how: How) -> _Loaded | Reject:
    read = read_pair(pair, how.towers)
    if isinstance(read, Reject):
        return read
    raw_image, raw_text, image = read
    loaded = _Loaded(pair, np.zeros((0, 0), np.float32))
    if image is not None:
        try:
            views = [image, *(augment(image, VIEW_SEED, pair.guid, view) for view in range(how.views))]
            loaded.pixels = np.stack([encoder.prepare_image(view) for view in views])
        except Exception as error:  # one odd image must not end the work on 100,000
            return Reject(pair.guid, f"image cannot be prepared: {error}", pair.image or "")
        loaded.digests["row/image_sha256"] = hashlib.sha256(raw_image).digest()
    if "text" in how.towers:
        loaded.text, loaded.codec = load_text(raw_text, how.clean)
        loaded.digests["row/text_sha256"] = hashlib.sha256(raw_text).digest()
        loaded.digests["row/cleaned_sha256"] = hashlib.sha256(clean_text(loaded.text).encode()).digest()
    return loaded


def prefetch(function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Generator[Any, None, None]:
    """Map in threads, in order, at most ``ahead`` results waiting."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def encode_blocks(
    blocks: Sequence[Sequence[Pair]],
    encoder: Encoder,
    how: How,
    on_progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[Block, list[Reject]]]:
    """Encode each block of pairs, in order.

    What a row holds depends on its block alone, so a block computed again after a crash gives the same bits.

    Parameters
    ----------
    blocks
        Pairs to encode together.
    encoder, how
        What computes, and what is computed.
    on_progress
        Called with (pairs that came through, pairs to do).

    Yields
    ------
    block, rejects
        The block's rows, without those that were rejected.
    """
    total, done = sum(len(block) for block in blocks), 0

    def on_pairs(count: int) -> None:
        nonlocal done
        done += count
        if on_progress is not None:
            on_progress(done, total)

    loaded = prefetch(
        lambda pair: _load(pair, encoder, how), (pair for block in blocks for pair in block), 2 * how.batch_size
    )
    with warnings.catch_warnings(), contextlib.closing(loaded):
        warnings.simplefilter("ignore")  # Pillow's on odd but readable images
        for pairs in blocks:
            yield _encode_block((next(loaded) for _ in pairs), encoder, how, on_pairs)


def _encode_block(
    loaded: Iterator[_Loaded | Reject], encoder: Encoder, how: How, on_pairs: Callable[[int], None]
) -> tuple[Block, list[Reject]]:
    rejects: list[Reject] = []
    rows: list[_Loaded] = []
    images = _ImageColumns(how)
    for batch in _batches_of_good(loaded, how.batch_size, rejects):
        if "image" in how.towers:
            images.add(encoder, np.stack([row.pixels for row in batch]))
        for row in batch:
            row.pixels = row.pixels[:0]  # the memory of one batch at a time
        rows += batch
        on_pairs(len(batch))
    if rejects:
        on_pairs(len(rejects))
    block = Block([row.pair.guid for row in rows], images.columns())
    for name in rows[0].digests if rows else []:
        joined = b"".join(row.digests[name] for row in rows)
        block.columns[name] = np.frombuffer(joined, dtype=np.uint8).reshape(len(rows), 32)
    if "text" in how.towers:
        _add_texts(block, encoder, rows, how)
    return _without_non_finite(block, rows, rejects), rejects


def _add_texts(block: Block, encoder: Encoder, rows: Sequence[_Loaded], how: How) -> None:
    ids, truncated = encoder.tokenize([row.text for row in rows]) if rows else ([], [])
    text, tokens = _encode_texts(encoder, ids, how)
    block.columns["row/codec"] = np.array([row.codec.encode() for row in rows], dtype="S8")
    block.columns["row/truncated"] = np.array(truncated, dtype=bool)
    if how.below:
        # Where padding is looked at, too (SigLIP), there are more states than ids: padding repeats the end token.
        block.text_ids = [
            np.array([*row, *row[-1:] * (len(states) - len(row))], dtype=np.int32)
            for row, states in zip(ids, tokens, strict=True)
        ]
    else:
        block.columns["text"] = text.astype(how.store)
    if how.tokens or how.below:
        block.text_tokens = tokens


def _batches_of_good(loaded: Iterator[_Loaded | Reject], size: int, rejects: list[Reject]) -> Iterator[list[_Loaded]]:
    batch: list[_Loaded] = []
    for item in loaded:
        if isinstance(item, Reject):
            rejects.append(item)
            continue
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


class _ImageColumns:
    """Collects what the image tower makes, batch by batch."""

    def __init__(self, how: How) -> None:
        self.how = how
        self.pooled: list[NDArray[Any]] = []
        self.views: list[NDArray[Any]] = []
        self.tokens: list[NDArray[Any]] = []

    def add(self, encoder: Encoder, pixels: NDArray[np.float32]) -> None:
        if self.how.below:
            states = encoder.images_below(np.ascontiguousarray(pixels[:, 0]), self.how.below)
            self.tokens += list(states.astype(self.how.store))
            return
        encoded = encoder.encode_images(np.ascontiguousarray(pixels[:, 0]), self.how.tokens)
        self.pooled.append(encoded.pooled.astype(self.how.store))
        if encoded.tokens is not None:
            self.tokens += encoded.tokens
        if self.how.views:
            each = [
                encoder.encode_images(np.ascontiguousarray(pixels[:, view])).pooled
                for view in range(1, 1 + self.how.views)
            ]
            self.views.append(np.stack(each, axis=1).astype(self.how.store))

    def columns(self) -> dict[str, NDArray[Any]]:
        if "image" not in self.how.towers:
            return {}
        columns = {} if self.how.below else {"image": _concatenate(self.pooled)}
        if self.how.views:
            columns["image_views"] = _concatenate(self.views)
        if self.how.tokens or self.how.below:
            columns["image_tokens"] = np.stack(self.tokens) if self.tokens else np.zeros((0, 0, 0), np.float16)
        return columns


def _concatenate(arrays: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(arrays) if arrays else np.zeros((0, 0), np.float32)


def _encode_texts(
    encoder: Encoder, ids: Sequence[Sequence[int]], how: How
) -> tuple[NDArray[np.float32], list[NDArray[Any]]]:
    """Encode in order of length, so that a batch is padded by little; return in the order given."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    pooled: list[NDArray[np.float32]] = []
    tokens: list[NDArray[Any]] = []
    for start in range(0, len(order), how.batch_size):
        batch = [ids[index] for index in order[start : start + how.batch_size]]
        if how.below:
            tokens += [states.astype(how.store) for states in encoder.texts_below(batch, how.below)]
            continue
        encoded = encoder.encode_texts(batch, how.tokens)
        pooled.append(encoded.pooled)
        tokens += encoded.tokens or []
    back = np.argsort(order)
    embeddings = _concatenate(pooled)
    return embeddings if how.below else embeddings[back], [tokens[index] for index in back] if tokens else []


def _without_non_finite(block: Block, rows: list[_Loaded], rejects: list[Reject]) -> Block:
    good = np.ones(len(rows), dtype=bool)
    for name in ("image", "text", "image_views", *(() if "image" in block.columns else ("image_tokens",))):
        if name in block.columns:
            good &= finite_rows(block.columns[name])
    if block.text_ids is not None and block.text_tokens is not None:
        good &= np.array([np.isfinite(states).all() for states in block.text_tokens], dtype=bool)
    if good.all():
        return block
    for index in np.flatnonzero(~good):
        pair = rows[index].pair
        rejects.append(Reject(pair.guid, "the embedding is not finite", pair.image or ""))
    return block.take(np.flatnonzero(good))
