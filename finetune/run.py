"""``finetune``: from a best.pt of stage 1 and the raw pairs to a run folder of stage 2."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..cache.errors import CheckpointError, MmcliError
from ..cache.store import FeatureCache
from ..featurize.backbones.opening import moved_to
from ..featurize.backbones.towers import Top
from ..heads.evaluation.division import renamed
from ..heads.evaluation.duplicates import Groups, group_numbers, separated
from ..heads.evaluation.splits import Split
from ..heads.model.head import Head
from ..heads.runs.checkpoint import Checkpoint, read_best_pt
from ..heads.runs.folders import check_writable
from ..heads.runs.labelled import changed_labels, class_numbers, labels_of, usable_rows
from ..heads.runs.run_folder import config_of, write_run
from .model import Finetuned, StateRows
from .outcome import Outcome
from .progress import Progress
from .recipe import FinetuneRecipe, recipe_for
from .source import Source
from .store import OnProgress, StateStore
from .training import FinetuneFit, Labelled, finetune_fit


@dataclass(frozen=True)
class Watch:
    """What is told on the way; each may be None.

    Attributes
    ----------
    on_states
        Called with (pairs computed, pairs to compute) while the frozen part is computed.
    on_step
        Called with (steps done, steps at most) while models are trained.
    on_note
        Called with a sentence for the user.
    """

    on_states: OnProgress | None = None
    on_step: OnProgress | None = None
    on_note: Callable[[str], None] | None = None

    def note(self, text: str) -> None:
        """Tell a sentence."""
        if self.on_note is not None:
            self.on_note(text)


def finetune(
    best_pt: str | Path,
    settings: Mapping[str, Any] | None = None,
    cache_path: str | Path | None = None,
    labels_path: str | Path | None = None,
    data: str | Path | None = None,
    backbone: str | None = None,
    runs: str | Path = "artifacts/runs",
    seeds: int | None = None,
    resume: bool = False,
    device: str = "cpu",
    max_bytes: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train the last layers of the backbone together with a trained head, and write a run folder.

    Split, classes, loss and backbone are those of ``best_pt``. Its test rows are scored once, at the end; the
    epoch, and whether stage 2 is kept at all, are chosen on its validation rows.

    Parameters
    ----------
    best_pt
        Of stage 1, its file or run folder. One of stage 2 stands for the stage 1 that it was made from.
    settings
        Of ``FinetuneRecipe``, by name; the others have their defaults.
    cache_path, labels_path
        Default: those that the head was trained with.
    data, backbone
        Where the raw pairs and the backbone are now; default: as recorded in the cache.
    runs
        Where the run folder goes; ``latest`` in it points at the newest.
    seeds
        Train this many models, whose probabilities are averaged; default: one for each head in ``best_pt``.
    resume
        Go on from the last finished epoch of an interrupted run of the same.
    max_bytes
        Token states that take more than this are read from the cache as they are needed.

    Returns
    -------
    dict
        What ``metrics.json`` holds. ``train``, ``val`` and ``test`` are the scores of what best.pt holds, which is
        ``kept``: ``stage 2``, or ``stage 1`` where stage 2 is no better on the validation rows. ``stage1`` and
        ``stage2``: scores of either, and ``gap`` (training less validation macro-F1). ``difference``: stage 2 less
        stage 1 on ``val`` and ``test``, with an interval over rows. ``overfitting``: in which epochs, by seed.
        ``seeds``, ``epochs`` and ``best_epoch`` are those of stage 2, whichever is kept.

    Raises
    ------
    CheckpointError
        ``best_pt`` is missing, has no validation rows, or belongs to other features.
    BackboneError
        The backbone is not at hand, is another one, or has fewer layers.
    DataError
        Rows without labels; raw pairs that are gone or changed.
    """
    started = time.perf_counter()
    watch = watch or Watch()
    runs = Path(runs)
    stage1 = _stage1(best_pt, device, watch)
    check_writable(runs)
    recipe = recipe_for(stage1.recipe.modality, settings or {})
    count = len(stage1.seeds) if seeds is None else seeds
    if count < 1:
        raise MmcliError(f"seeds must be 1 or more, found {count}")
    with FeatureCache.open(stage1.cache_path(cache_path)) as cache:
        stage1.check_cache(cache)
        labels_file, labels, absent = labels_of(cache, stage1.labels_path(labels_path))
        known = renamed(labels, stage1.relabelled)
        usable = {
            name: usable_rows(name, guids, known, stage1.classes)
            for name, guids in stage1.split.named().items()
            if guids
        }
        parts = {name: rows.guids for name, rows in usable.items()}
        stage1 = replace(stage1, backbone=moved_to(stage1.backbone, backbone))
        source = Source(stage1.identity, stage1.backbone, device, data)
        recipe = source.resolved(recipe)
        tops = source.tops(recipe.layers())
        rows = read_rows(cache, parts, recipe, source, stage1.head.needs_tokens, max_bytes, watch.on_states)
        source.forget()
        labelled = {
            name: Labelled(rows[name], class_numbers(guids, known, stage1.classes)) for name, guids in parts.items()
        }
        ready = time.perf_counter() - started
        progress = Progress(runs, _depends_on(stage1, recipe, count, labelled))
        _look_back(progress, resume, watch)
        fits = _fit_all(stage1, tops, recipe, count, labelled, device, progress, watch)
        groups = Groups(cache, list(labels))
        outcome = Outcome(stage1, fits, recipe, labelled, group_numbers(groups, parts), device)
        metrics = outcome.metrics() | {"labels_without_features": absent, "seconds_before_training": ready}
        metrics["rows_gone"] = {name: rows.gone for name, rows in usable.items()}
        metrics["labels_unknown"] = {name: rows.unknown for name, rows in usable.items()}
        metrics["labels_changed"] = changed_labels(stage1.path, parts, labels)
        metrics["duplicates_separated"] = separated(Split(**{"test": [], **parts}), groups)
        made_from = {"cache": str(cache.path.absolute()), "labels": str(labels_file), "stage1": str(stage1.path)}
        if data is not None:
            made_from["data"] = str(Path(data).absolute())
        config = config_of(cache, labels_file, stage1.recipe) | made_from | {"finetune": recipe.to_dict()}
        kept, save = outcome.kept(made_from)
        by_seed = dict(zip(outcome.seeds, fits, strict=True))
        name = f"{stage1.recipe.sees}-finetune"
        result = write_run(runs, kept, by_seed, metrics, config, labels, started, name, save)
        progress.forget()
        return result


def _stage1(best_pt: str | Path, device: str, watch: Watch) -> Checkpoint:
    given = read_best_pt(best_pt)
    stored = given.of_stage1()
    if stored is not given:
        watch.note(f"{given.path} is of stage 2: beginning again from its stage 1, {stored.path}")
    stage1 = stored.checkpoint(device)
    if not stage1.split.val:
        raise CheckpointError(
            f"{stage1.path} was trained on all rows, so there is none to stop by: give the run that held some out"
        )
    if stage1.recipe.views:
        watch.note("note: stage 2 looks at the images themselves, not at augmented views of them")
    return stage1


def read_rows(
    cache: FeatureCache,
    parts: Mapping[str, Sequence[str]],
    recipe: FinetuneRecipe,
    source: Source,
    tokens: bool,
    max_bytes: int | None,
    on_states: OnProgress | None,
) -> dict[str, StateRows]:
    """Return features and states of each part's guids; states are computed for all of them in one go."""
    guids = [guid for of_part in parts.values() for guid in of_part]
    features = cache.features(guids, tokens, max_bytes=max_bytes)
    states = {
        tower: StateStore(cache, tower, count, source).states(guids, on_states)
        for tower, count in recipe.layers().items()
    }
    rows = StateRows(features, states)
    ends = np.cumsum([len(of_part) for of_part in parts.values()])
    return {
        name: rows.take(np.arange(end - len(of_part), end))
        for (name, of_part), end in zip(parts.items(), ends.tolist(), strict=True)
    }


def _depends_on(
    stage1: Checkpoint, recipe: FinetuneRecipe, count: int, labelled: Mapping[str, Labelled]
) -> dict[str, Any]:
    assert stage1.path is not None
    numbers = hashlib.sha256()
    for each in labelled.values():
        numbers.update(each.classes.tobytes())
        each.rows.features.hash_into(numbers)  # an edited pair changes these
    return {
        "stage1": hashlib.sha256(stage1.path.read_bytes()).hexdigest(),
        "settings": recipe.to_dict(),
        "seeds": count,
        "data": numbers.hexdigest(),
        "torch": torch.__version__,
    }


def _look_back(progress: Progress, resume: bool, watch: Watch) -> None:
    if resume:
        if progress.load():
            watch.note(f"going on: {len(progress.finished)} models finished, {progress.epochs} epochs of the next")
        else:
            watch.note("nothing to resume with these settings: beginning with the first epoch")
    elif progress.path.is_file():
        watch.note("an interrupted run with these settings is there: --resume would go on from its last finished epoch")


def _fit_all(
    stage1: Checkpoint,
    tops: Mapping[str, Top],
    recipe: FinetuneRecipe,
    count: int,
    labelled: Mapping[str, Labelled],
    device: str,
    progress: Progress,
    watch: Watch,
) -> list[FinetuneFit]:
    fits: list[FinetuneFit] = []
    for number in range(count):
        head = stage1.head.heads[number % len(stage1.head.heads)]
        assert isinstance(head, Head)
        model = Finetuned(copy.deepcopy(dict(tops)), copy.deepcopy(head))
        if number < len(progress.finished):
            fits.append(_finished(model, progress.finished[number], device))
            continue

        def on_step(done: int, steps: int, number: int = number) -> None:
            if watch.on_step is not None:
                watch.on_step(number * steps + done, count * steps)

        found = finetune_fit(
            model,
            stage1.recipe.reseeded(number),
            recipe,
            len(stage1.classes),
            labelled["train"],
            labelled["val"],
            device,
            progress.state,
            on_step,
            progress.keep,
        )
        fits.append(found)
        progress.finished.append({"weights": model.weights(), "history": found.history, "best_epoch": found.best_epoch})
        progress.keep(None)
    return fits


def _finished(model: Finetuned, stored: dict[str, Any], device: str) -> FinetuneFit:
    model.load_weights(stored["weights"])
    return FinetuneFit(model.to(device).eval(), stored["history"], stored["best_epoch"])
