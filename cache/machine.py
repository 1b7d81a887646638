"""The number of cores, and how glibc treats freed memory.

On other systems (musl, macOS, Windows) the functions for memory do nothing.
"""

import contextlib
import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


def cpu_count() -> int:
    """Return the number of cores that this process may use."""
    import joblib

    return int(joblib.cpu_count())


def keep_freed_memory() -> None:
    """Keep freed memory in the process, for the next batch.

    A batch's intermediate results take tens of megabytes. Without this, the system clears these page by page for each
    layer, which takes a fifth of the time of EfficientNet on two cores. The setting lasts until the process ends, so
    only the command line calls this, and only for encoding. A program that uses the library may call it too.
    """
    # Setting any of these disables glibc's dynamic mmap threshold, so set that one first. Old versions allow 32 MB.
    if any(_call("mallopt", _M_MMAP_THRESHOLD, size) == 1 for size in (1 << 30, 1 << 25)):
        _call("mallopt", _M_ARENA_MAX, 1)
        _call("mallopt", _M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Return freed memory to the system, before a large allocation."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: Any) -> Any:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        return getattr(ctypes.CDLL(None), name)(*arguments)
    return None
