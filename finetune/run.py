"""``finetune``: from a best.pt of stage 1 and the raw pairs to a run folder of stage 2."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cache.errors import CheckpointError, MmcliError
from ..cache.store import FeatureCache
from ..featurize.backbones.opening import moved_to
from ..featurize.encode import OnProgress
from ..featurize.frozen.source import Source
from ..heads.evaluation.folds import groups_by_guid
from ..heads.evaluation.splits import Split, group_numbers, relabel, separated
from ..heads.model.head import Head
from ..heads.runs.assembly import checkpoint_of, learn_offsets, seed_scores
from ..heads.runs.best_pt import load_checkpoint, stage1_of
from ..heads.runs.checkpoint import Checkpoint
from ..heads.runs.fit_store import FitStore, data_key
from ..heads.runs.fitting import FitTask, epochs_behind, fit_tasks
from ..heads.runs.folders import check_writable
from ..heads.runs.labelled import changed_labels, counts_of_unusable, labels_of, rows_of_parts, usable_rows
from ..heads.runs.last_layers import last_layers, stage2_tasks
from ..heads.runs.run_folder import RunContent, config_of, write_run
from ..heads.runs.trainer import KEPT
from ..heads.training.loop import FitOptions
from .outcome import compare_stages


@dataclass(frozen=True)
class Watch:
    """Callbacks during the run; each may be None.

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
        """Pass a sentence to the user."""
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
    restart: bool = False,
    device: str = "cpu",
    max_bytes: int | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Train the last layers of the backbone together with a trained head, and write a run folder.

    Split, classes, loss and backbone come from ``best_pt``. The validation rows choose the epoch, and whether stage 2
    is kept at all. The test rows are scored once, at the end.

    Parameters
    ----------
    best_pt
        File or run folder of a head of stage 1. For a best.pt of stage 2, training starts again from its stage 1.
    settings
        Settings of ``FinetuneRecipe`` by name; all others have their defaults.
    cache_path, labels_path
        Default: the cache and the labels file that the head was trained with.
    data, backbone
        Where the raw pairs and the backbone are now; default: as recorded in the cache.
    runs
        The folder of run folders; ``latest`` in it points at the newest.
    seeds
        Number of models, whose probabilities are averaged; default: one for each head in ``best_pt``.
    restart
        Start again, rather than go on after the last finished epoch of the same command if it was interrupted.
    max_bytes
        Token states that take more than this are read from the cache as they are needed.

    Returns
    -------
    dict
        The content of ``metrics.json``. ``kept`` says what best.pt holds: ``stage 2``, or ``stage 1`` if stage 2 is no
        better on the validation rows. ``train``, ``val`` and ``test`` are the scores of the kept stage. ``stage1`` and
        ``stage2`` have the scores of each stage, and ``gap`` (training less validation macro-F1). ``difference`` is
        stage 2 less stage 1 on ``val`` and ``test``, with an interval over rows. ``overfitting`` says by seed in which
        epochs a model overfits. ``seeds`` (scores of each single model), ``epochs`` and ``best_epoch`` always describe
        stage 2.

    Raises
    ------
    CheckpointError
        ``best_pt`` is missing, has no validation rows, or belongs to other features.
    BackboneError
        The backbone is not at hand, is another backbone, or has fewer layers.
    DataError
        A part has no labelled rows, or raw pairs are gone or have changed.
    """
    started = time.perf_counter()
    watch = watch or Watch()
    runs = Path(runs)
    stage1 = _load_stage1(best_pt, device, watch)
    check_writable(runs)
    recipe = stage1.recipe.with_finetune(settings)
    assert recipe.finetune is not None
    count = len(stage1.seeds) if seeds is None else seeds
    if count < 1:
        raise MmcliError(f"seeds must be 1 or more, found {count}")
    with FeatureCache.open(stage1.cache_path(cache_path)) as cache:
        stage1.check_cache(cache)
        labels_file, labels, absent = labels_of(cache, stage1.labels_path(labels_path))
        known = relabel(labels, stage1.relabelled, keep_dropped=True)
        usable = {
            name: usable_rows(name, guids, known, stage1.classes)
            for name, guids in stage1.split.named().items()
            if guids
        }
        parts = {name: rows.guids for name, rows in usable.items()}
        stage1 = replace(stage1, backbone=moved_to(stage1.backbone, backbone))
        source = Source(stage1.identity, stage1.backbone, device, data)
        rows = rows_of_parts(cache, parts, known, stage1.classes, stage1.recipe, max_bytes)
        layers = last_layers(cache, recipe.finetune, source, parts, rows, watch.on_states)
        ready = time.perf_counter() - started
        assert stage1.path is not None
        depends_on = {
            "stage1": hashlib.sha256(stage1.path.read_bytes()).hexdigest(),
            "data": [data_key(cache.fingerprint, parts[name], rows[name]) for name in parts],
            "device": device,
        }
        heads = [head for head in stage1.head.heads if isinstance(head, Head)]
        tasks = stage2_tasks(heads, stage1.recipe, layers, FitOptions(device), depends_on, [None] * count)
        store = FitStore(runs / KEPT)
        _resume_or_restart(tasks, store, restart, watch)
        fits = fit_tasks(tasks, store, 1, watch.on_step)
        recipe = replace(recipe, finetune=layers.recipe)
        stage2 = checkpoint_of(cache, fits, recipe, stage1.classes, stage1.split, labels_file)
        stage2.relabelled, stage2.backbone = stage1.relabelled, stage1.backbone
        if recipe.offsets:
            learn_offsets(stage2.head, layers.rows["val"])
        groups = groups_by_guid(cache, list(labels))
        outcome = compare_stages(stage1, stage2, fits, layers.rows, group_numbers(groups, parts))
        metrics = outcome.metrics() | seed_scores(stage2, fits, layers.rows)
        metrics |= {"labels_without_features": absent, "seconds_before_training": ready}
        metrics |= counts_of_unusable(usable)
        metrics["labels_changed"] = changed_labels(stage1.path, parts, labels)
        metrics["duplicates_separated"] = separated(Split(**{"test": [], **parts}), groups)
        kept = replace(outcome.kept, path=None)
        if recipe.offsets:
            metrics["offsets"] = kept.offset_by_class()
        kept.made_from = {**stage2.made_from, "stage1": str(stage1.path)}
        if data is not None:
            kept.made_from["data"] = str(Path(data).absolute())
        config = config_of(cache, labels_file, recipe) | kept.made_from
        by_seed = dict(zip(stage2.seeds, fits, strict=True))
        content = RunContent(f"{recipe.sees}-finetune", kept, by_seed, metrics, config, labels)
        result = write_run(runs, content, started)
        store.drop(task.key for task in tasks)
        return result


def _load_stage1(best_pt: str | Path, device: str, watch: Watch) -> Checkpoint:
    checkpoint = load_checkpoint(best_pt, device)
    stage1 = stage1_of(checkpoint)
    if stage1 is not checkpoint:
        watch.note(f"{checkpoint.path} holds a stage 2: beginning again from its stage 1, {stage1.path}")
        stage1.head.to(device)
    if not stage1.split.val:
        raise CheckpointError(
            f"{stage1.path} was trained on all rows, so it has no validation rows: give the run that held some out"
        )
    return stage1


def _resume_or_restart(tasks: list[FitTask], store: FitStore, restart: bool, watch: Watch) -> None:
    """Note what an interrupted command left, or delete it with ``restart``."""
    finished, epochs = epochs_behind(tasks, store)
    if restart:
        store.drop(task.key for task in tasks)
    elif finished or epochs:
        watch.note(f"going on: {finished} models and {epochs} epochs of the next are finished (--restart begins anew)")
