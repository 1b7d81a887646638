"""The fits of one command: spread over cores, and kept on the disk until the run folder is written.

The name of a kept fit is a digest of all that it depends on.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import disk_full_is_clear
from ...cache.errors import MmcliError
from ...cache.features import Features
from ...featurize.encode import OnProgress
from ..model.head import Head, sizes_of
from ..model.inputs import Rows
from ..recipe import Recipe
from ..training.loop import Fit, FitOptions, fit
from ..training.training_rows import stretches_per_block
from .parallel import each_of, processes_for
from .tensor_file import TensorFileError, read_tensor_file, write_tensor_file

_CODE = ("cache", "featurize", "heads")  # code in these folders can change the result of a fit
_PACKAGE = Path(__file__).parents[2]
_KEPT_DAYS = 30


@dataclass(frozen=True)
class FitStore:
    """Keep fits in files of one folder: ``<key>.pt`` holds the plain data and tensors of a fit."""

    folder: Path

    def make_folder(self) -> None:
        """Make the folder; raise a DiskFullError if the disk is full."""
        with disk_full_is_clear(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def load(self, key: str) -> dict[str, Any] | None:
        """Return the content kept under ``key``; None if the file is missing or damaged."""
        with contextlib.suppress(OSError, TensorFileError):
            content = read_tensor_file(self.folder / f"{key}.pt")
            if isinstance(content, dict):
                return content
        return None

    def keep(self, key: str, content: Mapping[str, Any]) -> None:
        """Write plain data and tensors under ``key``, atomically."""
        write_tensor_file(self.folder / f"{key}.pt", content)

    def drop(self, keys: Iterable[str]) -> None:
        """Delete the fits named ``keys``, and files that other commands left a month ago.

        The folder stays, because a neighbour may be about to write into it.
        """
        for key in keys:
            (self.folder / f"{key}.pt").unlink(missing_ok=True)
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _KEPT_DAYS * 86_400:
                    path.unlink()


def key_of(settings: Mapping[str, Any], arrays: Iterable[NDArray[Any]]) -> str:
    """Return the name of a fit: a digest of ``settings`` (plain data), ``arrays``, our code and its libraries."""
    depends_on = {
        "code": _digest_of_this_code(),
        "versions": {name: version(name) for name in ("torch", "numpy", "scikit-learn", "transformers")},
        **settings,
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes() + b";")
    return digest.hexdigest()[:32]


def data_key(fingerprint: str, guids: Sequence[str], rows: Rows) -> str:
    """Return a digest of the numbers that a fit learns from: embeddings, views and classes.

    Token states are too large to be read for a digest. The fingerprint covers what they are made from, and embeddings
    of the same pass stand for them.
    """
    digest = hashlib.sha256(fingerprint.encode())
    digest.update("\n".join(guids).encode())
    rows.features.hash_into(digest)
    digest.update(rows.classes.tobytes())
    return digest.hexdigest()


def order_in_file(features: Features, rows: NDArray[np.int64] | slice = slice(None)) -> dict[str, Any] | None:
    """Return what the shuffling of ``rows`` depends on if they are left in the file; None if they are in memory."""
    if features.places is None:
        return None
    order = np.argsort(features.places[rows], kind="stable")
    return {"stretches": stretches_per_block(features), "order": hashlib.sha256(order.tobytes()).hexdigest()}


def code_digest(package: Path = _PACKAGE) -> str:
    """Return a digest of the source code that can change a fit, so that a change of code makes kept fits invalid.

    All files of these folders are read, because a list of modules would miss new modules.
    """
    digest = hashlib.sha256()
    sources = sorted(path for folder in _CODE for path in (package / folder).rglob("*.py"))
    if not sources:
        raise MmcliError(f"{package} holds no source code, so kept fits cannot be told from outdated ones: reinstall")
    for path in sources:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


_digest_of_this_code = functools.cache(code_digest)


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
    tasks: Sequence[FitTask], store: FitStore, jobs: int | None = None, on_fit: OnProgress | None = None
) -> list[Fit]:
    """Return the fit of each task; fits that an interrupted command finished come from ``store``.

    ``on_fit`` is called with (fits finished, number of fits); a single fit counts epochs instead, and stage 2 counts
    steps.
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


def _with_progress(task: FitTask, number: int, count: int, on_fit: OnProgress | None) -> FitTask:
    """Return ``task`` with a callback that counts its epochs, or in stage 2 the steps of all ``count`` fits."""
    if on_fit is None or (task.recipe.head == "linear" and task.start is None):
        return task
    if task.start is not None:
        options = replace(task.options, on_step=lambda done, steps: on_fit(number * steps + done, count * steps))
    else:
        epochs = task.recipe.epochs if task.options.rates is None else len(task.options.rates)
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
