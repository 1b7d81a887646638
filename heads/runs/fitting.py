"""The fits of one command: spread over cores, and kept on the disk until the run folder is written."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..model.head import Head, sizes_of
from ..model.inputs import Rows
from ..recipe import Recipe
from ..training.loop import Fit, FitOptions, fit
from .fit_store import FitStore
from .parallel import each_of, processes_for

OnFit = Callable[[int, int], None]


@dataclass(frozen=True)
class FitTask:
    """One fit (see ``training.loop.fit``), and the key under which it is kept."""

    recipe: Recipe
    n_classes: int
    train: Rows
    val: Rows | None
    options: FitOptions
    key: str
    start: Head | None = None


def fit_tasks(
    tasks: Sequence[FitTask], store: FitStore, jobs: int | None = None, on_fit: OnFit | None = None
) -> list[Fit]:
    """Return the fit of each task; fits that an interrupted command finished come from ``store``.

    Parameters
    ----------
    on_fit
        Called with (fits finished, number of fits); a single fit counts epochs instead, and stage 2 counts steps.
    """
    store.make_folder()
    fits = {number: kept for number, task in enumerate(tasks) if (kept := _finished(task, store)) is not None}
    missing = [number for number in range(len(tasks)) if number not in fits]
    if len(tasks) == 1 or tasks[0].start is not None:
        for number in missing:
            fits[number] = _fit_and_keep(number, _with_progress(tasks[number], number, len(tasks), on_fit), store)[1]
        return [fits[number] for number in range(len(tasks))]
    if on_fit is not None:
        on_fit(len(fits), len(tasks))
    jobs = processes_for(len(tasks), jobs, tasks[0].options.device)
    for number, fitted in each_of(_fit_and_keep, [(number, tasks[number], store) for number in missing], jobs):
        fits[number] = fitted
        if on_fit is not None:
            on_fit(len(fits), len(tasks))
    return [fits[number] for number in range(len(tasks))]


def _with_progress(task: FitTask, number: int, count: int, on_fit: OnFit | None) -> FitTask:
    """Return ``task`` with a callback that counts its epochs, or in stage 2 the steps of all ``count`` fits."""
    if on_fit is None or (task.recipe.head == "linear" and task.start is None):
        return task
    if task.start is not None:
        options = replace(task.options, on_step=lambda done, steps: on_fit(number * steps + done, count * steps))
    else:
        epochs = task.recipe.epochs
        on_fit(0, epochs)
        options = replace(task.options, on_epoch=lambda record: on_fit(int(record["epoch"]), epochs))
    return replace(task, options=options)


def _fit_and_keep(number: int, task: FitTask, store: FitStore) -> tuple[int, Fit]:
    options = task.options
    if task.start is not None:
        kept = store.load(task.key)
        state = None if kept is None else kept.get("state")
        options = replace(options, resume=state, keep=lambda state: store.keep(task.key, {"state": state}))
    fitted = fit(task.recipe, task.n_classes, task.train, task.val, options, task.start)
    store.keep(task.key, {"weights": fitted.head.weights(), "history": fitted.history, "best_epoch": fitted.best_epoch})
    return number, fitted


def _finished(task: FitTask, store: FitStore) -> Fit | None:
    kept: dict[str, Any] | None = store.load(task.key)
    if kept is None or "weights" not in kept:
        return None
    head = task.start or Head(sizes_of(task.train.features), task.n_classes, task.recipe)
    head.load_weights(kept["weights"])
    return Fit(head.to(task.options.device).eval(), kept["history"], kept["best_epoch"])


def epochs_behind(tasks: Sequence[FitTask], store: FitStore) -> tuple[int, int]:
    """Return the numbers of finished fits, and of finished epochs of the next fit, of an interrupted command."""
    finished = epochs = 0
    for task in tasks:
        kept = store.load(task.key)
        if kept is not None and "weights" in kept:
            finished += 1
        elif kept is not None:
            epochs = len(kept["state"]["history"])
    return finished, epochs
