"""Fits of candidates on folds: spread over cores, and each kept on the disk as soon as it is finished."""

import contextlib
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import disk_full_is_clear, write_bytes
from ...cache.errors import MmcliError
from ..folds import Fold
from ..inputs import Rows
from ..losses import fit_offsets
from ..parallel import each_of
from ..recipe import Recipe
from ..training import fit, predict_logits

_VERSION = 2  # of what a fit does; raise it when a change here or in training changes results

OnFit = Callable[[int, int], None]


@dataclass(frozen=True)
class Candidate:
    """A recipe under the name by which tables show it."""

    name: str
    recipe: Recipe


@dataclass(frozen=True)
class Data:
    """Labelled rows of a cache, and what tells them from others.

    Attributes
    ----------
    rows
        Features and classes, n of them.
    guids, groups
        Of each row; rows of one group are copies.
    classes
        Names, in the order of the class numbers.
    key
        Of the features: their fingerprint and their numbers.
    """

    rows: Rows
    guids: list[str]
    groups: NDArray[np.int64]
    classes: list[str]
    key: str


@dataclass(frozen=True)
class FoldFit:
    """What became of one candidate on one fold.

    Attributes
    ----------
    logits
        (n_test, C) float32, of the fold's test rows.
    seconds, epochs, parameters
        Of the fit. Of a linear head, one epoch.
    """

    candidate: str
    fold: Fold
    logits: NDArray[np.float32]
    seconds: float
    epochs: int
    parameters: int


def data_key(fingerprint: str, guids: Sequence[str], rows: Rows) -> str:
    """Return a digest of the numbers that a fit learns from: embeddings, views and classes.

    Token states are too many to be read for it; what they are made from is in the fingerprint, and the embeddings of
    the same pass stand for them.
    """
    digest = hashlib.sha256(fingerprint.encode())
    digest.update("\n".join(guids).encode())
    for array in (rows.features.image, rows.features.text, rows.features.views, rows.classes):
        digest.update(b"" if array is None else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def fit_all(
    data: Data,
    candidates: Sequence[Candidate],
    folds: Sequence[Fold],
    kept: Path,
    jobs: int | None = None,
    on_fit: OnFit | None = None,
) -> list[FoldFit]:
    """Fit every candidate on every fold; those that are already in ``kept`` are taken from there.

    The seed of a fit is the recipe's plus the number of the fold, counted over all repeats. One seed for all folds
    would make their fits alike, and hide from the statistics how much a seed matters.

    Parameters
    ----------
    kept
        Folder of finished fits, each named by a digest of all that it depends on, so that an interrupted experiment
        goes on where it was and another one that shares a fit does not repeat it.
    jobs
        Processes; default: one per core.
    on_fit
        Called with (fits finished, fits there are).
    """
    tasks = []
    found: dict[tuple[str, int, int], FoldFit] = {}
    for candidate in candidates:
        for number, fold in enumerate(folds):
            recipe = candidate.recipe.reseeded(number)
            path = kept / f"{_key(data, recipe, fold)}.npz"
            finished = _load(path, candidate.name, fold)
            if finished is None:
                tasks.append((candidate.name, recipe, data.rows, len(data.classes), data.groups, fold, path))
            else:
                found[candidate.name, fold.repeat, fold.fold] = finished
    total = len(candidates) * len(folds)
    if on_fit is not None:
        on_fit(len(found), total)
    with disk_full_is_clear(kept):
        kept.mkdir(parents=True, exist_ok=True)
    for each in each_of(_fit_one, sorted(tasks, key=_expected_cost, reverse=True), jobs):
        found[each.candidate, each.fold.repeat, each.fold.fold] = each
        if on_fit is not None:
            on_fit(len(found), total)
    return [found[candidate.name, fold.repeat, fold.fold] for candidate in candidates for fold in folds]


def _expected_cost(task: tuple[Any, ...]) -> int:
    """Long fits first, so that no core is idle at the end."""
    recipe: Recipe = task[1]
    return {"cross_attn": 3, "late": 2, "film": 2}.get(recipe.sees, 1) if recipe.head == "mlp" else 2


def _fit_one(
    name: str, recipe: Recipe, rows: Rows, n_classes: int, groups: NDArray[np.int64], fold: Fold, path: Path
) -> FoldFit:
    started = time.perf_counter()
    try:
        stop = rows.take(fold.stop)
        done = fit(recipe, n_classes, rows.take(fold.train), stop, score_train=False, groups=groups[fold.train])
        logits = predict_logits(done.head, rows.features.take(fold.test))
        if recipe.offsets:
            logits = logits + fit_offsets(predict_logits(done.head, stop.features), stop.classes)
    except MmcliError as error:
        raise MmcliError(f"{name}, repeat {fold.repeat + 1}, fold {fold.fold + 1}: {error}") from error
    seconds = time.perf_counter() - started
    result = FoldFit(name, fold, logits, seconds, len(done.history), done.head.n_parameters())
    _save(path, result)
    return result


def _key(data: Data, recipe: Recipe, fold: Fold) -> str:
    digest = hashlib.sha256()
    depends_on = {
        "version": _VERSION,
        "torch": version("torch"),
        "scikit-learn": version("scikit-learn"),
        "recipe": recipe.that_matter(),
        "data": data.key,
        "classes": data.classes,
    }
    digest.update(json.dumps(depends_on, sort_keys=True).encode())
    for rows in (fold.train, fold.stop, fold.test, data.groups[fold.train]):
        digest.update(rows.tobytes() + b";")
    return digest.hexdigest()[:32]


def _save(path: Path, result: FoldFit) -> None:
    buffer = io.BytesIO()
    numbers = np.array([result.seconds, result.epochs, result.parameters], dtype=np.float64)
    np.savez(buffer, logits=result.logits, numbers=numbers)
    write_bytes(path, buffer.getvalue())


def _load(path: Path, name: str, fold: Fold) -> FoldFit | None:
    """Return the finished fit at ``path``; None where there is none, or none that can be read."""
    if not path.is_file():
        return None
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(path, allow_pickle=False) as stored,
    ):
        seconds, epochs, parameters = stored["numbers"].tolist()
        return FoldFit(name, fold, stored["logits"], seconds, int(epochs), int(parameters))
    return None


def by_candidate(fits: Iterable[FoldFit]) -> dict[str, list[FoldFit]]:
    """Group fits by the name of their candidate, in their order."""
    grouped: dict[str, list[FoldFit]] = {}
    for each in fits:
        grouped.setdefault(each.candidate, []).append(each)
    return grouped
