"""One writer per cache. The lock is the operating system's: it ends with the process, however that ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import LockedError


@contextlib.contextmanager
def writer_lock(cache_path: Path, remedy: str = "give this one another --out") -> Iterator[None]:
    """Hold the right to write ``cache_path``; ``remedy`` is what one may do instead of waiting.

    Raises
    ------
    LockedError
        At once, where another process holds it.
    """
    cache_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(cache_path.with_name(f".{cache_path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LockedError(f"another mmcli is writing {cache_path}: wait until it has finished, or {remedy}") from error
    try:
        yield
    finally:
        lock.release()
