"""One writer per cache. The operating system holds the lock, so it ends with the process, even after a crash.

On a file system without locks (some NFS and Lustre mounts), a lock file names the process instead. filelock removes
this file if the process no longer runs on this machine.
"""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from .atomic import make_folder
from .errors import LockedError

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}


@contextlib.contextmanager
def writer_lock(cache_path: Path, remedy: str = "give this one another --out") -> Iterator[None]:
    """Hold the right to write ``cache_path``.

    Parameters
    ----------
    remedy
        Advice for a user who does not want to wait.

    Raises
    ------
    LockedError
        Another process holds the lock. There is no waiting.
    """
    make_folder(cache_path.parent)
    lock_file = cache_path.with_name(f".{cache_path.name}.lock")
    try:
        lock = _locked(lock_file)
    except Timeout as error:
        held = Path(error.lock_file)
        hint = "" if held == lock_file else f" (if no mmcli is running, delete {held})"
        raise LockedError(f"another mmcli is writing {cache_path}: wait until it ends, or {remedy}{hint}") from error
    try:
        yield
    finally:
        lock.release()


def _locked(lock_file: Path) -> BaseFileLock:
    try:
        lock: BaseFileLock = FileLock(lock_file, fallback_to_soft=False)
        lock.acquire(timeout=0)
        return lock
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    # Use another name: the operating system's lock file stays behind and would look like a held lock.
    lock = SoftFileLock(lock_file.with_name(f"{lock_file.name}-holder"))
    lock.acquire(timeout=0)
    return lock
