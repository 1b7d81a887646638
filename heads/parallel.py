"""Work spread over cores: one process per core, one thread in each."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ..cache.errors import MmcliError

Result = TypeVar("Result")


def cpu_count() -> int:
    """Return how many cores this process may use."""
    import joblib

    return int(joblib.cpu_count())


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

    if jobs is not None and jobs < 1:
        raise MmcliError(f"jobs must be 1 or more, found {jobs}")
    jobs = min(jobs or cpu_count(), len(tasks))
    if jobs <= 1:
        yield from (function(*task) for task in tasks)
        return
    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        pool = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", mmap_mode="c")
        try:
            yield from pool(joblib.delayed(function)(*task) for task in tasks)
        except TerminatedWorkerError as error:
            raise MmcliError(
                "a process that was working on this was killed, most likely for lack of memory: run the same command "
                "again with --jobs 1, or with a smaller --max-memory; what was finished is kept"
            ) from error
