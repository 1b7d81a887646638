"""From raw pairs to blocks of embeddings.

Each core takes one batch from the files' bytes to embeddings, so decoding and the model never wait for each other or
compete for cores. Equal images, and equal texts, are encoded once.
"""

import contextlib
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..cache.parts import Block
from .backbones.base import MAX_TOKENS, Encoder
from .identity import EncodeOptions
from .outputs import EmbeddingIndex, EncodedImage, ImageRequest, TowerOutput, encode_images, encode_texts, is_sound
from .pairs.hashing import SIDES, HashedPair, Reject, digest_column, hash_pair, prefetch, reject_pair
from .pairs.pair import Pair

_NOT_FINITE = "the embedding is not finite, or all zero"
_TEXT_SHARE = 4  # text batches, in order of length, need less padding if they are smaller

Item = TypeVar("Item")
OnProgress = Callable[[int, int], None]
EncodedBlocks = Generator[tuple[Block, list[Reject]], None, None]


def encode_blocks(
    blocks: Iterable[Sequence[Pair]],
    encoder: Encoder,
    options: EncodeOptions,
    on_progress: OnProgress | None = None,
    index: EmbeddingIndex | None = None,
    total: int | None = None,
) -> EncodedBlocks:
    """Encode each block of pairs, in order.

    A row depends only on its block and on the embeddings in ``index``. So a block that is encoded again after a crash
    gives the same bits, whatever the number of cores. There is one exception: if a pair is rejected, its copies may
    land in another batch, which can change their last bit.

    The rows of each block are yielded with its rejected pairs. To encode copies in different blocks only once, add each
    block to ``index`` as soon as it is yielded. Without ``total``, the number of pairs, all blocks are listed first.
    """
    if total is None:
        blocks = list(blocks)
        total = sum(len(block) for block in blocks)
    blocks, blocks_to_hash = itertools.tee(blocks)
    hash_one = partial(hash_pair, towers=options.towers, clean=options.clean, encoding=options.encoding)
    with (
        contextlib.closing(prefetch(hash_one, itertools.chain.from_iterable(blocks_to_hash))) as hashed,
        encoder.workers() as pool,
    ):
        run = _Run(encoder, options, pool, index, on_progress, total)
        pending: deque[_PendingBlock] = deque()
        try:
            for pairs in blocks:
                pending.append(run.start(pairs, [next(hashed) for _ in pairs]))
                if len(pending) > run.blocks_ahead(len(pairs)):
                    yield run.finish(pending.popleft())
            while pending:
                yield run.finish(pending.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(eq=False)
class _PendingBlock:
    """A block whose batches are being encoded. Pairs are identified by their position in the block."""

    pairs: Sequence[Pair]
    hashed: dict[int, HashedPair]
    rejects: dict[int, Reject]
    outputs: dict[str, dict[int, TowerOutput]] = field(default_factory=lambda: {"image": {}, "text": {}})
    views: dict[int, NDArray[Any]] = field(default_factory=dict)
    # Pairs whose image or text is encoded for another pair: by tower, that pair's block and position.
    copies: "dict[str, dict[int, tuple[_PendingBlock, int]]]" = field(default_factory=lambda: {"image": {}, "text": {}})
    keys: list[tuple[str, bytes]] = field(default_factory=list)  # the (tower, digest) that this block encodes
    # Positions and their future outputs.
    image_batches: "list[tuple[Sequence[int], Future[list[EncodedImage]]]]" = field(default_factory=list)
    text_batches: "list[tuple[Sequence[int], Future[list[TowerOutput]]]]" = field(default_factory=list)


@dataclass
class _Run:
    """Cuts blocks into batches, and assembles blocks from the outputs of their batches."""

    encoder: Encoder
    options: EncodeOptions
    pool: Executor
    index: EmbeddingIndex | None
    on_progress: OnProgress | None
    total: int
    done: int = 0
    being_encoded: dict[tuple[str, bytes], tuple[_PendingBlock, int]] = field(default_factory=dict)

    @property
    def batch_size(self) -> int:
        return self.options.batch_size or self.encoder.batch_size

    def advance(self, pairs: int) -> None:
        self.done += pairs
        if self.on_progress is not None and pairs:
            self.on_progress(self.done, self.total)

    def blocks_ahead(self, rows: int) -> int:
        """Return how many blocks to start before the first is finished, so that no core is idle."""
        return 1 + self.encoder.cores * self.batch_size // max(rows, 1)

    def start(self, pairs: Sequence[Pair], hashed: Sequence[HashedPair | Reject]) -> _PendingBlock:
        """Queue the batches of a block."""
        block = _PendingBlock(
            pairs,
            {position: item for position, item in enumerate(hashed) if isinstance(item, HashedPair)},
            {position: item for position, item in enumerate(hashed) if isinstance(item, Reject)},
        )
        if "image" in self.options.towers:
            self._queue_images(block)
        if "text" in self.options.towers:
            self._queue_texts(block)
        return block

    def _queue_images(self, block: _PendingBlock) -> None:
        column = digest_column("image", self.options.clean)
        originals = set(self._find_originals(block, "image"))
        # Views are seeded by guid, so copies of an image have different views.
        positions = list(block.hashed) if self.options.views else sorted(originals)
        for batch in chunked(positions, max(1, self.batch_size // (1 + self.options.views))):
            requests = [
                ImageRequest(block.pairs[position], block.hashed[position].digests[column], position not in originals)
                for position in batch
            ]
            outputs = self.pool.submit(encode_images, self.encoder, self.options, requests)
            block.image_batches.append((batch, outputs))

    def _queue_texts(self, block: _PendingBlock) -> None:
        originals = self._find_originals(block, "text")
        if not originals:
            return
        ids, truncated = self.encoder.tokenize([block.hashed[position].text for position in originals])
        for batch in _text_batches(ids, self.batch_size * MAX_TOKENS // _TEXT_SHARE):
            batch_ids, batch_truncated = [ids[each] for each in batch], [truncated[each] for each in batch]
            outputs = self.pool.submit(encode_texts, self.encoder, self.options, batch_ids, batch_truncated)
            block.text_batches.append(([originals[each] for each in batch], outputs))

    def _find_originals(self, block: _PendingBlock, tower: str) -> list[int]:
        """Return the pairs whose image or text must be encoded; note where the others get their output."""
        originals = []
        column = digest_column(tower, self.options.clean)
        for position, hashed in block.hashed.items():
            key = (tower, hashed.digests[column])
            if key in self.being_encoded:
                block.copies[tower][position] = self.being_encoded[key]
            elif self.index is not None and (output := self.index.find(*key)) is not None:
                block.outputs[tower][position] = output
            else:
                self.being_encoded[key] = (block, position)
                block.keys.append(key)
                originals.append(position)
        return originals

    def finish(self, block: _PendingBlock) -> tuple[Block, list[Reject]]:
        """Wait for the batches of a block and assemble it."""
        done_before = self.done
        for positions, images in block.image_batches:
            for position, image in zip(positions, images.result(), strict=True):
                if image.output is not None:
                    block.outputs["image"][position] = image.output
                if image.views:
                    block.views[position] = np.stack(image.views)
                if image.reject is not None:
                    block.rejects[position] = image.reject
            self.advance(len(positions))
        for positions, texts in block.text_batches:
            block.outputs["text"] |= zip(positions, texts.result(), strict=True)
            if "image" not in self.options.towers:
                self.advance(len(positions))
        for tower in self.options.towers:
            _reject_unsound(block, tower)
            _resolve_copies(block, tower)
        self.advance(len(block.pairs) - (self.done - done_before))
        for key in block.keys:  # blocks that start later find its rows in the index, if there is one
            del self.being_encoded[key]
        return _assemble(block, self.options), [block.rejects[position] for position in sorted(block.rejects)]


def chunked(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yield ``items`` in runs of ``size``; the last may be shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def _text_batches(ids: Sequence[Sequence[int]], max_tokens: int) -> Iterator[list[int]]:
    """Yield positions of texts in order of length, so that each padded batch has at most ``max_tokens`` tokens."""
    batch: list[int] = []
    for position in sorted(range(len(ids)), key=lambda position: len(ids[position])):
        if batch and (len(batch) + 1) * len(ids[position]) > max_tokens:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def _reject_unsound(block: _PendingBlock, tower: str) -> None:
    # `cache verify` would call such a row damaged, and every later run would compute it again.
    unsound = [position for position, output in block.outputs[tower].items() if not is_sound(output, tower)]
    for position in unsound:
        del block.outputs[tower][position]
    if tower == "image":
        unsound += [position for position, views in block.views.items() if not np.isfinite(views).all()]
    for position in unsound:
        block.rejects.setdefault(position, reject_pair(block.pairs[position], _NOT_FINITE))


def _resolve_copies(block: _PendingBlock, tower: str) -> None:
    for position, (original_block, original) in block.copies[tower].items():
        output = original_block.outputs[tower].get(original)
        if output is not None:
            block.outputs[tower][position] = output
        else:
            reason = original_block.rejects[original].reason if tower == "image" else _NOT_FINITE
            block.rejects.setdefault(position, reject_pair(block.pairs[position], reason))
    block.copies[tower].clear()


def _assemble(block: _PendingBlock, options: EncodeOptions) -> Block:
    """Return the rows of the pairs that were not rejected."""
    kept = [position for position in range(len(block.pairs)) if position not in block.rejects]
    columns: dict[str, NDArray[Any]] = {}
    outputs = {tower: [block.outputs[tower][position] for position in kept] for tower in options.towers}
    for tower in SIDES if not options.below else ():
        if tower in outputs:
            columns[tower] = _stack([output[tower] for output in outputs[tower]])
    if "image" in outputs and options.views:
        columns["image_views"] = _stack([block.views[position].astype(options.dtype) for position in kept])
    if "image" in outputs and (options.tokens or options.below):
        columns["image_tokens"] = _stack([output["image_tokens"] for output in outputs["image"]])
    for name in block.hashed[kept[0]].digests if kept else ():
        joined = b"".join(block.hashed[position].digests[name] for position in kept)
        columns[name] = np.frombuffer(joined, dtype=np.uint8).reshape(len(kept), 32)
    rows = Block([block.pairs[position].guid for position in kept], columns)
    if "text" in outputs:
        columns["row/codec"] = np.array([block.hashed[position].codec.encode() for position in kept], dtype="S8")
        columns["row/truncated"] = np.array([output["row/truncated"] for output in outputs["text"]], dtype=bool)
        if options.tokens or options.below:
            rows.text_tokens = [output["text_tokens"] for output in outputs["text"]]
        if options.below:
            rows.text_ids = [output["text_ids"] for output in outputs["text"]]
    return rows


def _stack(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.stack(values) if values else np.zeros((0, 0), np.float32)
