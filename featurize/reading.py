"""Reading raw pairs: what is known of one before anything is decoded, and bad pairs set aside."""

import hashlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import DataError
from ..cache.machine import cpu_count
from ..cache.store import FeatureCache
from .dataset import Pair
from .image import decode_image
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


def load_text(raw: bytes, clean: bool) -> tuple[str, str]:
    """Return (the text that the backbone sees, codec)."""
    text, codec = decode_text(raw)
    return (clean_text(text) if clean else text.strip()), codec


def look(pair: Pair, towers: tuple[str, ...], clean: bool) -> Looked | Reject:
    """Read a pair's files as far as ``towers`` look at them; the image is hashed, not decoded."""
    try:
        if pair.problem is not None:
            raise DataError(pair.problem)
        text, codec, digests = "", "", {}
        if "image" in towers:
            digests["row/image_sha256"] = hashlib.sha256(pair.read_image()).digest()
        if "text" in towers:
            raw = pair.read_text()
            text, codec = load_text(raw, clean)
            digests["row/text_sha256"] = hashlib.sha256(raw).digest()
            # Of what is cleaned once: cleaning again would make the same of texts that the backbone sees as different.
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


def unchanged(cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair]) -> NDArray[np.bool_]:
    """Return whether the raw bytes of each pair are those that its row of the cache was made from, (n,)."""
    stored = (cached.read(f"row/{tower}_sha256", rows) for tower in TOWERS)
    same = (
        now == (image.tobytes(), text.tobytes())
        for now, image, text in zip(prefetch(Pair.digests, pairs, ahead=64), *stored, strict=True)
    )
    return np.fromiter(same, bool, len(rows))


def reject(pair: Pair, reason: str) -> Reject:
    """Return the reject of ``pair`` for ``reason``."""
    return Reject(pair.guid, reason, pair.image or pair.text_path or "")


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
