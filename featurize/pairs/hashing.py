"""Reading and hashing raw pairs, setting aside those that cannot be read, and comparing pairs with rows of a cache."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError
from ...cache.machine import cpu_count
from ...cache.store import FeatureCache
from .image import IMAGE_SUFFIXES, NOT_AN_IMAGE, decode_image, decoded_as_in_version_1
from .pair import Pair
from .text import clean_text, decode_text

SIDES = ("image", "text")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Reject:
    """A pair that was left out, and the reason."""

    guid: str
    reason: str
    path: str


@dataclass(frozen=True)
class HashedPair:
    """A pair's text and digests; its image is not decoded yet. Sides that no tower needs are left out."""

    text: str  # that the backbone encodes
    codec: str
    digests: dict[str, bytes]  # sha256 by column of the cache file, such as row/image_sha256


def digest_column(tower: str, clean: bool) -> str:
    """Return the column whose digest identifies the input of ``tower``: equal digests give equal embeddings."""
    if tower == "image":
        return "row/image_sha256"
    return "row/cleaned_sha256" if clean else "row/text_sha256"


def load_text(raw: bytes, clean: bool, encoding: str | None = None) -> tuple[str, str]:
    """Return the text that the backbone encodes, and its codec; DataError if ``raw`` is not valid in ``encoding``."""
    try:
        text, codec = decode_text(raw, encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"text is not {encoding} (byte {error.start})") from error
    return (clean_text(text) if clean else text.strip()), codec


def hash_pair(pair: Pair, towers: tuple[str, ...], clean: bool, encoding: str | None = None) -> HashedPair | Reject:
    """Read and hash the files of a pair that ``towers`` need. Return a reject if one cannot be read."""
    try:
        if pair.problem is not None:
            raise DataError(pair.problem)
        text, codec, digests = "", "", {}
        if "image" in towers:
            digests["row/image_sha256"] = hashlib.sha256(pair.read_image()).digest()
        if "text" in towers:
            raw = pair.read_text()
            text, codec = load_text(raw, clean, encoding)
            digests["row/text_sha256"] = hashlib.sha256(raw).digest()
            # Hash the once-cleaned text: cleaning twice can merge texts that differ.
            cleaned = text if clean else clean_text(text)
            digests["row/cleaned_sha256"] = hashlib.sha256(cleaned.encode()).digest()
        return HashedPair(text, codec, digests)
    except DataError as error:
        return reject_pair(pair, str(error))


def unreadable(pair: Pair) -> Reject | None:
    """Read a pair and decode its image. Return a reject if that fails, else None."""
    try:
        if pair.problem is not None:
            raise DataError(pair.problem)
        raw_image = pair.read_image()
        pair.read_text()
        decode_image(raw_image)
    except DataError as error:
        return reject_pair(pair, str(error))
    return None


def reject_pair(pair: Pair, reason: str) -> Reject:
    """Return a reject of ``pair``. A path that is not UTF-8 is written with escapes."""
    path = pair.image or pair.text_path or ""
    suffix = os.path.splitext(path)[1]
    if reason == NOT_AN_IMAGE and suffix.lower() not in IMAGE_SUFFIXES:
        reason += f" that can be read: {suffix or 'no suffix'}"
    return Reject(pair.guid, reason, path.encode(errors="backslashreplace").decode())


def prefetch(
    function: Callable[[Item], Result], items: Iterable[Item], ahead: int = 64
) -> Generator[Result, None, None]:
    """Yield ``function(item)`` for each item in order. Threads compute up to ``ahead`` results in advance."""
    with ThreadPoolExecutor(cpu_count()) as pool:
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True)
class RowComparison:
    """How n rows of a cache compare with their raw pairs, each array (n,) bool.

    An embedding of ``image`` or ``text`` is still valid if decoding and cleaning the same bytes gives the same result.
    """

    readable: NDArray[np.bool_]  # both files
    same_bytes: NDArray[np.bool_]  # in both files as when the row was made
    image: NDArray[np.bool_]
    text: NDArray[np.bool_]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Whether both embeddings of the row are still valid, (n,)."""
        return self.image & self.text


def compare_rows(
    cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair], is_earlier: bool = False
) -> RowComparison:
    """Compare rows of a cache with their pairs, one pair per row.

    If an earlier version of decoding and cleaning made the cache (``is_earlier``), compare their results too.
    """
    flags = np.zeros((4, len(rows)), dtype=bool)
    compared = _compare_results(cached, rows, pairs) if is_earlier else compare_bytes(cached, rows, pairs)
    for index, same in enumerate(compared):
        if not isinstance(same, DataError):  # the first two are about bytes, the last two about embeddings
            flags[:, index] = True, all(same[:2]), *same[-2:]
    return RowComparison(*flags)


def compare_bytes(
    cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair], sides: Sequence[str] = SIDES
) -> Generator[tuple[bool, ...] | DataError, None, None]:
    """Yield for each row whether the file of each side holds the bytes that the row was made from.

    If a file cannot be read, the error is yielded instead.
    """
    stored = zip(*(cached.read(f"row/{side}_sha256", rows) for side in sides), strict=True)

    def compare(item: tuple[Pair, tuple[NDArray[np.uint8], ...]]) -> tuple[bool, ...] | DataError:
        pair, digests = item
        try:
            return tuple(pair.digest(side) == digest.tobytes() for side, digest in zip(sides, digests, strict=True))
        except DataError as error:
            return error

    return prefetch(compare, zip(pairs, stored, strict=True))


def _compare_results(
    cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair]
) -> Generator[tuple[bool, ...] | DataError, None, None]:
    """Yield for each row whether image and text have the same bytes, and whether both embeddings are still valid."""
    text_identity = cached.header.identity["text"]
    clean, encoding = bool(text_identity["cleaning"]), text_identity.get("encoding")
    columns = [f"row/{name}_sha256" for name in ("image", "text", "cleaned")]
    codecs = cached.codecs()
    stored = zip(*(cached.read(name, rows) for name in columns), strict=True)

    def compare(item: tuple[Pair, tuple[NDArray[np.uint8], ...], int]) -> tuple[bool, ...] | DataError:
        pair, digests, row = item
        hashed = hash_pair(pair, SIDES, clean, encoding)
        if isinstance(hashed, Reject):
            return DataError(hashed.reason)
        image, text, cleaned = (
            hashed.digests[name] == digest.tobytes() for name, digest in zip(columns, digests, strict=True)
        )
        same_picture = decoded_as_in_version_1(pair.read_image())
        return image, text, image and same_picture, text and cleaned and hashed.codec == codecs[row]

    return prefetch(compare, zip(pairs, stored, rows.tolist(), strict=True))
