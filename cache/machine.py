"""How many cores there are, and what glibc does with memory that was freed.

On other systems (musl, macOS, Windows) nothing is done about memory.
"""

import contextlib
import ctypes
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h


def cpu_count() -> int:
    """Return how many cores this process may use."""
    import joblib

    return int(joblib.cpu_count())


def keep_freed_memory() -> None:
    """Keep what is freed for the next batch.

    A batch's intermediate results are tens of megabytes, which the system would clear page by page for each layer: a
    fifth of the time of EfficientNet on two cores. It holds for the whole process until its end, so only the command
    line calls it, and only where it encodes; who uses the library may do so, too.
    """
    # An older glibc takes 32 MB at most. Without this one, the others would make a mapping of every result.
    if any(_call("mallopt", _M_MMAP_THRESHOLD, size) == 1 for size in (1 << 30, 1 << 25)):
        _call("mallopt", _M_ARENA_MAX, 1)
        _call("mallopt", _M_TRIM_THRESHOLD, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Give what was freed back to the system, before much is asked for in one piece."""
    _call("malloc_trim", 0)


def _call(name: str, *arguments: Any) -> Any:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        return getattr(ctypes.CDLL(None), name)(*arguments)
    return None
