"""Work spread over cores: one process per core, one thread in each."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ...cache.errors import MmcliError
from ...cache.machine import cpu_count

Result = TypeVar("Result")

_watched = False  # whether this process, a worker, watches over the one that started it


def _leave_with(parent: int) -> None:
    """End this process when the one that started it is gone: killed, it can no longer tell its workers to leave."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    global _watched
    if os.name == "posix" and not _watched and os.getppid() == parent:
        _watched = True
        threading.Thread(target=watch, daemon=True).start()


def _call(parent: int, function: Callable[..., Result], task: tuple[Any, ...]) -> Result:
    _leave_with(parent)
    return function(*task)


def processes_for(tasks: int, jobs: int | None, device: str = "cpu") -> int:
    """Return how many processes some tasks get: ``jobs``, by default one per core; an accelerator is for one.

    Raises
    ------
    MmcliError
        ``jobs`` is less than 1.
    """
    if jobs is not None and jobs < 1:
        raise MmcliError(f"jobs must be 1 or more, found {jobs}")
    return min(jobs or cpu_count(), tasks) if device == "cpu" else 1


def each_of(
    function: Callable[..., Result], tasks: Sequence[tuple[Any, ...]], jobs: int | None = None
) -> Iterator[Result]:
    """Yield ``function(*task)`` of each task, as they are finished, in any order.

    Large arrays in the tasks are shared between the processes, not copied.

    Parameters
    ----------
    jobs
        Processes at once; default: one per core. With 1, or a single task, no process is started.

    Raises
    ------
    MmcliError
        What ``function`` raised, or that a process was killed.
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
                "a process that was working on this was killed, most likely for lack of memory: run the same command "
                "again with --jobs 1, or with a smaller --max-memory; what was finished is kept"
            ) from error
