"""One writer per cache. The lock is the operating system's: it ends with the process, however that ends.

A file system without locks (some NFS and Lustre mounts) gets a lock file that names its process instead. filelock
removes such a file where that process is gone from this machine.
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
    """Hold the right to write ``cache_path``; ``remedy`` is what one may do instead of waiting.

    Raises
    ------
    LockedError
        At once, where another process holds it.
    """
    make_folder(cache_path.parent)
    lock_file = cache_path.with_name(f".{cache_path.name}.lock")
    try:
        lock = _locked(lock_file)
    except Timeout as error:
        where = Path(error.lock_file)
        left = "" if where == lock_file else f" (where no mmcli is running, delete {where})"
        raise LockedError(
            f"another mmcli is writing {cache_path}: wait until it has finished, or {remedy}{left}"
        ) from error
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
    # Under another name: the file of the operating system's lock stays, and would look like a lock that is held.
    lock = SoftFileLock(lock_file.with_name(f"{lock_file.name}-holder"))
    lock.acquire(timeout=0)
    return lock
