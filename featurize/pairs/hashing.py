"""Reading raw pairs: what is known of one before anything is decoded, and bad pairs set aside."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError
from ...cache.machine import cpu_count
from ...cache.store import FeatureCache
from ..identity import is_cleaned
from .image import IMAGE_SUFFIXES, NOT_AN_IMAGE, decode_image, decoded_as_in_version_1
from .pair import Pair
from .text import clean_text, decode_text

TOWERS = ("image", "text")


@dataclass(frozen=True)
class Reject:
    """A pair that was left out, and why."""

    guid: str
    reason: str
    path: str


@dataclass(frozen=True)
class Looked:
    """What is known of a pair before its image is decoded; of a side that no tower looks at, there is nothing.

    Attributes
    ----------
    text, codec
        The text that the backbone sees, and how its bytes were decoded.
    digests
        By column of the cache file (``row/image_sha256`` ...): the sha256 of what the column says, 32 bytes.
    """

    text: str
    codec: str
    digests: dict[str, bytes]


def digest_column(tower: str, clean: bool) -> str:
    """Return the column whose digest stands for all that ``tower`` sees of a pair."""
    if tower == "image":
        return "row/image_sha256"
    return "row/cleaned_sha256" if clean else "row/text_sha256"


def load_text(raw: bytes, clean: bool, encoding: str | None = None) -> tuple[str, str]:
    """Return (the text that the backbone sees, codec); DataError where ``raw`` is not valid in ``encoding``."""
    try:
        text, codec = decode_text(raw, encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"text is not {encoding} (byte {error.start})") from error
    return (clean_text(text) if clean else text.strip()), codec


def look(pair: Pair, towers: tuple[str, ...], clean: bool, encoding: str | None = None) -> Looked | Reject:
    """Read a pair's files as far as ``towers`` look at them; the image is hashed, not decoded."""
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
            # Hash the text as cleaned once: cleaning twice can merge texts that differ.
            cleaned = text if clean else clean_text(text)
            digests["row/cleaned_sha256"] = hashlib.sha256(cleaned.encode()).digest()
        return Looked(text, codec, digests)
    except DataError as error:
        return reject(pair, str(error))


def unreadable(pair: Pair) -> Reject | None:
    """Return why a pair cannot be read; None where it can."""
    try:
        if pair.problem is not None:
            raise DataError(pair.problem)
        raw_image = pair.read_image()
        pair.read_text()
        decode_image(raw_image)
    except DataError as error:
        return reject(pair, str(error))
    return None


@dataclass(frozen=True)
class Comparison:
    """How n rows of a cache compare with their raw pairs as they are now.

    Attributes
    ----------
    readable, same_bytes
        Whether both files can be read; whether both have the bytes that the row was made from, (n,).
    image, text
        Whether that side of the row can be taken as it is, (n,): its bytes are the same, and so is what comes of them.
    """

    readable: NDArray[np.bool_]
    same_bytes: NDArray[np.bool_]
    image: NDArray[np.bool_]
    text: NDArray[np.bool_]

    @property
    def same(self) -> NDArray[np.bool_]:
        """Whether the row can be taken as it is, (n,)."""
        return self.image & self.text


def compare(cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair], is_earlier: bool) -> Comparison:
    """Compare rows of a cache with their pairs.

    Parameters
    ----------
    is_earlier
        Whether the cache was made by an earlier version of the steps (see ``steps.py``): then what each pair is decoded
        and cleaned to now is compared as well.
    """
    found = np.zeros((len(rows), 4), dtype=bool)
    names = [f"row/{name}_sha256" for name in ("image", "text", *(["cleaned"] if is_earlier else []))]
    stored = zip(*(map(np.ndarray.tobytes, cached.read(name, rows)) for name in names), strict=True)
    if not is_earlier:
        for number, (now, then) in enumerate(zip(prefetch(Pair.digests, pairs, ahead=64), stored, strict=True)):
            if now is not None:
                same = [one == other for one, other in zip(now, then, strict=True)]
                found[number] = [True, all(same), *same]
        return Comparison(*found.T)
    clean, encoding = is_cleaned(cached.header.identity), cached.header.identity["text"].get("encoding")
    codecs = cached.codecs()

    def outcome(pair: Pair) -> tuple[Looked, bool] | None:
        seen = look(pair, TOWERS, clean, encoding)
        return (seen, decoded_as_in_version_1(pair.read_image())) if isinstance(seen, Looked) else None

    for number, (now, then) in enumerate(zip(prefetch(outcome, pairs, ahead=64), stored, strict=True)):
        if now is not None:
            seen, same_picture = now
            image, text, cleaned = (seen.digests[name] == each for name, each in zip(names, then, strict=True))
            same_text = text and cleaned and seen.codec == codecs[rows[number]]
            found[number] = [True, image and text, image and same_picture, same_text]
    return Comparison(*found.T)


def reject(pair: Pair, reason: str) -> Reject:
    """Return the reject of ``pair`` for ``reason``; a path that is not UTF-8 is written with escapes."""
    path = pair.image or pair.text_path or ""
    suffix = os.path.splitext(path)[1]
    if reason == NOT_AN_IMAGE and suffix.lower() not in IMAGE_SUFFIXES:
        reason += f" that can be read: {suffix or 'no suffix'}"
    return Reject(pair.guid, reason, path.encode(errors="backslashreplace").decode())


def prefetch(function: Callable[[Any], Any], items: Iterable[Any], ahead: int) -> Generator[Any, None, None]:
    """Map in threads, in order, at most ``ahead`` results waiting."""
    with ThreadPoolExecutor(cpu_count()) as pool:
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
