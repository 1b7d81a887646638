"""Creating an HDF5 file on a disk that may be full.

HDF5 meets a failed write by crashing the process when the half-written file is closed. So it is given a file object
that never fails: the first error is kept, what follows is dropped, and the error is raised once HDF5 has let go.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py


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
def new_hdf5(path: Path) -> Iterator[NewFile]:
    """Create an HDF5 file. A write that failed raises its ``OSError`` at the end, or at ``check``."""
    with _Sink(path, "w+") as sink:
        with h5py.File(sink, "w") as file:
            yield NewFile(file, sink)
        sink.raise_failure()
