"""Opening an HDF5 file, and creating one on a disk that may be full.

HDF5 meets a failed write by crashing the process when the half-written file is closed. So it is given a file object
that never fails: the first error is kept, what follows is dropped, and the error is raised once HDF5 has let go.
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
_LOCKED = ("unable to lock file", "locking flag")  # the second: this process has the file open already

# What h5py raises where the structures of a file are damaged.
DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, MemoryError)


class _Sink(io.FileIO):
    """A file whose writes always seem to succeed; ``failure`` is the first error there was."""

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
        view[count:] = bytes(len(view) - count)  # HDF5 may read back what was dropped
        return len(view)

    def raise_failure(self) -> None:
        """Raise the error that writing met, if it met one."""
        if self.failure is not None:
            raise self.failure


class NewFile:
    """An HDF5 file under construction."""

    def __init__(self, file: h5py.File, sink: _Sink) -> None:
        self.file = file
        self._sink = sink

    def check(self) -> None:
        """Raise the OSError that writing has met by now, if it has met one."""
        self._sink.raise_failure()


@contextlib.contextmanager
def new_hdf5(path: Path, checksums: bool = False) -> Iterator[NewFile]:
    """Create an HDF5 file. A write that failed raises its ``OSError`` at the end, or at ``check``.

    Parameters
    ----------
    checksums
        Give the file's own structures checksums, as HDF5 1.10 can. Nobody can read such a file while another program
        has it open for writing, so it is for files of our own.
    """
    with _Sink(path, "w+") as sink:
        with h5py.File(sink, "w", libver=("v110", "v110") if checksums else None) as file:
            yield NewFile(file, sink)
        sink.raise_failure()


def damaged(path: Path, name: str, error: Exception) -> CacheError:
    """Return the error that says that dataset ``name`` of the file at ``path`` cannot be read."""
    return CacheError(
        f"{path} is damaged: {name} cannot be read ({error}); restore a copy, or put it aside and run "
        "`mmcli featurize` again"
    )


def cannot_open(path: Path, error: OSError) -> CacheError:
    """Return the error that says why HDF5 cannot open the file at ``path``."""
    if any(words in str(error) for words in (*_LOCKED, "already open")):
        return CacheError(
            f"{path} is held by another program ({error}): close it there (a notebook, a viewer), or set "
            "HDF5_USE_FILE_LOCKING=FALSE where the disk has no locks, and run the same command again"
        )
    if error.errno is not None:
        return CacheError(f"{path} cannot be opened ({os.strerror(error.errno)}): mend that and try again")
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            return CacheError(
                f"{path} is not a readable HDF5 file but of another kind: give one that `mmcli featurize` made, or, "
                "for a new one, another --out"
            )
    return CacheError(
        f"{path} is not a readable HDF5 file, or is cut off ({error}): put it aside and run "
        "`mmcli featurize` again, or restore a copy of it"
    )


def open_hdf5(path: Path) -> h5py.File:
    """Open a cache file for reading, with room for a chunk of each dataset; those of text tokens are larger.

    Where no lock is to be had, none is taken: a cache file does not change under its name. So a notebook may hold it,
    and a disk may have no locks.
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
        # Not at once without: within one process, HDF5 wants all who open a file to agree about locks.
        return h5py.File(path, "r", locking=False, rdcc_nbytes=cache_bytes)
