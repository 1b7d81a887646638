"""Last hidden states of the towers, in memory or still in the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import CacheError
from .hdf5 import DAMAGE, damaged
from .rows import StoredFile, finite_rows


class PaddedTokens(NamedTuple):
    """Token states of a batch: image (b, P, w_i) float16, text (b, L, w_t) float16, mask (b, L) bool."""

    image: NDArray[np.float16]
    text: NDArray[np.float16]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Tokens:
    """Last hidden states of n rows, in memory. Picking rows copies nothing.

    Attributes
    ----------
    image
        (N, P, w_i) float16, for all N rows in memory.
    text, offsets
        (sum L, w_t) float16 and (N + 1,) int64: text i is ``text[offsets[i]:offsets[i + 1]]``.
    rows
        Numbers of the n rows among the N, in order, (n,) int64.
    """

    image: NDArray[np.float16]
    text: NDArray[np.float16]
    offsets: NDArray[np.int64]
    rows: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def widths(self) -> tuple[int, int]:
        """Return (w_i, w_t)."""
        return int(self.image.shape[2]), int(self.text.shape[1])

    @property
    def at_once(self) -> int:
        """Number of rows that may be loaded at once."""
        return len(self.rows)

    def take(self, rows: NDArray[np.int64]) -> Tokens:
        """Return the rows numbered ``rows``."""
        return Tokens(self.image, self.text, self.offsets, self.rows[rows])

    def load(self) -> Tokens:
        """Return these rows in memory."""
        return self

    def padded(self) -> PaddedTokens:
        """Return these rows as one batch, texts padded with zeros on the right."""
        starts, lengths = self.offsets[self.rows], np.diff(self.offsets)[self.rows]
        places = np.arange(max(int(lengths.max(initial=0)), 1))
        mask = places < lengths[:, None]
        text = np.zeros((*mask.shape, self.text.shape[1]), np.float16)
        text[mask] = self.text[(starts[:, None] + places)[mask]]
        return PaddedTokens(self.image[self.rows], text, mask)


@dataclass(frozen=True)
class StoredTokens:
    """Last hidden states of n rows that stay in the cache file until ``load``.

    Attributes
    ----------
    file
        The cache file.
    rows
        Rows of the file, (n,) int64.
    max_bytes
        Memory limit for two blocks: one in use and one being read.
    """

    file: StoredFile
    rows: NDArray[np.int64]
    max_bytes: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def widths(self) -> tuple[int, int]:
        """Return (w_i, w_t)."""
        file = self.file.open()
        return int(file["image_tokens"].shape[2]), int(file["text_tokens"].shape[1])

    @cached_property
    def at_once(self) -> int:
        """Number of rows that may be loaded at once."""
        file = self.file.open()
        return max(1, int(self.max_bytes / 2 / (tokens_bytes(file) / max(len(file["guid"]), 1))))

    def take(self, rows: NDArray[np.int64]) -> StoredTokens:
        """Return the rows numbered ``rows``, still in the file."""
        return StoredTokens(self.file, self.rows[rows], self.max_bytes)

    def load(self) -> Tokens:
        """Read these rows into memory, in file order, so that the disk can read ahead."""
        return read_tokens(self.file.open(), self.file.path, self.rows)


def tokens_bytes(file: h5py.File) -> int:
    """Return the size of all token states of a cache file in bytes."""
    return sum(int(file[name].size) * 2 for name in ("image_tokens", "text_tokens"))


def text_offsets(texts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return the offsets of n texts, (L, w_t) each, in their concatenation, (n + 1,)."""
    return np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64)


def read_tokens(file: h5py.File, path: Path, rows: NDArray[np.int64]) -> Tokens:
    """Read the token states of ``rows`` (any order), each stored chunk once.

    Raises
    ------
    CacheError
        A checksum shows that the file is damaged, or a number is not finite.
    """
    distinct, inverse = np.unique(rows, return_inverse=True)
    images, bounds = file["image_tokens"], file["text_offsets"][:].astype(np.int64)
    chunk = distinct // (images.chunks or (256,))[0]
    # Read up to 16 neighbouring chunks together; skip chunks without a requested row.
    cuts = np.flatnonzero((np.diff(chunk) > 1) | (np.diff(chunk // 16) > 0)) + 1
    image = np.empty((len(distinct), *images.shape[1:]), np.float16)
    texts: list[NDArray[np.float16]] = []
    try:
        for places in np.split(np.arange(len(distinct)), cuts) if len(distinct) else []:
            low, high = int(distinct[places[0]]), int(distinct[places[-1]]) + 1
            image[places] = images[low:high][distinct[places] - low]
            text = file["text_tokens"][int(bounds[low]) : int(bounds[high])]
            texts += [text[bounds[row] - bounds[low] : bounds[row + 1] - bounds[low]] for row in distinct[places]]
    except DAMAGE as error:
        raise damaged(path, "token states", error) from error
    finite = finite_rows(image) & np.array([np.isfinite(text).all() for text in texts], dtype=bool)
    if not finite.all():
        guid = file["guid"][int(distinct[int(np.argmin(finite))])].decode()
        raise CacheError(
            f"{np.count_nonzero(~finite)} rows of {path} have token states that are not finite, such as {guid!r}: "
            "run `mmcli featurize` again to encode them again, or remove them from the labels"
        )
    joined = np.concatenate(texts) if texts else np.zeros((0, file["text_tokens"].shape[1]), np.float16)
    return Tokens(image, joined, text_offsets(texts), inverse.astype(np.int64).reshape(-1))
