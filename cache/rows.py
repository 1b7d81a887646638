"""Rows of cache files: reading them, leaving them in the file, and checking their numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import CacheError
from .hdf5 import DAMAGE, damaged, open_hdf5

_WINDOW_ROWS, _WINDOW_BYTES = 4096, 16 << 20  # limits of one read


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


def check_finite(path: Path, name: str, values: NDArray[Any], guids: Sequence[str]) -> None:
    """Raise a CacheError that names the first guid whose row in ``values``, (n, ...), is not finite or all zero."""
    finite = sound_rows(values)
    if not finite.all():
        raise CacheError(
            f"{np.count_nonzero(~finite)} rows of {path} have {name} embeddings that are not finite or all zero, the "
            f"first is {guids[int(np.argmin(finite))]!r}: list them with `mmcli cache verify`, then featurize them "
            "again, or remove them from the labels or the list"
        )
