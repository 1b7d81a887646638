"""From raw pairs to blocks of embeddings.

The work is cut into batches, and each core takes a batch from the files' bytes to embeddings: decoding and the model
never wait for each other, nor fight for cores. The same image, or the same text, is encoded once.
"""

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import DataError
from ..cache.parts import Block
from .backbones.base import MAX_TOKENS, Encoder
from .identity import VIEW_SEED
from .index import Known, Row
from .pairs.hashing import TOWERS, Looked, Reject, digest_column, look, prefetch, reject
from .pairs.image import augment, decode_image
from .pairs.pair import Pair

_NOT_FINITE = "the embedding is not finite, or all zero"
_TEXT_SHARE = 4  # smaller batches of texts, in order of length, are padded by less


@dataclass(frozen=True)
class How:
    """What decides what is computed for a pair, beside the encoder.

    Attributes
    ----------
    clean
        Whether texts are cleaned.
    encoding
        Codec of all texts; None to find out for each.
    views
        Augmented views per image.
    tokens
        Whether last hidden states are kept.
    store
        dtype of stored embeddings.
    batch_size
        Images, with their views, per call of the encoder; of texts, as many as have the tokens of a quarter as many
        full ones. None: what suits the encoder.
    towers
        Which are run; of a pair, only what they look at is read.
    below
        Layers at the top of the towers that are left out: what enters them is kept (``image_tokens``, ``text_tokens``
        in ``store``, and ``text_ids``) instead of embeddings. 0: the towers are run to their end.
    """

    clean: bool = True
    encoding: str | None = None
    views: int = 0
    tokens: bool = False
    store: type[np.float16] | type[np.float32] = np.float32
    batch_size: int | None = None
    towers: tuple[str, ...] = TOWERS
    below: int = 0


def encode_blocks(
    blocks: Iterable[Sequence[Pair]],
    encoder: Encoder,
    how: How,
    on_progress: Callable[[int, int], None] | None = None,
    known: Known | None = None,
    total: int | None = None,
) -> Iterator[tuple[Block, list[Reject]]]:
    """Encode each block of pairs, in order.

    What a row holds depends on its block, and on what was known before it, alone: a block that is computed again after
    a crash gives the same bits, whatever the number of cores. Only where a pair was rejected may the last bit of a copy
    of its text or image differ, which then is encoded in another batch.

    Parameters
    ----------
    blocks
        Pairs to encode together.
    encoder, how
        What computes, and what is computed.
    on_progress
        Called with (pairs that came through, pairs to do).
    known
        Embeddings that need not be computed. Whoever adds to it each block that was yielded has the same image, or
        text, of two blocks encoded once, too.
    total
        How many pairs are in ``blocks``, where these are made one by one.

    Yields
    ------
    block, rejects
        The block's rows, without those that were rejected.
    """
    if total is None:
        blocks = list(blocks)
        total = sum(len(block) for block in blocks)
    blocks, to_read = itertools.tee(blocks)
    to_look = itertools.chain.from_iterable(to_read)
    looked = prefetch(lambda pair: look(pair, how.towers, how.clean, how.encoding), to_look, ahead=64)
    with encoder.workers() as pool:
        run = _Run(encoder, how, pool, total, on_progress, known)
        under_way: deque[_Work] = deque()
        try:
            for pairs in blocks:
                under_way.append(run.begin(pairs, [next(looked) for _ in pairs]))
                if len(under_way) > run.ahead(len(pairs)):
                    yield run.finish(under_way[0])
                    run.forget(under_way.popleft())
            while under_way:
                yield run.finish(under_way[0])
                run.forget(under_way.popleft())
        finally:
            looked.close()
            pool.shutdown(wait=True, cancel_futures=True)


class _Work:
    """A block of pairs under way. What was found of a pair is under its number in the block."""

    def __init__(self, pairs: Sequence[Pair], looked: Sequence[Looked | Reject]) -> None:
        self.pairs = pairs
        self.looked = {number: item for number, item in enumerate(looked) if isinstance(item, Looked)}
        self.rejects = {number: item for number, item in enumerate(looked) if isinstance(item, Reject)}
        self.rows: dict[str, dict[int, Row]] = {tower: {} for tower in TOWERS}
        self.views: dict[int, NDArray[Any]] = {}
        # Which pair of which block has the same image, or text, and is the one that is encoded.
        self.same: dict[str, dict[int, tuple[_Work, int]]] = {tower: {} for tower in TOWERS}
        self.keys: list[tuple[str, bytes]] = []
        self.images: list[tuple[Sequence[int], Future[_Images]]] = []
        self.texts: list[tuple[Sequence[int], Future[list[Row]]]] = []


class _Run:
    """Cuts blocks into batches, and puts together what comes of them."""

    def __init__(
        self,
        encoder: Encoder,
        how: How,
        pool: Executor,
        total: int,
        on_progress: Callable[[int, int], None] | None,
        known: Known | None,
    ) -> None:
        self.encoder = encoder
        self.how = how
        self.towers = _Towers(encoder, how)
        self.batch_size = how.batch_size or encoder.batch_size
        self.pool = pool
        self.done, self.total = 0, total
        self.on_progress = on_progress
        self.known = known
        self.under_way: dict[tuple[str, bytes], tuple[_Work, int]] = {}

    def ahead(self, rows: int) -> int:
        """Return how many blocks are begun before the first is finished, so that no core is without work."""
        return 1 + self.encoder.cores * self.batch_size // max(rows, 1)

    def begin(self, pairs: Sequence[Pair], looked: Sequence[Looked | Reject]) -> _Work:
        work = _Work(pairs, looked)
        if "image" in self.how.towers:
            own = set(self._own(work, "image"))
            # Views are seeded by guid: of the same image, each pair has its own.
            numbers = list(work.looked) if self.how.views else sorted(own)
            for batch in _batches(numbers, max(1, self.batch_size // (1 + self.how.views))):
                images = [pairs[each] for each in batch]
                digests = [work.looked[each].digests[digest_column("image", self.how.clean)] for each in batch]
                plain = [each in own for each in batch]
                work.images.append((batch, self.pool.submit(self.towers.images, images, digests, plain)))
        if "text" in self.how.towers:
            own_texts = self._own(work, "text")
            ids, truncated = (
                self.encoder.tokenize([work.looked[each].text for each in own_texts]) if own_texts else ([], [])
            )
            for batch in _text_batches(ids, self.batch_size * MAX_TOKENS // _TEXT_SHARE):
                numbers = [own_texts[each] for each in batch]
                texts = [ids[each] for each in batch]
                work.texts.append(
                    (numbers, self.pool.submit(self.towers.texts, texts, [truncated[each] for each in batch]))
                )
        return work

    def _own(self, work: _Work, tower: str) -> list[int]:
        """Return the pairs whose image, or text, is to be encoded: the first of those that have the same."""
        own = []
        column = digest_column(tower, self.how.clean)
        for number, item in work.looked.items():
            key = (tower, item.digests[column])
            if key in self.under_way:
                work.same[tower][number] = self.under_way[key]
            elif self.known is not None and (row := self.known.find(*key)) is not None:
                work.rows[tower][number] = row
            else:
                self.under_way[key] = (work, number)
                work.keys.append(key)
                own.append(number)
        return own

    def finish(self, work: _Work) -> tuple[Block, list[Reject]]:
        """Wait for the batches of a block, and put it together."""
        before = self.done
        for numbers, batch in work.images:
            result = batch.result()
            work.rows["image"] |= {each: row for each, row in zip(numbers, result.rows, strict=True) if row}
            work.views |= {each: np.stack(views) for each, views in zip(numbers, result.views, strict=True) if views}
            work.rejects |= {each: bad for each, bad in zip(numbers, result.rejects, strict=True) if bad}
            self._came_through(len(numbers))
        for numbers, texts in work.texts:
            work.rows["text"] |= zip(numbers, texts.result(), strict=True)
            if "image" not in self.how.towers:
                self._came_through(len(numbers))
        work.images.clear()
        work.texts.clear()
        for tower in self.how.towers:
            self._reject_not_finite(work, tower)
            for number, (other, original) in work.same[tower].items():
                row = other.rows[tower].get(original)
                if row is not None:
                    work.rows[tower][number] = row
                else:
                    why = other.rejects[original].reason if tower == "image" else _NOT_FINITE
                    work.rejects.setdefault(number, reject(work.pairs[number], why))
            work.same[tower].clear()
        self._came_through(len(work.pairs) - (self.done - before))
        return self._block(work), [work.rejects[number] for number in sorted(work.rejects)]

    def _came_through(self, pairs: int) -> None:
        self.done += pairs
        if self.on_progress is not None and pairs:
            self.on_progress(self.done, self.total)

    def _reject_not_finite(self, work: _Work, tower: str) -> None:
        # What `cache verify` would call damaged must not be stored: it would be computed again in every run.
        bad = [number for number, row in work.rows[tower].items() if not _is_sound(row, tower)]
        for number in bad:
            del work.rows[tower][number]
        if tower == "image":
            bad += [number for number, views in work.views.items() if not np.isfinite(views).all()]
        for number in bad:
            work.rejects.setdefault(number, reject(work.pairs[number], _NOT_FINITE))

    def _block(self, work: _Work) -> Block:
        good = [number for number in range(len(work.pairs)) if number not in work.rejects]
        image, text = ([work.rows[tower][number] for number in good if tower in self.how.towers] for tower in TOWERS)
        columns: dict[str, NDArray[Any]] = {}
        for tower, rows in (("image", image), ("text", text)):
            if tower in self.how.towers and not self.how.below:
                columns[tower] = _stack([row[tower] for row in rows])
        if "image" in self.how.towers and self.how.views:
            columns["image_views"] = _stack([work.views[number].astype(self.how.store) for number in good])
        if "image" in self.how.towers and (self.how.tokens or self.how.below):
            columns["image_tokens"] = _stack([row["image_tokens"] for row in image])
        for name in next(iter(work.looked.values())).digests if good else ():
            joined = b"".join(work.looked[number].digests[name] for number in good)
            columns[name] = np.frombuffer(joined, dtype=np.uint8).reshape(len(good), 32)
        block = Block([work.pairs[number].guid for number in good], columns)
        if "text" in self.how.towers:
            columns["row/codec"] = np.array([work.looked[number].codec.encode() for number in good], dtype="S8")
            columns["row/truncated"] = np.array([row["row/truncated"] for row in text], dtype=bool)
            if self.how.tokens or self.how.below:
                block.text_tokens = [row["text_tokens"] for row in text]
            if self.how.below:
                block.text_ids = [row["text_ids"] for row in text]
        return block

    def forget(self, work: _Work) -> None:
        """Let go of a block that was yielded; ``known`` has it now, if anyone has."""
        for key in work.keys:
            del self.under_way[key]


class _Images:
    """What a batch of n images came to: of each a row (None where it was not asked for), its views, maybe a reject."""

    def __init__(self, n: int) -> None:
        self.rows: list[Row | None] = [None] * n
        self.views: list[list[NDArray[Any]]] = [[] for _ in range(n)]
        self.rejects: list[Reject | None] = [None] * n


class _Towers:
    """Takes batches through the towers, each in the thread that calls."""

    def __init__(self, encoder: Encoder, how: How) -> None:
        self.encoder = encoder
        self.how = how

    def images(self, pairs: Sequence[Pair], digests: Sequence[bytes], plain: Sequence[bool]) -> _Images:
        """Encode a batch of images from their bytes on: those that are ``plain``, and the views of all.

        Where a view cannot be had, the pair is rejected; the row of its image is there all the same.
        """
        result = _Images(len(pairs))
        whose: list[tuple[int, bool]] = []
        prepared: list[NDArray[np.float32]] = []
        for number, (pair, digest, wanted) in enumerate(zip(pairs, digests, plain, strict=True)):
            try:
                for pixels, is_plain in self._prepared(pair, digest, wanted):
                    prepared.append(pixels)
                    whose.append((number, is_plain))
            except DataError as error:
                result.rejects[number] = reject(pair, str(error))
            except Exception as error:  # one odd image must not end the work on 100,000
                result.rejects[number] = reject(pair, f"image cannot be prepared: {error}")
        for (number, is_plain), row in zip(whose, self._encode_images(prepared), strict=True):
            if is_plain:
                result.rows[number] = row
            else:
                result.views[number].append(row["image"])
        return result

    def _prepared(self, pair: Pair, digest: bytes, plain: bool) -> Iterator[tuple[NDArray[np.float32], bool]]:
        """Yield the pixels of an image, if it is ``plain``, and of its views; and whether it is the image itself."""
        raw = pair.read_image()
        if hashlib.sha256(raw).digest() != digest:  # a copy would have the embedding of another image
            raise DataError("the image changed while it was read: run the same command again")
        image = decode_image(raw)
        if plain:
            yield self.encoder.prepare_image(image), True
        for view in range(self.how.views):
            yield self.encoder.prepare_image(augment(image, VIEW_SEED, pair.guid, view)), False

    def _encode_images(self, pixels: Sequence[NDArray[np.float32]]) -> Iterator[Row]:
        if not pixels:
            return iter(())
        batch = np.stack(pixels)
        if self.how.below:
            states = _within(self.encoder.images_below(batch, self.how.below), self.how.store)
            return iter([{"image_tokens": each} for each in states])
        encoded = self.encoder.encode_images(batch, self.how.tokens)
        rows: list[Row] = [{"image": each} for each in encoded.pooled.astype(self.how.store)]
        for row, each in zip(rows, encoded.tokens or [], strict=self.how.tokens):
            row["image_tokens"] = each
        return iter(rows)

    def texts(self, ids: Sequence[Sequence[int]], truncated: Sequence[bool]) -> list[Row]:
        """Encode a batch of texts from their tokens on."""
        rows: list[Row] = [{"row/truncated": each} for each in truncated]
        if self.how.below:
            states = self.encoder.texts_below(ids, self.how.below)
            for row, own, state in zip(rows, ids, states, strict=True):
                row["text_tokens"] = _within(state, self.how.store)
                # Where padding is looked at, too (SigLIP), there are more states than ids: it repeats the end token.
                row["text_ids"] = np.array([*own, *[own[-1]] * (len(state) - len(own))], dtype=np.int32)
            return rows
        encoded = self.encoder.encode_texts(ids, self.how.tokens)
        for row, each in zip(rows, encoded.pooled.astype(self.how.store), strict=True):
            row["text"] = each
        for row, half in zip(rows, encoded.tokens or [], strict=self.how.tokens):
            row["text_tokens"] = half
        return rows


def _batches(numbers: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (numbers[start : start + size] for start in range(0, len(numbers), size))


def _text_batches(ids: Sequence[Sequence[int]], tokens: int) -> Iterator[list[int]]:
    """Yield the texts in order of length, as many at once as have ``tokens`` when padded to the longest of them."""
    batch: list[int] = []
    for number in sorted(range(len(ids)), key=lambda number: len(ids[number])):
        if batch and (len(batch) + 1) * len(ids[number]) > tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _is_sound(row: Row, tower: str) -> bool:
    numbers = [row[name] for name in (tower, f"{tower}_tokens") if name in row]
    return all(np.isfinite(each).all() for each in numbers) and (tower not in row or bool(row[tower].any()))


def _within(states: NDArray[np.float32], store: Any) -> NDArray[Any]:
    """Return ``states`` in the dtype ``store``; finite numbers beyond its range become its limit."""
    limits = np.finfo(store)
    return np.where(np.isinf(states), states, np.clip(states, limits.min, limits.max)).astype(store)


def _stack(rows: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return np.stack(rows) if rows else np.zeros((0, 0), np.float32)
