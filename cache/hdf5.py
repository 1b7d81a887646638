"""HDF5 files: creating them on a disk that may be full, opening them, and reading rows in any order.

After a failed write, HDF5 crashes the process on close. So it gets a file object that never fails: the object keeps the
first error, drops later writes, and raises the error after HDF5 has closed the file.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import CacheError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LOCKED = ("unable to lock file", "locking flag")  # the second if this process has the file open already
_WINDOW_ROWS, _WINDOW_BYTES = 4096, 16 << 20  # limits of one read
RESTORE = "restore a copy, or move the file away and run `mmcli featurize` again"

# Exceptions of h5py for a file with damaged structures.
DAMAGE = (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, MemoryError)


class _Sink(io.FileIO):
    """A file whose writes always seem to succeed. ``failure`` is the first error."""

    failure: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        written = 0
        while written < len(view) and self.failure is None:
            try:
                written += super().write(view[written:])
            except OSError as error:
                self.failure = error
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        if self.failure is None:
            try:
                return super().truncate(size)
            except OSError as error:
                self.failure = error
        return size or 0

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        count = super().readinto(view) or 0
        view[count:] = bytes(len(view) - count)  # HDF5 may read back bytes that were dropped
        return len(view)

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self.failure is not None:
            raise self.failure


@contextlib.contextmanager
def new_hdf5(path: Path, checksums: bool = False) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """Create an HDF5 file. Yield it with a function that raises the ``OSError`` of a failed write, as the end does.

    ``checksums`` adds checksums to the file's structures (HDF5 1.10). Such a file cannot be read while another program
    has it open for writing, so use this only for temporary files.
    """
    with _Sink(path, "w+") as sink:
        with h5py.File(sink, "w", libver=("v110", "v110") if checksums else None) as file:
            yield file, sink.check
        sink.check()


@contextlib.contextmanager
def damage_is_clear(path: Path, name: str) -> Iterator[None]:
    """Turn an exception of h5py while dataset ``name`` is read into a ``CacheError``."""
    try:
        yield
    except DAMAGE as error:
        raise CacheError(f"{path} is damaged: {name} cannot be read ({error}). {RESTORE.capitalize()}") from error


def cannot_open(path: Path, error: OSError) -> CacheError:
    """Return the error for a file that HDF5 cannot open."""
    if any(words in str(error) for words in (*_LOCKED, "already open")):
        return CacheError(
            f"{path} is locked by another program ({error}): close it there (a notebook, a viewer), or set "
            "HDF5_USE_FILE_LOCKING=FALSE if the disk has no locks, then run the same command again"
        )
    if error.errno is not None:
        return CacheError(f"{path} cannot be opened ({os.strerror(error.errno)}): fix this and try again")
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            return CacheError(
                f"{path} is not a readable HDF5 file but another kind of file: give a file that `mmcli featurize` "
                "made, or another --out for a new cache"
            )
    return CacheError(f"{path} is not a readable HDF5 file, or is cut off ({error}): {RESTORE}")


def open_hdf5(path: Path) -> h5py.File:
    """Open a cache file for reading, with a chunk cache that holds one chunk of each dataset.

    If the file cannot be locked, it is opened without a lock, because a cache file never changes under its name. So a
    notebook may have it open, and the disk may have no locks.
    """
    file = _open(path, 2 << 20)
    if "text_tokens" not in file:
        return file
    file.close()
    return _open(path, 16 << 20)


def _open(path: Path, cache_bytes: int) -> h5py.File:
    try:
        return h5py.File(path, "r", rdcc_nbytes=cache_bytes)
    except OSError as error:
        if not any(words in str(error) for words in _LOCKED):
            raise
        # Not tried first, because HDF5 wants all handles of a file in one process to agree about locks.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=cache_bytes)


def stamp_of(file: h5py.File) -> tuple[int, ...]:
    """Return a stamp that tells an open file from a file that replaces it."""
    status = os.fstat(file.id.get_vfd_handle())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class StoredFile:
    """A cache file that each process opens on its first read. ``stamp`` tells whether it is still the same file."""

    path: Path
    stamp: tuple[int, ...]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "stamp": self.stamp}

    @cached_property
    def opened(self) -> h5py.File:
        """The open file; raises a CacheError if it was replaced after its rows were chosen."""
        file = open_hdf5(self.path)
        if stamp_of(file) != self.stamp:
            file.close()
            raise CacheError(f"{self.path} was changed by another command: run the same command again")
        return file


def slices(n: int, size: int) -> Iterator[slice]:
    """Yield slices of ``size`` rows that cover n rows in order; the last may be shorter."""
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def row_bytes(values: h5py.Dataset | NDArray[Any]) -> int:
    """Return the size of a row in bytes."""
    return int(values.dtype.itemsize * np.prod(values.shape[1:], dtype=np.int64))


def window_rows(dataset: h5py.Dataset) -> int:
    """Return the largest number of rows of a dataset to read at once."""
    return min(_WINDOW_ROWS, max(1, _WINDOW_BYTES // max(row_bytes(dataset), 1)))


def windows(dataset: h5py.Dataset, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], slice]]:
    """Yield (positions in ``rows``, span of the dataset that holds these rows), so that few reads give all ``rows``.

    To read a span and pick from it is far faster than HDF5's own selection of scattered rows.
    """
    order = np.argsort(rows, kind="stable")
    cuts = np.flatnonzero(np.diff(rows[order] // window_rows(dataset))) + 1
    for positions in np.split(order, cuts) if len(rows) else []:
        yield positions, slice(int(rows[positions[0]]), int(rows[positions[-1]]) + 1)


def read_rows(file: h5py.File, path: Path, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
    """Return dataset ``name`` at ``rows`` (any order, repeats allowed), first axis (n,).

    A CacheError says that the file at ``path`` is damaged, if a checksum shows it.
    """
    with damage_is_clear(path, name):
        dataset = file[name]
    values = np.empty((len(rows), *dataset.shape[1:]), dataset.dtype)
    with damage_is_clear(path, name):
        for positions, span in windows(dataset, rows):
            values[positions] = dataset[span][rows[positions] - span.start]
    return values


def finite_rows(values: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which rows of ``values``, (n, ...), hold only finite numbers, (n,) bool."""
    finite = np.empty(len(values), dtype=bool)
    for span in slices(len(values), _WINDOW_ROWS):
        finite[span] = np.isfinite(values[span]).all(axis=tuple(range(1, values.ndim)))
    return finite
