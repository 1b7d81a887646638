"""Features of some rows, in memory or still in the file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import CacheError
from .hdf5 import DAMAGE, damaged, open_hdf5
from .states import States

_WINDOW_ROWS, _WINDOW_BYTES = 4096, 16 << 20  # limits of one read


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
class StoredFile:
    """A cache file that each process opens on its first read.

    Attributes
    ----------
    path
        The cache file.
    stamp
        Stamp of the file whose row numbers are used (see ``stamp_of``), because the file may be replaced.
    """

    path: Path
    stamp: tuple[int, ...]
    _opened: list[h5py.File] = field(default_factory=list, repr=False, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": []}

    def open(self) -> h5py.File:
        """Return the file, open.

        Raises
        ------
        CacheError
            The file was replaced after its rows were chosen.
        """
        if not self._opened:
            file = open_hdf5(self.path)
            if stamp_of(file) != self.stamp:
                file.close()
                raise CacheError(f"{self.path} was changed by another command: run the same command again")
            self._opened.append(file)
        return self._opened[0]


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


class Hash(Protocol):
    """An unfinished digest of ``hashlib``."""

    def update(self, data: bytes, /) -> object:
        """Add bytes."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of one dataset of a cache file, which stay in the file until ``stored[rows]`` reads them.

    Attributes
    ----------
    file, name
        The cache file, and the dataset in it.
    rows
        Rows of the file, (n,) int64.
    max_bytes
        Memory limit for all datasets that are read together.
    """

    file: StoredFile
    name: str
    rows: NDArray[np.int64]
    max_bytes: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def _dataset(self) -> h5py.Dataset:
        return self.file.open()[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (n, ...)."""
        return (len(self.rows), *self._dataset.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return row_bytes(self._dataset)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        values = read_rows(self._dataset, self.file.path, self.rows[rows])
        if not sound_rows(values).all():
            raise CacheError(
                f"{self.file.path} has rows of {self.name} that are not finite or all zero: list them with `mmcli "
                "cache verify`, then featurize them again, or remove them from the labels or the list"
            )
        return values

    def take(self, rows: NDArray[np.int64]) -> StoredRows:
        """Return the rows numbered ``rows``, still in the file."""
        return StoredRows(self.file, self.name, self.rows[rows], self.max_bytes)


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
        By tower (``text``, ``image``): what enters its unfrozen layers, where there are any.
    """

    image: Column
    text: Column
    tokens: Tokens | StoredTokens | None = None
    views: Column | None = None
    states: dict[str, States] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image)

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
        columns = [column for column in (self.image, self.text, self.views) if isinstance(column, StoredRows)]
        return max(1, self.image.max_bytes // sum(column.row_bytes for column in columns))

    def load(self) -> Features:
        """Return these rows with their embeddings in memory."""
        everything = slice(None)
        views = None if self.views is None else self.views[everything]
        return Features(self.image[everything], self.text[everything], self.tokens, views, self.states)

    def hash_into(self, digest: Hash) -> None:
        """Add the embeddings to a digest, in the order of the rows."""
        for column in (self.image, self.text, *(() if self.views is None else (self.views,))):
            for start in range(0, len(self), self.at_once):
                digest.update(np.ascontiguousarray(column[start : start + self.at_once]).tobytes())

    def in_fast_order(self) -> tuple[Features, NDArray[np.int64] | None]:
        """Return these rows in an order in which they are read or computed fast, and where each row went, (n,).

        The order is that of the file; where texts go through layers, texts of like length are together. None where the
        rows stay where they are.
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


def row_bytes(dataset: h5py.Dataset) -> int:
    """Return the size of a row of a dataset in bytes."""
    return int(dataset.dtype.itemsize * np.prod(dataset.shape[1:], dtype=np.int64))


def window_rows(dataset: h5py.Dataset) -> int:
    """Return the largest number of rows of a dataset to read at once."""
    return min(_WINDOW_ROWS, max(1, _WINDOW_BYTES // max(row_bytes(dataset), 1)))


def read_rows(dataset: h5py.Dataset, path: Path, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return ``dataset`` at ``rows`` (any order, repeats allowed), first axis (n,).

    Raises
    ------
    CacheError
        A checksum shows that the file at ``path`` is damaged.
    """
    values = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    order = np.argsort(rows, kind="stable")
    windows = rows[order] // window_rows(dataset)
    try:
        # Read a span and pick from it: far faster than HDF5's own selection of scattered rows.
        for picked in np.split(order, np.flatnonzero(np.diff(windows)) + 1) if len(rows) else []:
            low = int(rows[picked[0]])
            values[picked] = dataset[low : int(rows[picked[-1]]) + 1][rows[picked] - low]
    except DAMAGE as error:
        raise damaged(path, dataset.name.lstrip("/"), error) from error
    return values


def stamp_of(file: h5py.File) -> tuple[int, ...]:
    """Return a stamp that tells an open file from a file that replaces it."""
    status = os.fstat(file.id.get_vfd_handle())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def tokens_bytes(file: h5py.File) -> int:
    """Return the size of all token states of a cache file in bytes."""
    return sum(int(file[name].size) * 2 for name in ("image_tokens", "text_tokens"))


def finite_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows of ``values``, (n, ...), hold only finite numbers, (n,) bool."""
    finite = np.empty(len(values), dtype=bool)
    for start in range(0, len(values), _WINDOW_ROWS):
        window = values[start : start + _WINDOW_ROWS]
        finite[start : start + len(window)] = np.isfinite(window).all(axis=tuple(range(1, values.ndim)))
    return finite


def sound_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows of ``values``, (n, ...), are finite and not all zero, (n,) bool.

    HDF5 reads a lost chunk as zeros.
    """
    return finite_rows(values) & values.any(axis=tuple(range(1, values.ndim)))


def text_offsets(texts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return the offsets of n texts, (L, w_t) each, in their concatenation, (n + 1,)."""
    return np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64)


def check_finite(path: Path, name: str, values: NDArray[Any], guids: Sequence[str]) -> None:
    """Raise a CacheError that names the first guid whose row in ``values``, (n, ...), is not finite or all zero."""
    finite = sound_rows(values)
    if not finite.all():
        raise CacheError(
            f"{np.count_nonzero(~finite)} rows of {path} have {name} embeddings that are not finite or all zero, the "
            f"first is {guids[int(np.argmin(finite))]!r}: list them with `mmcli cache verify`, then featurize them "
            "again, or remove them from the labels or the list"
        )


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
