"""Features of some rows, in memory or left in the file until they are needed."""

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

_WINDOW_ROWS, _WINDOW_BYTES = 4096, 16 << 20  # read in one go, at most


class PaddedTokens(NamedTuple):
    """Token states of a batch: image (b, P, w_i) float16, text (b, L, w_t) float16, mask (b, L) bool."""

    image: NDArray[np.float16]
    text: NDArray[np.float16]
    mask: NDArray[np.bool_]


@dataclass(frozen=True)
class Tokens:
    """Last hidden states of n rows, in memory. Rows are picked without copying.

    Attributes
    ----------
    image
        (N, P, w_i) float16, of all rows that are in memory.
    text, offsets
        (sum L, w_t) float16 and (N + 1,) int64: text i is ``text[offsets[i]:offsets[i + 1]]``.
    rows
        (n,) int64: which of the N rows these are, in which order.
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
        """How many rows may be loaded at once."""
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
    """A cache file that is opened when it is first read, in whichever process that is.

    Attributes
    ----------
    path
        The cache file.
    stamp
        Of the file that the row numbers are of: another one may have been put in its place since.
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
            It was replaced since its rows were chosen.
        """
        if not self._opened:
            file = open_hdf5(self.path)
            if stamp_of(file) != self.stamp:
                file.close()
                raise CacheError(f"{self.path} was changed by another command meanwhile: run the same command again")
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
        (n,) int64: rows of the file.
    max_bytes
        How much may be in memory at once: one block that is in use and one that is being read.
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
        """How many rows may be loaded at once."""
        file = self.file.open()
        return max(1, int(self.max_bytes / 2 / (tokens_bytes(file) / max(len(file["guid"]), 1))))

    def take(self, rows: NDArray[np.int64]) -> StoredTokens:
        """Return the rows numbered ``rows``, still in the file."""
        return StoredTokens(self.file, self.rows[rows], self.max_bytes)

    def load(self) -> Tokens:
        """Read these rows into memory, in the order of the file, so that the disk reads ahead."""
        return read_tokens(self.file.open(), self.file.path, self.rows)


class Hash(Protocol):
    """A digest of ``hashlib`` in the making."""

    def update(self, data: bytes, /) -> object:
        """Add bytes."""


@dataclass(frozen=True)
class StoredRows:
    """Rows of one dataset of a cache file that stay in the file until they are asked for: ``stored[rows]``.

    Attributes
    ----------
    file, name
        The cache file; the dataset in it.
    rows
        (n,) int64: rows of the file.
    max_bytes
        How much may be in memory at once, of all datasets that are read together.
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
        """Size of a row."""
        return row_bytes(self._dataset)

    def __getitem__(self, rows: NDArray[np.int64] | slice) -> NDArray[Any]:
        values = read_rows(self._dataset, self.file.path, self.rows[rows])
        if not sound_rows(values).all():
            raise CacheError(
                f"{self.file.path} has rows of {self.name} that are not finite or all zero: `mmcli cache verify` lists "
                "them; featurize them again, or take them out of the labels or of the list"
            )
        return values

    def take(self, rows: NDArray[np.int64]) -> StoredRows:
        """Return the rows numbered ``rows``, still in the file."""
        return StoredRows(self.file, self.name, self.rows[rows], self.max_bytes)


Column = NDArray[Any] | StoredRows


@dataclass(frozen=True)
class Features:
    """What a head may look at: n rows, in memory or, but for ``tokens`` always all alike, left in the file.

    Attributes
    ----------
    image, text
        Embeddings, (n, d), float16 or float32 as they are stored.
    tokens
        Last hidden states; None unless asked for.
    views
        (n, K, d), embeddings of augmented images; None unless asked for.
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
        """Where the rows are in the file they are left in, (n,) int64; None where they are in memory."""
        return self.image.rows if isinstance(self.image, StoredRows) else None

    @property
    def at_once(self) -> int:
        """How many rows may be loaded at once."""
        if not isinstance(self.image, StoredRows):
            return max(1, len(self))
        columns = [each for each in (self.image, self.text, self.views) if isinstance(each, StoredRows)]
        return max(1, self.image.max_bytes // sum(each.row_bytes for each in columns))

    def load(self) -> Features:
        """Return these rows with their embeddings in memory."""
        everything = slice(None)
        views = None if self.views is None else self.views[everything]
        return Features(self.image[everything], self.text[everything], self.tokens, views, self.states)

    def hash_into(self, digest: Hash) -> None:
        """Add the numbers of the embeddings, in the order of the rows, to a digest."""
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
    """Size of a row of a dataset."""
    return int(dataset.dtype.itemsize * np.prod(dataset.shape[1:], dtype=np.int64))


def window_rows(dataset: h5py.Dataset) -> int:
    """How many rows of a dataset are read in one go, at most."""
    return min(_WINDOW_ROWS, max(1, _WINDOW_BYTES // max(row_bytes(dataset), 1)))


def read_rows(dataset: h5py.Dataset, path: Path, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return ``dataset`` at ``rows`` (any order, repeats allowed), first axis (n,).

    Raises
    ------
    CacheError
        Where the stored checksum says that the file at ``path`` is damaged.
    """
    values = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    order = np.argsort(rows, kind="stable")
    windows = rows[order] // window_rows(dataset)
    try:
        # A span in each window, then pick: far faster than HDF5's own selection of scattered rows.
        for picked in np.split(order, np.flatnonzero(np.diff(windows)) + 1) if len(rows) else []:
            low = int(rows[picked[0]])
            values[picked] = dataset[low : int(rows[picked[-1]]) + 1][rows[picked] - low]
    except DAMAGE as error:
        raise damaged(path, dataset.name.lstrip("/"), error) from error
    return values


def stamp_of(file: h5py.File) -> tuple[int, ...]:
    """Return what tells an open file from another one that is put in its place."""
    found = os.fstat(file.id.get_vfd_handle())
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def tokens_bytes(file: h5py.File) -> int:
    """Size of all token states of a cache file."""
    return sum(int(file[name].size) * 2 for name in ("image_tokens", "text_tokens"))


def finite_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows of (n, ...) hold finite numbers only, (n,)."""
    finite = np.empty(len(values), dtype=bool)
    for start in range(0, len(values), _WINDOW_ROWS):
        some = values[start : start + _WINDOW_ROWS]
        finite[start : start + len(some)] = np.isfinite(some).all(axis=tuple(range(1, values.ndim)))
    return finite


def sound_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows of (n, ...) hold finite numbers, not all zero, (n,): HDF5 reads a lost chunk as zeros."""
    return finite_rows(values) & values.any(axis=tuple(range(1, values.ndim)))


def text_offsets(texts: Sequence[NDArray[Any]]) -> NDArray[np.int64]:
    """Return where each of n texts, (L, w_t), begins when they are joined, and where the last ends, (n + 1,)."""
    return np.cumsum([0, *(len(text) for text in texts)], dtype=np.int64)


def check_finite(path: Path, name: str, values: NDArray[Any], guids: Sequence[str]) -> None:
    """Raise a CacheError where one of the rows, (n, ...), one per guid, is not finite or all zero; it names it."""
    finite = sound_rows(values)
    if not finite.all():
        raise CacheError(
            f"{np.count_nonzero(~finite)} rows of {path} have {name} embeddings that are not finite or all zero, the "
            f"first is {guids[int(np.argmin(finite))]!r}: `mmcli cache verify` lists them; featurize them again, or "
            "take them out of the labels or of the list"
        )


def read_tokens(file: h5py.File, path: Path, rows: NDArray[np.int64]) -> Tokens:
    """Read the token states of ``rows`` (any order), each stored chunk once.

    Raises
    ------
    CacheError
        Where a stored checksum says that the file is damaged, or a number is not finite.
    """
    there, back = np.unique(rows, return_inverse=True)
    images, bounds = file["image_tokens"], file["text_offsets"][:].astype(np.int64)
    chunk = there // (images.chunks or (256,))[0]
    # Neighbouring chunks are read together, up to 16 at a time; a chunk of which no row is wanted is skipped.
    cuts = np.flatnonzero((np.diff(chunk) > 1) | (np.diff(chunk // 16) > 0)) + 1
    image = np.empty((len(there), *images.shape[1:]), np.float16)
    texts: list[NDArray[np.float16]] = []
    try:
        for places in np.split(np.arange(len(there)), cuts) if len(there) else []:
            low, high = int(there[places[0]]), int(there[places[-1]]) + 1
            image[places] = images[low:high][there[places] - low]
            text = file["text_tokens"][int(bounds[low]) : int(bounds[high])]
            texts += [text[bounds[row] - bounds[low] : bounds[row + 1] - bounds[low]] for row in there[places]]
    except DAMAGE as error:
        raise damaged(path, "token states", error) from error
    finite = finite_rows(image) & np.array([np.isfinite(text).all() for text in texts], dtype=bool)
    if not finite.all():
        guid = file["guid"][int(there[int(np.argmin(finite))])].decode()
        raise CacheError(
            f"{np.count_nonzero(~finite)} rows of {path} have token states that are not finite, one is {guid!r}: "
            "run `mmcli featurize` again, which encodes them anew, or take them out of the labels"
        )
    joined = np.concatenate(texts) if texts else np.zeros((0, file["text_tokens"].shape[1]), np.float16)
    return Tokens(image, joined, text_offsets(texts), back.astype(np.int64).reshape(-1))
