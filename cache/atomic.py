"""Writing a file completely or not at all, and by one process at a time.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from .errors import DiskFullError, LockedError, MmcliError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


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
    """Make ``folder`` and its parents, if they do not exist; raise a MmcliError if a file is in the way."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise MmcliError(f"cannot make the folder {folder}, a file is in its place: give another folder") from error


def fsync(path: Path) -> None:
    """Flush a closed file, or the names in a folder, to the disk. Windows cannot open folders, so it skips them."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``. On success it replaces ``path``; on failure it is removed.

    If ``path`` is a symbolic link, the file that it points at is replaced. A DiskFullError leaves its former content. A
    MmcliError says that ``path`` is a device, a pipe or a folder, or that its folder is a file.
    """
    path = path.resolve()
    if _is_special(path):
        raise MmcliError(f"{path} is a device or a pipe, not a file: give a file")
    _refuse_folder(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_full_is_clear(path):
            yield temporary
            fsync(temporary)
        os.replace(temporary, path)
        fsync(path.parent)  # so that the rename survives a power cut
    finally:
        temporary.unlink(missing_ok=True)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise MmcliError(f"{path} is a folder: give a file")


def _is_special(path: Path) -> bool:
    return path.exists() and not (path.is_file() or path.is_dir())


def refuse_to_overwrite(path: Path, magic: bytes, inputs: Iterable[str | Path] = ()) -> None:
    """Raise a MmcliError if an output path is a folder, one of ``inputs``, or an existing file of another kind.

    ``magic`` are the first bytes of a file of the right kind.
    """
    _refuse_folder(path)
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


@contextlib.contextmanager
def writer_lock(cache_path: Path, remedy: str = ", or give this one another --out") -> Iterator[None]:
    """Hold the right to write ``cache_path``; raise a LockedError at once if another process holds it.

    The operating system holds the lock, so it ends with the process, even after a crash. On a file system without locks
    (some NFS and Lustre mounts), a lock file names the process instead. filelock removes this file if the process no
    longer runs on this machine. ``remedy`` is advice for a user who does not want to wait.
    """
    make_folder(cache_path.parent)
    lock_file = cache_path.with_name(f".{cache_path.name}.lock")
    lock: BaseFileLock = FileLock(lock_file, fallback_to_soft=False)
    try:
        try:
            lock.acquire(timeout=0)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            # Use another name: the operating system's lock file stays behind and would look like a held lock.
            lock = SoftFileLock(lock_file.with_name(f"{lock_file.name}-holder"))
            lock.acquire(timeout=0)
    except Timeout as error:
        held = Path(error.lock_file)
        hint = "" if held == lock_file else f" (if no mmcli is running, delete {held})"
        raise LockedError(f"another mmcli is writing {cache_path}: wait until it ends{remedy}{hint}") from error
    try:
        yield
    finally:
        lock.release()
