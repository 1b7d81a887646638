"""``train_head`` and ``train_full``: from a cache and labels to a run folder."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...cache.errors import CheckpointError, DataError, MmcliError
from ...cache.store import FeatureCache
from ...featurize.frozen.source import Source
from ..evaluation.folds import duplicate_groups, groups_by_guid
from ..evaluation.splits import Split, SplitOptions, divide, group_numbers, relabel, separated
from ..model.inputs import Rows
from ..recipe import Recipe
from ..training.loop import FitOptions
from .assembly import checkpoint_of, learn_offsets, scores_by_part, seed_scores
from .best_pt import load_checkpoint, stage1_of
from .checkpoint import Checkpoint
from .fit_store import FitStore, data_key, key_of, order_in_file
from .fitting import FitTask, OnFit, fit_tasks
from .folders import check_writable
from .labelled import labels_of, rows_of_parts, share_of
from .last_layers import last_layers, stage2_tasks
from .parallel import processes_for
from .run_folder import RunContent, config_of, read_schedules, write_run

KEPT = ".fits"  # folder beside the runs, with the fits of running and interrupted commands


def train_head(
    cache_path: str | Path,
    labels_path: str | Path | None = None,
    recipe: Recipe | None = None,
    split_dir: str | Path | None = None,
    split_seed: int = 42,
    runs: str | Path = "artifacts/runs",
    device: str = "cpu",
    seeds: int = 1,
    group_duplicates: bool = True,
    max_bytes: int | None = None,
    jobs: int | None = None,
    on_fit: OnFit | None = None,
    new: str = "train",
    rare: str = "train-only",
) -> dict[str, Any]:
    """Train a head, or several that differ in their seed, on cached features and write a run folder.

    Parameters
    ----------
    cache_path
        The file that ``featurize`` wrote.
    labels_path
        CSV ``guid,tag``; default: the file recorded in the cache.
    recipe
        The settings of the training.
    split_dir
        Folder with train, val and test CSVs to reuse; default: a stratified 8:1:1 split by ``split_seed``. The test
        CSV may be missing or unlabelled; the run then has no test score.
    runs
        Where the run folder goes; ``latest`` in it points at the newest.
    seeds
        Train with ``recipe.seed``, ``recipe.seed + 1`` and so on; best.pt is the ensemble of their probabilities.
    group_duplicates
        When a split is drawn, keep identical images and identical cleaned texts in one part.
    max_bytes
        Memory for all processes together; embeddings and token states that do not fit are read as they are needed.
    jobs
        Processes for several seeds; default: one per core.
    on_fit
        Called with (heads trained, heads to train); for a single head, with (epochs done, epochs at most).
    new
        Use of labelled rows that ``split_dir`` does not name: ``train``, or ``none`` to leave them out.
    rare
        Use of classes too rare for a row in each part: ``train-only``, ``merge`` (into ``other``), ``drop``.

    Returns
    -------
    dict
        The content of ``metrics.json``: ``run``, ``best_pt``, ``train``, ``val``, ``test`` (see ``metrics.score``),
        ``seeds`` (for each head: seed, epochs, best_epoch, val and test scores), ``over_seeds`` (for several heads:
        mean and standard deviation), ``parameters``, ``duplicates_separated``, ``labels_without_features``,
        ``seconds``, and ``Division.counts``.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    split_options = SplitOptions(split_dir, split_seed, group_duplicates, new, rare)
    check_writable(Path(runs))
    if seeds < 1:
        raise MmcliError(f"seeds must be 1 or more, found {seeds}")
    if recipe.finetune is not None:
        raise MmcliError("train_head trains stage 1 only: leave finetune out of the recipe, then call mmcli.finetune")
    with FeatureCache.open(cache_path) as cache:
        labels_file, labels, absent = labels_of(cache, labels_path)
        groups = groups_by_guid(cache, list(labels))
        division = divide(labels, groups, split_options)
        split, classes = division.split, division.classes
        parts = {name: guids for name, guids in split.named().items() if guids}
        copies = group_numbers(groups, parts)
        apart = separated(split, groups)
        del groups
        processes = processes_for(seeds, jobs, device)
        rows = rows_of_parts(cache, parts, division.labels, classes, recipe, share_of(max_bytes, processes))
        arrays = [rows[name].classes for name in rows] + [copies["train"]]
        data = key_of({"data": [data_key(cache.fingerprint, parts[name], rows[name]) for name in rows]}, arrays)
        tasks = []
        for number in range(seeds):
            seeded = recipe.reseeded(number)
            settings = {"recipe": seeded.that_matter(), "data": data, "file": order_in_file(rows["train"].features)}
            options = FitOptions(device, copies["train"])
            key = key_of(settings | {"device": device}, [])
            tasks.append(FitTask(seeded, len(classes), rows["train"], rows["val"], options, key))
        store = FitStore(Path(runs) / KEPT)
        fits = fit_tasks(tasks, store, processes, on_fit)
        checkpoint = checkpoint_of(cache, fits, recipe, classes, split, labels_file)
        checkpoint.relabelled = division.relabelled
        if recipe.offsets:
            learn_offsets(checkpoint.head, rows["val"])
        metrics: dict[str, Any] = scores_by_part(checkpoint.head, rows, classes, copies)
        metrics |= seed_scores(checkpoint, fits, rows)
        metrics["duplicates_separated"] = apart
        metrics |= {"labels_without_features": absent, **division.counts}
        config = config_of(cache, labels_file, recipe) | split_options.to_dict() | {"split": division.counts}
        by_seed = dict(zip(checkpoint.seeds, fits, strict=True))
        keys = [task.key for task in tasks]
        del rows, tasks  # frees memory for the figures
        result = write_run(Path(runs), RunContent(recipe.sees, checkpoint, by_seed, metrics, config, labels), started)
        store.drop(keys)
        return result


def train_full(
    source: str | Path,
    cache_path: str | Path | None = None,
    labels_path: str | Path | None = None,
    runs: str | Path = "artifacts/runs",
    device: str = "cpu",
    max_bytes: int | None = None,
    jobs: int | None = None,
    on_fit: OnFit | None = None,
) -> dict[str, Any]:
    """Repeat the training of an earlier run on all labelled rows, up to its best epoch.

    Recipe, seeds, number of epochs, learning rate of each epoch and decision offsets come from the run whose best.pt is
    ``source``. For a run of stage 2, both stages are repeated: first the heads of stage 1, then stage 2 from them. No
    row is held out, so there is no validation or test score.

    Returns
    -------
    dict
        The result of ``train_head`` with scores for ``train`` only; ``full_of`` is the best.pt of the earlier run.
    """
    started = time.perf_counter()
    earlier = load_checkpoint(source)
    if earlier.recipe.finetune is None:
        earlier = stage1_of(earlier)
    first = stage1_of(earlier)
    check_writable(Path(runs))
    if not first.split.val:
        raise CheckpointError(f"{earlier.path} was itself trained on all rows: give the run that held some out")
    store = FitStore(Path(runs) / KEPT)
    with FeatureCache.open(earlier.cache_path(cache_path)) as cache:
        earlier.check_cache(cache)
        labels_file, labels, absent = labels_of(cache, earlier.labels_path(labels_path))
        known = relabel(labels, earlier.relabelled)
        split = Split(list(known), [], [])
        missing = sorted(set(earlier.classes) - set(known.values()))
        if missing:
            raise DataError(
                f"{labels_file} has no row of class {missing[0]!r}, which {earlier.path} knows: add rows of this "
                "class, or train a new head with `mmcli train-head`"
            )
        processes = processes_for(len(first.seeds), jobs, device)
        share = share_of(max_bytes, processes)
        rows = rows_of_parts(cache, {"train": split.train}, known, earlier.classes, earlier.recipe, share)["train"]
        groups = duplicate_groups(cache, split.train)
        options, data = FitOptions(device, groups), data_key(cache.fingerprint, split.train, rows)
        tasks = _repeated(first, rows, options, data)
        fits = fit_tasks(tasks, store, processes, on_fit)
        if earlier.recipe.finetune is not None:
            backbone = Source(earlier.identity, earlier.backbone, device, earlier.made_from.get("data"))
            layers = last_layers(cache, earlier.recipe.finetune, backbone, {"train": split.train}, {"train": rows})
            rows, schedules = layers.rows["train"], read_schedules(earlier)
            depends_on = {"full": [task.key for task in tasks]}
            heads = [fitted.head for fitted in fits]
            second = stage2_tasks(heads, first.recipe, layers, options, depends_on, schedules)
            fits = fit_tasks(second, store, 1, on_fit)
            tasks += second
        recipe = replace(first.recipe, epochs=max(first.best_epochs), finetune=earlier.recipe.finetune)
        checkpoint = checkpoint_of(cache, fits, recipe, earlier.classes, split, labels_file)
        checkpoint.head.offsets.copy_(earlier.head.offsets)
        checkpoint.relabelled, checkpoint.backbone = earlier.relabelled, earlier.backbone
        if "data" in earlier.made_from:
            checkpoint.made_from["data"] = earlier.made_from["data"]
        metrics: dict[str, Any] = scores_by_part(checkpoint.head, {"train": rows}, earlier.classes, {"train": groups})
        metrics |= {"labels_without_features": absent, "full_of": str(earlier.path)}
        metrics |= seed_scores(checkpoint, fits, {})
        config = config_of(cache, labels_file, recipe) | {"full": True, "epochs_from": str(earlier.path)}
        by_seed = dict(zip(checkpoint.seeds, fits, strict=True))
        name = recipe.sees if recipe.finetune is None else f"{recipe.sees}-finetune"
        result = write_run(Path(runs), RunContent(name, checkpoint, by_seed, metrics, config, labels), started)
        store.drop(task.key for task in tasks)
        return result


def _repeated(earlier: Checkpoint, rows: Rows, options: FitOptions, data: str) -> list[FitTask]:
    """Return the tasks that repeat stage 1 of an earlier run on ``rows``."""
    tasks = []
    for seed, rates in zip(earlier.seeds, read_schedules(earlier), strict=True):
        recipe = replace(earlier.recipe, seed=seed)
        settings = {"recipe": recipe.that_matter(), "data": data, "rates": rates, "device": options.device}
        arrays = [] if options.groups is None else [options.groups]
        key = key_of(settings | {"file": order_in_file(rows.features)}, arrays)
        tasks.append(FitTask(recipe, len(earlier.classes), rows, None, replace(options, rates=rates), key))
    return tasks
