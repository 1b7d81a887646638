"""Spread work over cores: one process per core, with one thread in each."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...cache.errors import MmcliError
from ...cache.machine import cpu_count

Result = TypeVar("Result")

_watches_parent = False  # whether this worker process watches the process that started it


def _leave_with(parent: int) -> None:
    """End this process when its parent is gone, because a killed parent cannot tell its workers to end."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    global _watches_parent
    if os.name == "posix" and not _watches_parent and os.getppid() == parent:
        _watches_parent = True
        threading.Thread(target=watch, daemon=True).start()


def _call(parent: int, function: Callable[..., Result], task: tuple[Any, ...]) -> Result:
    _leave_with(parent)
    return function(*task)


def processes_for(tasks: int, jobs: int | None, device: str = "cpu") -> int:
    """Return the number of processes: ``jobs``, by default one per core, at most ``tasks``; 1 on an accelerator."""
    if jobs is not None and jobs < 1:
        raise MmcliError(f"jobs must be 1 or more, found {jobs}")
    return min(jobs or cpu_count(), tasks) if device == "cpu" else 1


def each_of(
    function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], jobs: int | None = None
) -> Iterator[Result]:
    """Yield the result of ``function(*task)`` for each task as it is finished, in any order.

    Large arrays in the tasks are shared between the processes, not copied. With one process or one task, none is
    started. Raise an MmcliError if ``function`` raises it, or if a process is killed.
    """
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    jobs = processes_for(len(tasks), jobs)
    if jobs <= 1:
        yield from (function(*task) for task in tasks)
        return
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", mmap_mode="c")
        try:
            yield from pool(joblib.delayed(_call)(os.getpid(), function, task) for task in tasks)
        except TerminatedWorkerError as error:
            raise MmcliError(
                "a worker process was killed, most likely for lack of memory: run the same command again with "
                "--jobs 1, or with a smaller --max-memory; finished work is kept"
            ) from error
