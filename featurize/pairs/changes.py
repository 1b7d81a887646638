"""Whether rows of a cache still agree with their raw pairs."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...cache.store import FeatureCache
from ..identity import is_cleaned
from .hashing import TOWERS, HashedPair, hash_pair, prefetch
from .image import decoded_as_in_version_1
from .pair import Pair

_UNREADABLE = (False, False, False, False)

Flags = tuple[bool, bool, bool, bool]  # the columns of a Comparison


@dataclass(frozen=True)
class Comparison:
    """How n rows of a cache compare with their raw pairs, each array (n,) bool.

    Attributes
    ----------
    readable
        Both files can be read.
    same_bytes
        Both files hold the bytes that the row was made from.
    image, text
        The row's image or text embedding is still valid: same bytes, and decoding and cleaning give the same result.
    """

    readable: NDArray[np.bool_]
    same_bytes: NDArray[np.bool_]
    image: NDArray[np.bool_]
    text: NDArray[np.bool_]

    @property
    def same(self) -> NDArray[np.bool_]:
        """Whether both embeddings of the row are still valid, (n,)."""
        return self.image & self.text


def compare_rows(
    cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair], is_earlier: bool = False
) -> Comparison:
    """Compare rows of a cache with their pairs, one pair per row.

    Parameters
    ----------
    is_earlier
        Whether an earlier version of the steps in ``identity.py`` made the cache. Then the results of decoding and
        cleaning are compared too.
    """
    flags = np.zeros((len(rows), len(_UNREADABLE)), dtype=bool)
    compared = _compare_results(cached, rows, pairs) if is_earlier else _compare_bytes(cached, rows, pairs)
    for index, row_flags in enumerate(compared):
        flags[index] = row_flags
    return Comparison(*flags.T)


def _compare_bytes(cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair]) -> Iterable[Flags]:
    stored = (cached.read(f"row/{side}_sha256", rows) for side in TOWERS)

    def flags(item: tuple[Pair, NDArray[np.uint8], NDArray[np.uint8]]) -> Flags:
        pair, stored_image, stored_text = item
        digests = pair.digests()
        if digests is None:
            return _UNREADABLE
        image, text = digests[0] == stored_image.tobytes(), digests[1] == stored_text.tobytes()
        return True, image and text, image, text

    return prefetch(flags, zip(pairs, *stored, strict=True), ahead=64)


def _compare_results(cached: FeatureCache, rows: NDArray[np.int64], pairs: Iterable[Pair]) -> Iterable[Flags]:
    clean, encoding = is_cleaned(cached.header.identity), cached.header.identity["text"].get("encoding")
    columns = [f"row/{name}_sha256" for name in ("image", "text", "cleaned")]
    codecs = cached.codecs()
    stored = zip(*(map(np.ndarray.tobytes, cached.read(name, rows)) for name in columns), strict=True)

    def flags(item: tuple[Pair, tuple[bytes, ...], int]) -> Flags:
        pair, stored_digests, row = item
        hashed = hash_pair(pair, TOWERS, clean, encoding)
        if not isinstance(hashed, HashedPair):
            return _UNREADABLE
        image, text, cleaned = (
            hashed.digests[name] == digest for name, digest in zip(columns, stored_digests, strict=True)
        )
        same_picture = decoded_as_in_version_1(pair.read_image())
        return True, image and text, image and same_picture, text and cleaned and hashed.codec == codecs[row]

    return prefetch(flags, zip(pairs, stored, rows.tolist(), strict=True), ahead=64)
