"""Reading and hashing raw pairs, and setting aside those that cannot be read."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from ...cache.errors import DataError
from ...cache.machine import cpu_count
from .image import IMAGE_SUFFIXES, NOT_AN_IMAGE, decode_image
from .pair import Pair
from .text import clean_text, decode_text

TOWERS = ("image", "text")

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
    """A pair's text and digests; its image is not decoded yet. Sides that no tower needs are left out.

    Attributes
    ----------
    text, codec
        The text that the backbone encodes, and the codec that decoded it.
    digests
        sha256 (32 bytes) by column of the cache file, such as ``row/image_sha256``.
    """

    text: str
    codec: str
    digests: dict[str, bytes]


def digest_column(tower: str, clean: bool) -> str:
    """Return the column whose digest identifies the input of ``tower``: equal digests give equal embeddings."""
    if tower == "image":
        return "row/image_sha256"
    return "row/cleaned_sha256" if clean else "row/text_sha256"


def load_text(raw: bytes, clean: bool, encoding: str | None = None) -> tuple[str, str]:
    """Return the text that the backbone encodes, and its codec.

    Raises
    ------
    DataError
        ``raw`` is not valid in ``encoding``.
    """
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


def prefetch(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Generator[Result, None, None]:
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
