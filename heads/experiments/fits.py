"""Fits of candidates on folds: spread over cores, and kept on the disk as soon as they are finished."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache.errors import MmcliError
from ...cache.store import FeatureCache
from ...featurize.backbones.opening import moved_to
from ...featurize.source import Source
from ..evaluation.folds import Fold
from ..evaluation.metrics import quick_scores
from ..model.fusions import fusion_class
from ..model.head import Head, predict_logits
from ..model.inputs import Rows
from ..model.losses import fit_offsets
from ..recipe import Recipe
from ..runs.fit_store import FitStore, key_of, order_in_file
from ..runs.last_layers import LastLayers, open_last_layers
from ..runs.parallel import each_of
from ..runs.stages import stage2_is_better
from ..training.loop import FitOptions, fit
from .candidates import Candidate
from .setup import Data, Setup


@dataclass(frozen=True)
class FoldFit:
    """Logits of the test rows of a fold, (n_test, C) float32, and duration, epochs and parameters of the fit."""

    candidate: str
    fold: Fold
    logits: NDArray[np.float32]
    seconds: float
    epochs: int
    parameters: int


@dataclass(frozen=True)
class _FoldTask:
    """A fold, and a candidate whose recipe has the seed for this fold."""

    candidate: Candidate
    fold: Fold
    data: Data
    key: str
    layers: LastLayers | None = None


def fit_all(data: Data, candidates: Sequence[Candidate], folds: Sequence[Fold], setup: Setup) -> list[FoldFit]:
    """Fit every candidate on every fold; finished fits are taken from the disk.

    The seed of a fit is the seed of the recipe plus the number of the fold, counted over all repeats. One seed for all
    folds would hide from the statistics how much a seed matters.

    The name of a kept fit is a digest of all that it depends on. So an interrupted experiment goes on where it stopped,
    and two experiments can share a fit.
    """
    store, progress = FitStore(setup.fits_folder), setup.on_fit
    results: dict[tuple[str, int, int], FoldFit] = {}
    missing: list[_FoldTask] = []
    for candidate in candidates:
        for number, fold in enumerate(folds):
            seeded = replace(candidate, recipe=candidate.recipe.reseeded(number))
            task = _FoldTask(seeded, fold, data, _key(data, seeded.recipe, fold))
            finished = _load(store, task)
            if finished is None:
                missing.append(task)
            else:
                results[candidate.name, fold.repeat, fold.fold] = finished
    total = len(candidates) * len(folds)
    if progress is not None:
        progress(len(results), total)
    store.make_folder()
    tasks = _with_last_layers(missing, data, setup)
    tasks.sort(key=lambda task: _is_long(task.candidate.recipe), reverse=True)  # so that no core is idle at the end
    for finished in each_of(_fit_fold, [(task, store) for task in tasks], setup.jobs):
        results[finished.candidate, finished.fold.repeat, finished.fold.fold] = finished
        if progress is not None:
            progress(len(results), total)
    return [results[candidate.name, fold.repeat, fold.fold] for candidate in candidates for fold in folds]


def _is_long(recipe: Recipe) -> tuple[bool, bool]:
    return recipe.finetune is not None, fusion_class(recipe.fusion, recipe.modality).needs_tokens


def _with_last_layers(tasks: Sequence[_FoldTask], data: Data, setup: Setup) -> list[_FoldTask]:
    """Add the unfrozen layers and their states to tasks with a stage 2; tasks with the same layers share them."""
    recipes = [task.candidate.recipe.finetune for task in tasks]
    if not any(recipes):
        return list(tasks)
    layers_of: dict[str, LastLayers] = {}
    with FeatureCache.open(setup.cache) as cache:
        place = moved_to(cache.header.backbone, setup.backbone)
        source = Source(cache.header.identity, place, data=setup.data)
        for recipe in recipes:
            if recipe is not None and str(recipe.layers()) not in layers_of:
                layers_of[str(recipe.layers())] = open_last_layers(
                    cache, recipe, source, {"all": data.guids}, {"all": data.rows}, setup.on_states
                )
    return [
        task if recipe is None else replace(task, layers=layers_of[str(recipe.layers())])
        for task, recipe in zip(tasks, recipes, strict=True)
    ]


def _fit_fold(task: _FoldTask, store: FitStore) -> FoldFit:
    started = time.perf_counter()
    candidate, fold = task.candidate, task.fold
    try:
        logits, epochs, parameters = _fitted(task)
    except MmcliError as error:
        raise MmcliError(f"{candidate.name}, repeat {fold.repeat + 1}, fold {fold.fold + 1}: {error}") from error
    fitted = FoldFit(candidate.name, fold, logits, time.perf_counter() - started, epochs, parameters)
    content = {
        "logits": torch.from_numpy(logits),
        "seconds": fitted.seconds,
        "epochs": epochs,
        "parameters": parameters,
    }
    store.keep(task.key, content)
    return fitted


def _fitted(task: _FoldTask) -> tuple[NDArray[np.float32], int, int]:
    """Return the logits of the test rows of the fold, (n, C), and the epochs and parameters of the last stage."""
    recipe, data, fold = task.candidate.recipe, task.data, task.fold
    rows = data.rows if task.layers is None else task.layers.rows["all"]
    train, stop, test = (rows.take(part) for part in (fold.train, fold.stop, fold.test))
    options = FitOptions(groups=data.groups[fold.train], score_train=False)
    fitted = fit(recipe.without_finetune(), len(data.classes), train, stop, options)
    epochs, parameters, head = len(fitted.history), fitted.head.n_parameters(), fitted.head
    if task.layers is not None:
        start = task.layers.start(head)
        fitted = fit(task.layers.resolved(recipe), len(data.classes), train, stop, options, start)
        epochs, parameters = len(fitted.history), fitted.head.n_parameters()
        if stage2_is_better(_macro_f1(head, stop, recipe), _macro_f1(fitted.head, stop, recipe)):
            head = fitted.head
    logits = predict_logits(head, test.features)
    if recipe.offsets:
        logits = logits + fit_offsets(predict_logits(head, stop.features), stop.classes)
    return logits, epochs, parameters


def _macro_f1(head: Head, stop: Rows, recipe: Recipe) -> float:
    logits = predict_logits(head, stop.features)
    decided = logits + fit_offsets(logits, stop.classes) if recipe.offsets else logits
    return quick_scores(stop.classes, decided.argmax(axis=1), logits.shape[1])["macro_f1"]


def _key(data: Data, recipe: Recipe, fold: Fold) -> str:
    settings = {
        "recipe": recipe.that_matter(),
        "left in the file": order_in_file(data.rows.features, fold.train),
        "data": data.key,
        "classes": data.classes,
    }
    return key_of(settings, (fold.train, fold.stop, fold.test, data.groups[fold.train]))


def _load(store: FitStore, task: _FoldTask) -> FoldFit | None:
    """Return the finished fit of a task; None if it is missing or damaged."""
    content = store.load(task.key)
    if content is None:
        return None
    logits = content["logits"].numpy()
    numbers = content["seconds"], content["epochs"], content["parameters"]
    return FoldFit(task.candidate.name, task.fold, logits, *numbers)


def by_candidate(fits: Iterable[FoldFit]) -> dict[str, list[FoldFit]]:
    """Group fits by the name of their candidate, in their order."""
    grouped: dict[str, list[FoldFit]] = {}
    for fitted in fits:
        grouped.setdefault(fitted.candidate, []).append(fitted)
    return grouped
