"""Writing a file completely or not at all: temporary name in the same folder, fsync, ``os.replace``."""

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import DiskFullError, MmcliError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def disk_full_is_clear(path: Path) -> Iterator[None]:
    """Turn an ``OSError`` for lack of disk space while writing ``path`` into a ``DiskFullError``."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(
            f"not enough disk space to write {path} ({free / 1e6:.0f} MB free on that disk): free some space or choose "
            "another place, then run the same command again; finished work is kept"
        ) from error


def make_folder(folder: Path) -> None:
    """Make ``folder`` and its parents, if they do not exist.

    Raises
    ------
    MmcliError
        There is a file instead of the folder or of a parent.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MmcliError(f"cannot make the folder {folder}, a file is in its place: give another folder") from error


def fsync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut. Windows cannot open folders, so this does nothing there."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Flush a closed file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. On success it replaces ``path``; on failure it is removed.

    If ``path`` is a symbolic link, the file that it points at is replaced.

    Raises
    ------
    DiskFullError
        The disk is full. ``path`` keeps its former content.
    MmcliError
        ``path`` is a device, a pipe or a folder, or its folder is a file.
    """
    path = path.resolve()
    if _is_special(path):
        raise MmcliError(f"{path} is a device or a pipe, not a file: give a file")
    if path.is_dir():
        raise MmcliError(f"{path} is a folder: give a file")
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_is_clear(path):
            yield temporary
            fsync_file(temporary)
        os.replace(temporary, path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _is_special(path: Path) -> bool:
    return path.exists() and not (path.is_file() or path.is_dir())


def refuse_to_overwrite(path: Path, magic: bytes, inputs: Iterable[str | Path] = ()) -> None:
    """Refuse an output path that is a folder, an input, or an existing file of another kind.

    Parameters
    ----------
    path
        The output path.
    magic
        First bytes of a file of the right kind.
    inputs
        Files that the command reads.

    Raises
    ------
    MmcliError
        The path is refused.
    """
    if path.is_dir():
        raise MmcliError(f"{path} is a folder: give a file")
    if any(path.resolve() == Path(source).resolve() for source in inputs):
        raise MmcliError(f"{path} is an input of this command: write to another file")
    if path.is_file() and path.stat().st_size:
        with path.open("rb") as file:
            if file.read(len(magic)) != magic:
                raise MmcliError(f"{path} exists and is another kind of file: remove it, or write to another file")


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write ``content`` to ``path``, atomically unless it is a device or a pipe."""
    if _is_special(path):
        with disk_full_is_clear(path):
            path.write_bytes(content)
        return
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write ``content`` to ``path`` atomically, as UTF-8. Lone surrogates are written as escapes."""
    write_bytes(path, content.encode(errors="backslashreplace"))


def write_json(path: Path, value: object) -> None:
    """Write plain data to ``path`` atomically, as indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def remove_leftovers(path: Path) -> None:
    """Delete temporary files that a killed writer of ``path`` left. Call this only while holding the lock."""
    path = path.resolve()
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.[0-9]*.tmp"):
        leftover.unlink(missing_ok=True)
