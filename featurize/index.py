"""Embeddings that are on disk already, found by the digest of the image or text that they were made from."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache.parts import OpenCaches
from .pairs.hashing import TOWERS, digest_column

TowerOutput = dict[str, Any]  # what a tower returned for one image or text, by column of the cache file

_COLUMNS = {"image": ("image", "image_tokens"), "text": ("text", "row/truncated")}


class EmbeddingIndex:
    """Finds rows of cache files and parts by digest. It takes 16 bytes of memory per row and tower.

    Parameters
    ----------
    clean
        Whether texts are cleaned. If so, texts that are equal after cleaning share an embedding.
    """

    def __init__(self, clean: bool) -> None:
        self._column = {tower: digest_column(tower, clean) for tower in TOWERS}
        self._places = {tower: _Places() for tower in TOWERS}
        self._paths: list[Path] = []
        self._open = OpenCaches()

    def __enter__(self) -> "EmbeddingIndex":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._open.close()

    def add(self, path: Path, usable: Mapping[str, NDArray[np.bool_]] | None = None) -> None:
        """Add the rows of a file. The file must not change afterwards.

        Parameters
        ----------
        usable
            Which rows may be used, (N,) bool by tower. Default: all.
        """
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
        if not np.isfinite(output[tower]).all() or not output[tower].any():
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
