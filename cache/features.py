"""The inputs of a head for some rows of a cache: embeddings and token states, in memory or still in the file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import CacheError
from .hdf5 import StoredFile, damage_is_clear, finite_rows, read_rows, row_bytes, slices, windows
from .states import States

_REMEDY = "list them with `mmcli cache verify`, then featurize them again, or remove them from the labels or the list"


@dataclass(frozen=True)
class StoredRows:
    """Rows of one dataset of a cache file, which stay in the file until ``stored[rows]`` reads them.

    ``rows`` are rows of the file, (n,) int64. ``max_bytes`` limits the memory of all datasets that are read together.
    """

    file: StoredFile
    name: str
    rows: NDArray[np.int64]
    max_bytes: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (n, ...)."""
        return (len(self.rows), *self.file.opened[self.name].shape[1:])

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        values = read_rows(self.file.opened, self.file.path, self.name, self.rows[rows])
        if not _sound_rows(values).all():
            raise CacheError(f"{self.file.path} has rows of {self.name} that are not finite or all zero: {_REMEDY}")
        return values

    def take(self, rows: NDArray[np.int64]) -> StoredRows:
        """Return the rows numbered ``rows``, still in the file."""
        return StoredRows(self.file, self.name, self.rows[rows], self.max_bytes)


def check_finite(path: Path, name: str, values: NDArray[Any], guids: Sequence[str]) -> None:
    """Raise a CacheError that names the first guid whose row in ``values``, (n, ...), is not finite or all zero."""
    sound = _sound_rows(values)
    if not sound.all():
        raise CacheError(
            f"{np.count_nonzero(~sound)} rows of {path} have {name} embeddings that are not finite or all zero, the "
            f"first is {guids[int(np.argmin(sound))]!r}: {_REMEDY}"
        )


def _sound_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows are finite and not all zero, (n,) bool; HDF5 reads a lost chunk as zeros."""
    return finite_rows(values) & values.any(axis=tuple(range(1, values.ndim)))


class PaddedTokens(NamedTuple):
    """Token states of a batch: image (b, P, w_i) float16, text (b, L, w_t) float16, mask (b, L) bool."""

    image: NDArray[np.float16]
    text: NDArray[np.float16]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Tokens:
    """Last hidden states of n rows, in memory. Picking rows copies nothing.

    Of the N rows in memory, ``image`` is (N, P, w_i) float16, and text i is ``text[offsets[i]:offsets[i + 1]]``, where
    ``text`` is (sum L, w_t) float16 and ``offsets`` is (N + 1,) int64. ``rows``, (n,) int64, numbers n of the N.
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

    ``rows`` are rows of the file, (n,) int64. ``max_bytes`` limits the memory of two blocks: one in use and one being
    read.
    """

    file: StoredFile
    rows: NDArray[np.int64]
    max_bytes: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def widths(self) -> tuple[int, int]:
        """Return (w_i, w_t)."""
        file = self.file.opened
        return int(file["image_tokens"].shape[2]), int(file["text_tokens"].shape[1])

    @cached_property
    def at_once(self) -> int:
        """Number of rows that may be loaded at once."""
        return max(1, int(self.max_bytes / 2 / token_row_bytes(self.file.opened)))

    def take(self, rows: NDArray[np.int64]) -> StoredTokens:
        """Return the rows numbered ``rows``, still in the file."""
        return StoredTokens(self.file, self.rows[rows], self.max_bytes)

    def load(self) -> Tokens:
        """Read these rows into memory, in file order, so that the disk can read ahead."""
        return read_tokens(self.file.opened, self.file.path, self.rows)


def token_row_bytes(file: h5py.File) -> float:
    """Return the mean size of a row's token states in a cache file, in bytes."""
    return sum(int(file[name].size) * 2 for name in ("image_tokens", "text_tokens")) / max(len(file["guid"]), 1)


def text_offsets(texts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return the offsets of n texts, (L, w_t) each, in their concatenation, (n + 1,)."""
    return np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64)


def read_tokens(file: h5py.File, path: Path, rows: NDArray[np.int64]) -> Tokens:
    """Read the token states of ``rows`` (any order), each stored chunk once.

    A CacheError says that a checksum is wrong, or that a number is not finite.
    """
    distinct, inverse = np.unique(rows, return_inverse=True)
    images = file["image_tokens"]
    image = np.empty((len(distinct), *images.shape[1:]), np.float16)
    texts: list[NDArray[np.float16]] = []
    with damage_is_clear(path, "token states"):
        bounds = file["text_offsets"][:].astype(np.int64)
        for places, span in windows(images, distinct):
            image[places] = images[span][distinct[places] - span.start]
            start = bounds[span.start]
            text = file["text_tokens"][int(start) : int(bounds[span.stop])]
            texts += [text[bounds[row] - start : bounds[row + 1] - start] for row in distinct[places]]
    finite = finite_rows(image) & np.array([np.isfinite(text).all() for text in texts], dtype=bool)
    if not finite.all():
        guid = file["guid"][int(distinct[int(np.argmin(finite))])].decode()
        raise CacheError(
            f"{np.count_nonzero(~finite)} rows of {path} have token states that are not finite, such as {guid!r}: "
            "run `mmcli featurize` again to encode them again, or remove them from the labels"
        )
    joined = np.concatenate(texts) if texts else np.zeros((0, file["text_tokens"].shape[1]), np.float16)
    return Tokens(image, joined, text_offsets(texts), inverse.astype(np.int64).reshape(-1))


Column = NDArray[Any] | StoredRows


@dataclass(frozen=True)
class Features:
    """Inputs of a head for n rows. All columns are in memory, or all are in the file; only ``tokens`` may differ.

    Attributes
    ----------
    image, text
        Embeddings, (n, d) float16 or float32, as stored.
    tokens
        Last hidden states. None if not requested.
    views
        Embeddings of augmented images, (n, K, d). None if not requested.
    states
        States that enter the unfrozen layers, by tower (``text``, ``image``), for towers with unfrozen layers.
    """

    image: Column
    text: Column
    tokens: Tokens | StoredTokens | None = None
    views: Column | None = None
    states: dict[str, States] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image)

    @property
    def _columns(self) -> list[Column]:
        return [column for column in (self.image, self.text, self.views) if column is not None]

    def take(self, rows: NDArray[np.int64]) -> Features:
        """Return the rows numbered ``rows``, in that order."""
        return Features(
            _take(self.image, rows),
            _take(self.text, rows),
            None if self.tokens is None else self.tokens.take(rows),
            None if self.views is None else _take(self.views, rows),
            {tower: states.take(rows) for tower, states in self.states.items()},
        )

    @property
    def places(self) -> NDArray[np.int64] | None:
        """Rows of the file, (n,) int64, or None if the embeddings are in memory."""
        return self.image.rows if isinstance(self.image, StoredRows) else None

    @property
    def at_once(self) -> int:
        """Number of rows that may be loaded at once."""
        if not isinstance(self.image, StoredRows):
            return max(1, len(self))
        file = self.image.file.opened
        bytes_together = sum(row_bytes(file[column.name]) for column in self._columns if isinstance(column, StoredRows))
        return max(1, self.image.max_bytes // bytes_together)

    def load(self) -> Features:
        """Return these rows with their embeddings in memory."""
        image, text, *views = [column[:] for column in self._columns]
        return Features(image, text, self.tokens, views[0] if views else None, self.states)

    def hash_into(self, digest: hashlib._Hash) -> None:
        """Add the embeddings to a digest, in the order of the rows."""
        for column in self._columns:
            for span in slices(len(self), self.at_once):
                digest.update(np.ascontiguousarray(column[span]).tobytes())

    def in_fast_order(self) -> tuple[Features, NDArray[np.int64] | None]:
        """Return these rows in the fastest order to read or compute, and the new position of each row, (n,).

        The order is by text length if text layers are unfrozen (to need less padding), else by row in the file.
        Positions are None if the order does not change.
        """
        if "text" in self.states:
            order = np.argsort(self.states["text"].lengths(), kind="stable")
        elif self.places is not None:
            order = np.argsort(self.places, kind="stable")
        else:
            return self, None
        return self.take(order), np.argsort(order)


def _take(column: Column, rows: NDArray[np.int64]) -> Column:
    return column.take(rows) if isinstance(column, StoredRows) else column[rows]
