"""``finetune``: from a best.pt of stage 1 and the raw pairs to a run folder of stage 2."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..cache.errors import CheckpointError, MmcliError
from ..cache.store import FeatureCache
from ..featurize.backbones.opening import moved_to
from ..featurize.source import Source
from ..heads.evaluation.folds import groups_by_guid
from ..heads.evaluation.splits import group_numbers, relabel, separated
from ..heads.model.head import Head
from ..heads.runs.checkpoint import Checkpoint, load_checkpoint, stage1_of
from ..heads.runs.fit_store import FitStore, FitTask, data_key, epochs_behind, fit_tasks
from ..heads.runs.folders import check_writable
from ..heads.runs.labelled import RowReport, changed_labels, labels_of, rows_of_parts, usable_rows
from ..heads.runs.last_layers import open_last_layers, stage2_tasks
from ..heads.runs.run_folder import RunContent, RunOptions, RunResult, write_run
from ..heads.runs.run_folder import Watch as Watch
from ..heads.runs.stages import TrainedStages, compare_stages
from ..heads.runs.trainer import KEPT, checkpoint_of, learn_offsets, scores_of_seeds
from ..heads.training.loop import FitOptions


@dataclass(frozen=True)
class FinetuneOptions(RunOptions):
    """Where a run of stage 2 is written, and what it reads.

    Attributes
    ----------
    data, backbone
        Where the raw pairs and the backbone are now; default: as recorded in the cache.
    restart
        Start again, rather than go on after the last finished epoch of the same command if it was interrupted.
    """

    data: str | Path | None = None
    backbone: str | None = None
    restart: bool = False


def finetune(
    best_pt: str | Path,
    settings: Mapping[str, Any] | None = None,
    cache_path: str | Path | None = None,
    labels_path: str | Path | None = None,
    options: FinetuneOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Train the last layers of the backbone together with a trained head, and write a run folder.

    Split, classes, loss and backbone come from ``best_pt``. The validation rows choose the epoch, and whether stage 2
    is kept at all. The test rows are scored once, at the end. ``stages`` of the result has the scores of both stages.

    Parameters
    ----------
    best_pt
        File or run folder of a head of stage 1. For a best.pt of stage 2, training starts again from its stage 1.
    settings
        Settings of ``FinetuneRecipe`` by name; all others have their defaults.
    cache_path, labels_path
        Default: the cache and the labels file that the head was trained with.

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
    options, watch = options or FinetuneOptions(), watch or Watch()
    if options.jobs is not None:
        raise MmcliError("stage 2 trains its models one after the other: leave jobs out")
    device, data = options.device, options.data
    stage1 = _load_stage1(best_pt, device, watch)
    check_writable(Path(options.runs))
    recipe = stage1.recipe.with_finetune(settings)
    assert recipe.finetune is not None
    seeds = len(stage1.seeds) if options.seeds is None else options.seeds
    with FeatureCache.open(stage1.cache_path(cache_path)) as cache:
        stage1.check_cache(cache)
        labels_file, labels, absent = labels_of(cache, stage1.labels_path(labels_path))
        known, split = relabel(labels, stage1.relabelled, keep_dropped=True), stage1.split.named()
        split = {part: guids for part, guids in split.items() if guids}
        parts, gone, unknown = usable_rows(split, known, stage1.classes)
        stage1 = replace(stage1, backbone=moved_to(stage1.backbone, options.backbone))
        stage1_path = Path(str(stage1.path))
        source = Source(stage1.identity, stage1.backbone, device, data)
        rows = rows_of_parts(cache, parts, known, stage1.classes, stage1.recipe, options.max_bytes)
        layers = open_last_layers(cache, recipe.finetune, source, parts, rows, watch.on_states)
        recipe = layers.resolved(recipe)
        if recipe.views and "image" in layers.counts:
            watch.note(
                "note: stage 2 trains image layers, so it looks at the images themselves, not at augmented views"
            )
        ready = time.perf_counter() - started
        depends_on = {
            "stage1": hashlib.sha256(stage1_path.read_bytes()).hexdigest(),
            "data": [data_key(cache.fingerprint, parts[name], rows[name]) for name in parts],
            "device": device,
        }
        heads = [head for head in stage1.head.heads if isinstance(head, Head)]
        tasks = stage2_tasks(heads, recipe, layers, FitOptions(device), depends_on, [None] * seeds)
        store = FitStore(Path(options.runs) / KEPT)
        _resume_or_restart(tasks, store, options.restart, watch)
        fits = fit_tasks(tasks, store, 1, watch.on_step)
        stage2 = checkpoint_of(cache, fits, recipe, stage1.classes, stage1.split, labels_file)
        stage2.relabelled, stage2.backbone = stage1.relabelled, stage1.backbone
        if recipe.offsets:
            learn_offsets(stage2.head, layers.rows["val"])
        groups = groups_by_guid(cache, list(labels))
        fit_of_seed = dict(zip(stage2.seeds, fits, strict=True))
        trained = TrainedStages(stage1.head, stage2.head, fit_of_seed, layers.counts, str(stage1_path))
        stages = compare_stages(trained, stage1.classes, layers.rows, group_numbers(groups, parts), ready)
        kept = replace(stage2 if stages.kept == "stage 2" else stage1, path=None)
        kept.made_from = {**stage2.made_from, "stage1": str(stage1_path)}
        if data is not None:
            kept.made_from["data"] = str(Path(data).absolute())
        content = RunContent(
            recipe=recipe,
            header=cache.header,
            labels=labels,
            fits=fits,
            seeds=scores_of_seeds(stage2, fits, layers.rows),
            config={},
            started=started,
            scores=stages.scores[stages.kept.replace(" ", "")],
            rows=RowReport(
                absent,
                labels_changed=changed_labels(stage1_path, parts, labels),
                duplicates_separated=separated(parts, groups),
                rows_gone=gone,
                labels_unknown=unknown,
            ),
            stages=stages,
        )
        result = write_run(options.runs, kept, content)
        store.drop(task.key for task in tasks)
        return result


def _load_stage1(best_pt: str | Path, device: str, watch: Watch) -> Checkpoint:
    checkpoint = load_checkpoint(best_pt, device)
    stage1 = stage1_of(checkpoint)
    if stage1 is not checkpoint:
        watch.note(f"{checkpoint.path} was written by `mmcli finetune`: starting again from {stage1.path}")
        stage1.head.to(device)
    if not stage1.split.val:
        raise CheckpointError(
            f"{stage1.path} was trained on all rows, so it has no validation rows: give the run that held some out"
        )
    return stage1


def _resume_or_restart(tasks: Sequence[FitTask], store: FitStore, restart: bool, watch: Watch) -> None:
    """Note what an interrupted command left, or delete it with ``restart``."""
    finished, epochs = epochs_behind(tasks, store)
    if restart:
        store.drop(task.key for task in tasks)
    elif finished or epochs:
        watch.note(f"going on: {finished} models and {epochs} epochs of the next are finished (--restart begins anew)")
