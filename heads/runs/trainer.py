"""``train_head`` and ``train_full``: from a cache and labels to a run folder."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import CheckpointError, DataError, MmcliError
from ...cache.store import FeatureCache
from ...featurize.encode import OnProgress
from ..evaluation.folds import duplicate_groups, groups_by_guid
from ..evaluation.metrics import Scores, quick_scores, score
from ..evaluation.splits import Split, SplitOptions, divide, group_numbers, relabel, separated
from ..model.head import Ensemble, predict_logits, predicted_classes
from ..model.inputs import Rows
from ..model.losses import fit_offsets
from ..recipe import Recipe
from ..training.loop import Fit, FitOptions
from .checkpoint import Checkpoint, stage1_of
from .fit_store import FitStore, FitTask, data_key, fit_tasks, key_of, order_in_file
from .folders import check_writable
from .labelled import RowReport, absent_labels_are_named, labels_of, rows_of_parts, share_of
from .last_layers import open_last_layers, stage2_tasks
from .parallel import processes_for
from .run_folder import RunContent, RunOptions, RunResult, SeedScores, Watch, read_schedules, write_run
from .trained import Trained, open_best_pt

KEPT = ".fits"  # folder beside the runs, with the fits of running and interrupted commands


def train_head(
    cache_path: str | Path,
    labels_path: str | Path | None = None,
    recipe: Recipe | None = None,
    split: SplitOptions | None = None,
    options: RunOptions | None = None,
    on_fit: OnProgress | None = None,
) -> RunResult:
    """Train a head, or several that differ in their seed, on cached features and write a run folder.

    Parameters
    ----------
    cache_path
        The file that ``featurize`` wrote.
    labels_path
        CSV ``guid,tag``; default: the file recorded in the cache.
    recipe
        The settings of the training, with the seed of the first head.
    split
        How labelled rows are divided; default: a stratified 8:1:1 split that keeps copies in one part.
    options
        Folder, seeds, device, processes and memory.
    on_fit
        Called with (heads trained, heads to train); for a single head, with (epochs done, epochs at most).

    Raises
    ------
    CacheError, DataError
        The cache cannot be read, or there are too few labelled rows.
    """
    started = time.perf_counter()
    recipe, split, options = recipe or Recipe(), split or SplitOptions(), options or RunOptions()
    seeds = 1 if options.seeds is None else options.seeds
    check_writable(Path(options.runs))
    if recipe.finetune is not None:
        raise MmcliError("train_head trains stage 1 only: leave finetune out of the recipe, then call mmcli.finetune")
    with FeatureCache.open(cache_path) as cache:
        labels_file, labels, absent = labels_of(cache, labels_path)
        groups_of_guids = groups_by_guid(cache, list(labels))
        with absent_labels_are_named(cache, absent):
            division = divide(labels, groups_of_guids, split)
        parts = {name: guids for name, guids in division.split.named().items() if guids}
        groups = group_numbers(groups_of_guids, parts)
        report = RowReport(absent, duplicates_separated=separated(parts, groups_of_guids), **division.counts)
        del groups_of_guids
        processes = processes_for(seeds, options.jobs, options.device)
        share = share_of(options.max_bytes, processes)
        rows = rows_of_parts(cache, parts, division.labels, division.classes, recipe, share)
        arrays = [rows[name].classes for name in rows] + [groups["train"]]
        data = key_of({"data": [data_key(cache.fingerprint, parts[name], rows[name]) for name in rows]}, arrays)
        recipes = [recipe.reseeded(number) for number in range(seeds)]
        fit_options = FitOptions(options.device, groups["train"])
        tasks = _stage1_tasks(recipes, rows, fit_options, [None] * seeds, {"data": data}, len(division.classes))
        store = FitStore(Path(options.runs) / KEPT)
        fits = fit_tasks(tasks, store, processes, on_fit)
        checkpoint = checkpoint_of(cache, fits, recipe, division.classes, division.split, labels_file)
        checkpoint.relabelled = division.relabelled
        if recipe.offsets:
            learn_offsets(checkpoint.head, rows["val"])
        content = RunContent(
            recipe=recipe,
            header=cache.header,
            labels=labels,
            fits=fits,
            seeds=scores_of_seeds(checkpoint, fits, rows),
            config=split.to_dict() | {"split": division.counts},
            started=started,
            scores=scores_by_part(checkpoint.head, rows, division.classes, groups),
            rows=report,
        )
        keys = [task.key for task in tasks]
        del rows, tasks  # frees memory for the figures
        result = write_run(options.runs, checkpoint, content)
        store.drop(keys)
        return result


def train_full(
    source: str | Path | Trained,
    cache_path: str | Path | None = None,
    labels_path: str | Path | None = None,
    options: RunOptions | None = None,
    watch: Watch | None = None,
) -> RunResult:
    """Repeat the training of an earlier run on all labelled rows, up to its best epoch.

    Recipe, seeds, number of epochs, learning rate of each epoch and decision offsets come from the run whose best.pt is
    ``source``. For a run of stage 2, both stages are repeated: first the heads of stage 1, then stage 2 from them; if
    its raw pairs or its backbone were moved, give the result of ``open_best_pt``. No row is held out, so only ``train``
    has scores.
    """
    started = time.perf_counter()
    options, watch = options or RunOptions(), watch or Watch()
    if options.seeds is not None:
        raise MmcliError("train_full takes the seeds of the run that it repeats: leave seeds out")
    model = open_best_pt(source, options.device)
    earlier = model.checkpoint
    if earlier.recipe.finetune is None:
        earlier = stage1_of(earlier)
    first = stage1_of(earlier)
    check_writable(Path(options.runs))
    if not first.split.val:
        raise CheckpointError(f"{earlier.path} was itself trained on all rows: give the run that held some out")
    store = FitStore(Path(options.runs) / KEPT)
    with FeatureCache.open(earlier.cache_path(cache_path)) as cache:
        earlier.check_cache(cache)
        labels_file, labels, absent = labels_of(cache, earlier.labels_path(labels_path))
        known = relabel(labels, earlier.relabelled)
        missing = sorted(set(earlier.classes) - set(known.values()))
        if missing:
            raise DataError(
                f"{labels_file} has no row of class {missing[0]!r}, which {earlier.path} knows: add rows of this "
                "class, or train a new head with `mmcli train-head`"
            )
        parts = {"train": list(known)}
        processes = processes_for(len(first.seeds), options.jobs, options.device)
        share = share_of(options.max_bytes, processes)
        rows = rows_of_parts(cache, parts, known, earlier.classes, earlier.recipe, share)
        groups = duplicate_groups(cache, parts["train"])
        data = key_of({"data": data_key(cache.fingerprint, parts["train"], rows["train"])}, [groups])
        recipes = [replace(first.recipe, seed=seed) for seed in first.seeds]
        rates, fit_options = read_schedules(first), FitOptions(options.device, groups)
        tasks = _stage1_tasks(recipes, rows, fit_options, rates, {"full": data}, len(earlier.classes))
        both = replace(first.recipe, finetune=earlier.recipe.finetune)
        layers = None
        if both.finetune is not None:  # before stage 1 is trained, so that a missing pair is found early
            layers = open_last_layers(cache, both.finetune, model.source, parts, rows, watch.on_states)
        fits = fit_tasks(tasks, store, processes, watch.on_fit)
        if layers is not None:
            heads, depends_on = [fitted.head for fitted in fits], {"full": [task.key for task in tasks]}
            second = stage2_tasks(heads, both, layers, fit_options, depends_on, read_schedules(earlier))
            rows, tasks, fits = layers.rows, tasks + second, fit_tasks(second, store, 1, watch.on_step)
        recipe = replace(both, epochs=max(first.best_epochs))
        checkpoint = checkpoint_of(cache, fits, recipe, earlier.classes, Split(parts["train"], [], []), labels_file)
        checkpoint.head.offsets.copy_(earlier.head.offsets)
        checkpoint.relabelled, checkpoint.backbone = earlier.relabelled, model.place
        if model.data is not None:
            checkpoint.made_from["data"] = str(Path(model.data).absolute())
        content = RunContent(
            recipe=recipe,
            header=cache.header,
            labels=labels,
            fits=fits,
            seeds=scores_of_seeds(checkpoint, fits, {}),
            config={"full": True, "epochs_from": str(earlier.path)},
            started=started,
            scores=scores_by_part(checkpoint.head, rows, earlier.classes, {"train": groups}),
            rows=RowReport(absent),
            full_of=str(earlier.path),
        )
        result = write_run(options.runs, checkpoint, content)
        store.drop(task.key for task in tasks)
        return result


def _stage1_tasks(
    recipes: Sequence[Recipe],
    rows: Mapping[str, Rows],
    options: FitOptions,
    schedules: Sequence[list[float] | None],
    depends_on: Mapping[str, str],
    n_classes: int,
) -> list[FitTask]:
    """Return a fit for each recipe; ``schedules`` are the learning rates of fits that are repeated."""
    tasks = []
    for recipe, rates in zip(recipes, schedules, strict=True):
        settings = {"recipe": recipe.that_matter(), "rates": rates, "device": options.device, **depends_on}
        key = key_of(settings | {"file": order_in_file(rows["train"].features)}, [])
        tasks.append(FitTask(recipe, n_classes, rows["train"], rows.get("val"), replace(options, rates=rates), key))
    return tasks


def checkpoint_of(
    cache: FeatureCache, fits: Sequence[Fit], recipe: Recipe, classes: list[str], split: Split, labels_file: Path
) -> Checkpoint:
    """Return the checkpoint of the heads in ``fits``, whose seeds are consecutive."""
    heads = [fitted.head for fitted in fits]
    return Checkpoint(
        head=Ensemble(heads, len(classes)).eval().to(next(heads[0].parameters()).device),
        classes=classes,
        sizes=heads[0].sizes,
        recipe=recipe,
        seeds=[recipe.reseeded(number).seed for number in range(len(fits))],
        identity=cache.header.identity,
        backbone=cache.header.backbone,
        split=split,
        best_epochs=[fitted.best_epoch for fitted in fits],
        made_from={"cache": str(cache.path.absolute()), "labels": str(labels_file)},
        changed=[head.weights()["changed"] for head in heads if head.tops],
    )


def learn_offsets(head: Ensemble, val: Rows) -> None:
    """Fit the offset of each class, so that macro-F1 rises on the validation rows."""
    offsets = fit_offsets(predict_logits(head, val.features), val.classes)
    head.offsets.copy_(head.offsets.new_tensor(offsets))


def scores_by_part(
    head: Ensemble, rows: Mapping[str, Rows], classes: list[str], groups: Mapping[str, NDArray[np.int64]]
) -> dict[str, Scores]:
    """Return the scores of each part."""
    return {
        name: score(part.classes, predicted_classes(head, part), classes, groups[name]) for name, part in rows.items()
    }


def scores_of_seeds(checkpoint: Checkpoint, fits: Sequence[Fit], rows: Mapping[str, Rows]) -> list[SeedScores]:
    """Return the epochs of each head; if there are several, also their scores on the validation and test rows."""
    heads = []
    for seed, fitted in zip(checkpoint.seeds, fits, strict=True):
        scores = {}
        if len(fits) > 1:
            alone = Ensemble([fitted.head], len(checkpoint.classes))
            if checkpoint.recipe.offsets and "val" in rows:
                learn_offsets(alone, rows["val"])
            for name in ("val", "test"):
                if name in rows:
                    predicted = predicted_classes(alone, rows[name])
                    scores[name] = quick_scores(rows[name].classes, predicted, len(checkpoint.classes))
        heads.append(SeedScores(seed, len(fitted.history), fitted.best_epoch, scores))
    return heads
