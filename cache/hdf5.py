"""Opening HDF5 files, and creating them on a disk that may be full.

After a failed write, HDF5 crashes the process on close. So it gets a file object that never fails: the object keeps the
first error, drops later writes, and raises the error after HDF5 has closed the file.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from .errors import CacheError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_LOCKED = ("unable to lock file", "locking flag")  # the second if this process has the file open already

# Exceptions of h5py for a file with damaged structures.
DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, MemoryError)


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

    def raise_failure(self) -> None:
        """Raise the first error, if there was one."""
        if self.failure is not None:
            raise self.failure


class NewFile:
    """An HDF5 file under construction."""

    def __init__(self, file: h5py.File, sink: _Sink) -> None:
        self.file = file
        self._sink = sink

    def check(self) -> None:
        """Raise the first OSError of a write, if there was one."""
        self._sink.raise_failure()


@contextlib.contextmanager
def new_hdf5(path: Path, checksums: bool = False) -> Iterator[NewFile]:
    """Create an HDF5 file. The ``OSError`` of a failed write is raised at the end, or by ``check``.

    Parameters
    ----------
    checksums
        Whether to add checksums to the file's structures (HDF5 1.10). Such a file cannot be read while another program
        has it open for writing, so use this only for temporary files.
    """
    with _Sink(path, "w+") as sink:
        with h5py.File(sink, "w", libver=("v110", "v110") if checksums else None) as file:
            yield NewFile(file, sink)
        sink.raise_failure()


def damaged(path: Path, name: str, error: Exception) -> CacheError:
    """Return the error for a dataset ``name`` that cannot be read."""
    return CacheError(
        f"{path} is damaged: {name} cannot be read ({error}). Restore a copy, or move the file away and run "
        "`mmcli featurize` again"
    )


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
    return CacheError(
        f"{path} is not a readable HDF5 file, or is cut off ({error}): restore a copy, or move the file away and run "
        "`mmcli featurize` again"
    )


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
