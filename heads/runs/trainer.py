"""``train_head``, ``train_full``, ``evaluate``: from a cache and labels to a run folder, and back from its best.pt."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import CheckpointError, DataError, MmcliError
from ...cache.store import FeatureCache
from ...report.drawing import draw
from ..evaluation.division import SplitOptions, divide, relabel, renamed
from ..evaluation.duplicates import Groups, duplicate_groups, group_numbers, separated, without_copies
from ..evaluation.metrics import quick_scores, score
from ..evaluation.splits import Split
from ..model.head import Ensemble, sizes_of
from ..model.inputs import Rows
from ..model.losses import fit_offsets
from ..recipe import Recipe
from ..training.loop import Fit, OnEpoch, fit, predict_logits
from .checkpoint import Checkpoint, read_best_pt
from .folders import check_writable
from .labelled import (
    changed_labels,
    class_numbers,
    labels_of,
    left_for_features,
    rows_of_parts,
    share_of,
    usable_rows,
)
from .parallel import each_of, processes_for
from .run_folder import config_of, read_schedules, write_run
from .trained import Trained, trained

OnFit = Callable[[int, int], None]


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
    draw: Callable[..., None] = draw,
    new: str = "train",
    rare: str = "train-only",
) -> dict[str, Any]:
    """Train a head, or several that differ in their seed, on cached features and write a run folder.

    Parameters
    ----------
    cache_path
        What ``featurize`` wrote.
    labels_path
        CSV ``guid,tag``; default: the one recorded in the cache.
    recipe
        How to train.
    split_dir
        Folder with train, val and test CSVs to reuse; default: a stratified 8:1:1 split by ``split_seed``. The test
        CSV may be missing or unlabelled; the run then has no test score.
    runs
        Where the run folder goes; ``latest`` in it points at the newest.
    seeds
        Train with ``recipe.seed``, ``recipe.seed + 1`` and so on; best.pt is the ensemble of their probabilities.
    group_duplicates
        Keep identical images and identical cleaned texts in one part of a split that is drawn.
    max_bytes
        What all processes may take: embeddings and token states that do not fit are read as they are needed.
    jobs
        Processes for several seeds; default: one per core.
    on_fit
        Called with (heads trained, heads to train); of a single one, with (epochs behind it, epochs at most).
    draw
        Draws a figure: ``report.drawing.draw``, or a ``Pencil``.
    new
        Where labelled rows go that ``split_dir`` does not name: ``train``, or ``none`` to leave them out.
    rare
        What becomes of classes too rare for a row in each part: ``train-only``, ``merge`` (into ``other``), ``drop``.

    Returns
    -------
    dict
        What ``metrics.json`` holds: ``run``, ``best_pt``, ``train``, ``val``, ``test`` (see ``metrics.score``),
        ``seeds`` (of each head: seed, epochs, best_epoch, val and test scores), ``over_seeds`` (mean and standard
        deviation, with several), ``parameters``, ``duplicates_separated``, ``labels_without_features``, ``seconds``,
        and what ``Division.counts`` says of the split.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    options = SplitOptions(split_dir, split_seed, group_duplicates, new, rare)
    check_writable(Path(runs))
    if seeds < 1:
        raise MmcliError(f"seeds must be 1 or more, found {seeds}")
    with FeatureCache.open(cache_path) as cache:
        labels_file, labels, absent = labels_of(cache, labels_path)
        groups = Groups(cache, list(labels))
        division = divide(labels, groups, options)
        split, classes = division.split, division.classes
        parts = {name: guids for name, guids in split.named().items() if guids}
        copies = group_numbers(groups, parts)
        apart = separated(split, groups)
        del groups
        processes = processes_for(seeds, jobs, device)
        rows = rows_of_parts(cache, parts, division.labels, classes, recipe, share_of(max_bytes, processes))
        recipes = [recipe.reseeded(number) for number in range(seeds)]
        tasks = [(each, len(classes), rows["train"], rows["val"], device, copies["train"]) for each in recipes]
        fits = _fit_all(tasks, processes, on_fit)
        checkpoint = _checkpoint(cache, fits, recipe, classes, split, labels_file, rows["train"])
        checkpoint.relabelled = division.relabelled
        if recipe.offsets:
            _learn_offsets(checkpoint.head, rows["val"])
        metrics: dict[str, Any] = {name: _score(checkpoint, part, copies[name]) for name, part in rows.items()}
        metrics |= _seed_scores(checkpoint, fits, rows)
        metrics["duplicates_separated"] = apart
        metrics |= {"labels_without_features": absent, **division.counts}
        config = config_of(cache, labels_file, recipe) | options.to_dict() | {"split": division.counts}
        by_seed = dict(zip(checkpoint.seeds, fits, strict=True))
        del rows, tasks  # figures need room, too
        return write_run(Path(runs), checkpoint, by_seed, metrics, config, labels, started, draw=draw)


def train_full(
    source: str | Path,
    cache_path: str | Path | None = None,
    labels_path: str | Path | None = None,
    runs: str | Path = "artifacts/runs",
    device: str = "cpu",
    max_bytes: int | None = None,
    jobs: int | None = None,
    on_fit: OnFit | None = None,
    draw: Callable[..., None] = draw,
) -> dict[str, Any]:
    """Train the head of an earlier run again, on all labelled rows, for the epochs that it found best.

    Recipe, seeds, number of epochs and learning rate of each epoch are those of the run whose best.pt is ``source``,
    and so are decision offsets; of a run of stage 2, those of the stage 1 that it went on from.
    Nothing is held out, so there is no validation or test score.

    Returns
    -------
    dict
        As ``train_head``, with ``train`` only; ``full_of`` is the best.pt whose training was repeated.
    """
    started = time.perf_counter()
    given = read_best_pt(source)
    earlier = given.of_stage1().checkpoint()
    source = earlier.path or given.path
    check_writable(Path(runs))
    if not earlier.split.val:
        raise CheckpointError(f"{source} was itself trained on all rows: give the run that held some out")
    schedules = read_schedules(source, earlier)
    with FeatureCache.open(earlier.cache_path(cache_path)) as cache:
        earlier.check_cache(cache)
        labels_file, labels, absent = labels_of(cache, earlier.labels_path(labels_path))
        known = relabel(labels, earlier.relabelled)
        split = Split(list(known), [], [])
        processes = processes_for(len(earlier.seeds), jobs, device)
        each = share_of(max_bytes, processes)
        rows = rows_of_parts(cache, {"train": split.train}, known, earlier.classes, earlier.recipe, each)["train"]
        missing = sorted(set(earlier.classes) - set(known.values()))
        if missing:
            raise DataError(f"{labels_file} has no row of class {missing[0]!r}, which the run of {source} knows")
        groups = duplicate_groups(cache, split.train)
        tasks = [
            (replace(earlier.recipe, seed=seed), len(earlier.classes), rows, None, device, groups, schedule)
            for seed, schedule in zip(earlier.seeds, schedules, strict=True)
        ]
        fits = _fit_all(tasks, processes, on_fit)
        recipe = replace(earlier.recipe, epochs=max(earlier.best_epochs))
        checkpoint = _checkpoint(cache, fits, recipe, earlier.classes, split, labels_file, rows)
        checkpoint.head.offsets.copy_(earlier.head.offsets)
        checkpoint.relabelled = earlier.relabelled
        metrics: dict[str, Any] = {"train": _score(checkpoint, rows, groups), "labels_without_features": absent}
        metrics |= {"full_of": str(source), "stage2_left_out": source != given.path}
        metrics |= _seed_scores(checkpoint, fits, {})
        config = config_of(cache, labels_file, recipe) | {"full": True, "epochs_from": str(source)}
        by_seed = dict(zip(checkpoint.seeds, fits, strict=True))
        return write_run(Path(runs), checkpoint, by_seed, metrics, config, labels, started, draw=draw)


def evaluate(
    best_pt: str | Path | Trained,
    cache_path: str | Path | None = None,
    on: Sequence[str] = ("val", "test"),
    labels_path: str | Path | None = None,
    device: str = "cpu",
    max_bytes: int | None = None,
    on_progress: OnFit | None = None,
) -> dict[str, Any]:
    """Score a best.pt on the rows that it held out, or on labelled rows that it has not seen.

    Parameters
    ----------
    best_pt
        A trained head: its file or run folder, or opened.
    cache_path, labels_path
        Default: those that the head was trained with.
    on
        Parts of its split (``train``, ``val``, ``test``), or ``new``: rows of ``labels_path`` that are in none of them
        and are no copies of its training or validation rows. Of several parts, those without a row are left out.
    max_bytes
        As in ``train_head``.
    on_progress
        Called with (pairs computed, pairs to compute) where stage 2 has something to compute.

    Returns
    -------
    dict
        ``best_pt``, ``classes``, ``fusion``, ``modality``, ``labels_without_features``, and a score (see
        ``metrics.score``) by part. ``parts_without_rows`` lists the parts asked for that are empty. By part:
        ``rows_gone`` (pairs of the split without a label or features today), ``labels_changed`` (rows that count with
        the label of today, where the splits folder is beside best.pt), ``labels_unknown`` (rows left out because the
        head does not know their class). ``duplicates_separated``: rows with a copy in another part of the split.
        ``duplicates_left_out``: copies that ``new`` leaves out.

    Raises
    ------
    DataError
        There is no row to score.
    """
    model = trained(best_pt, device)
    checkpoint = model.checkpoint
    with FeatureCache.open(checkpoint.cache_path(cache_path)) as cache:
        checkpoint.check_cache(cache)
        _, labels, absent = labels_of(cache, checkpoint.labels_path(labels_path))
        result: dict[str, Any] = {"best_pt": str(checkpoint.path), "classes": checkpoint.classes}
        result |= {"fusion": checkpoint.recipe.fusion, "modality": checkpoint.recipe.modality}
        result["labels_without_features"] = absent
        known = renamed(labels, checkpoint.relabelled)
        parts, copies, counts = _rows_to_score(checkpoint, cache, known, [on] if isinstance(on, str) else on)
        result |= counts
        result["labels_changed"] = changed_labels(checkpoint.path, parts, labels)
        for name, guids in parts.items():
            true = class_numbers(guids, known, checkpoint.classes)
            model.get_ready(cache, guids, on_progress)
            logits = model.of_rows(cache, guids, left_for_features(cache, max_bytes))
            result[name] = score(true, logits.argmax(axis=1), checkpoint.classes, copies[name])
    return result


def _rows_to_score(
    checkpoint: Checkpoint, cache: FeatureCache, labels: dict[str, str], asked: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, NDArray[np.int64]], dict[str, Any]]:
    """Return the rows that can be scored and their groups, by part asked for, and what to say about the others."""
    parts = checkpoint.split.named()
    seen = {guid for guids in parts.values() for guid in guids}
    here = {name: [guid for guid in guids if guid in cache] for name, guids in parts.items()}
    groups = Groups(cache, [guid for guid in cache.guids if guid in seen or guid in labels])
    counts: dict[str, Any] = {}
    if "new" in asked:
        fresh = [guid for guid in labels if guid not in seen]
        parts["new"] = without_copies(fresh, [*here["train"], *here["val"]], groups)
        counts["duplicates_left_out"] = len(fresh) - len(parts["new"])
        if fresh and not parts["new"]:
            raise DataError(f"all {len(fresh)} new rows are copies of rows that the head learned from")
    counts["parts_without_rows"] = [name for name in asked if not parts[name]]
    if len(counts["parts_without_rows"]) == len(asked):
        raise DataError(_nothing_to_score(checkpoint, asked[0]))
    usable = {name: usable_rows(name, parts[name], labels, checkpoint.classes) for name in asked if parts[name]}
    counts["rows_gone"] = {name: rows.gone for name, rows in usable.items()}
    counts["labels_unknown"] = {name: rows.unknown for name, rows in usable.items()}
    held_out = [name for name in usable if name in ("val", "test")]
    counts["duplicates_separated"] = separated(Split(**here), groups, held_out)
    scored = {name: rows.guids for name, rows in usable.items()}
    return scored, group_numbers(groups, scored), counts


def _nothing_to_score(checkpoint: Checkpoint, part: str) -> str:
    """Return the message for a part without rows."""
    if part == "new":
        why = "give --labels FILE with labels of other pairs"
    elif part == "test" and checkpoint.split.val:
        why = "its split has no labelled test part; label those pairs and score them with --on new, or take --on val"
    else:
        why = "it learned from all rows; give --from the run that held some out"
    return f"{checkpoint.path} has no {part} row to be scored on: {why}"


def _fit_all(tasks: list[tuple[Any, ...]], jobs: int, on_fit: OnFit | None) -> list[Fit]:
    """Train one head per task; return them in the order of the tasks."""
    if len(tasks) == 1 and on_fit is not None and tasks[0][0].head == "mlp":
        tell, epochs = on_fit, tasks[0][0].epochs
        tell(0, epochs)
        return [_fit_one(0, lambda record: tell(int(record["epoch"]), epochs), *tasks[0])[1]]
    fits: dict[int, Fit] = {}
    for number, found in each_of(_fit_one, [(number, None, *task) for number, task in enumerate(tasks)], jobs):
        fits[number] = found
        if on_fit is not None:
            on_fit(len(fits), len(tasks))
    return [fits[number] for number in range(len(tasks))]


def _fit_one(
    number: int,
    on_epoch: OnEpoch | None,
    recipe: Recipe,
    n_classes: int,
    train: Rows,
    val: Rows | None,
    device: str,
    groups: Any,
    schedule: list[float] | None = None,
) -> tuple[int, Fit]:
    return number, fit(recipe, n_classes, train, val, schedule, device, on_epoch, groups=groups)


def _learn_offsets(head: Ensemble, val: Rows) -> None:
    offsets = fit_offsets(predict_logits(head, val.features), val.classes)
    head.offsets.copy_(head.offsets.new_tensor(offsets))


def _score(checkpoint: Checkpoint, rows: Rows, groups: NDArray[np.int64]) -> dict[str, Any]:
    logits = predict_logits(checkpoint.head, rows.features)
    return score(rows.classes, logits.argmax(axis=1), checkpoint.classes, groups)


def _seed_scores(checkpoint: Checkpoint, fits: Sequence[Fit], rows: dict[str, Rows]) -> dict[str, Any]:
    """Return the scores of each head alone, their mean and standard deviation, and the offsets of the whole."""
    of_each = []
    for seed, found in zip(checkpoint.seeds, fits, strict=True):
        entry: dict[str, Any] = {"seed": seed, "epochs": len(found.history), "best_epoch": found.best_epoch}
        if len(fits) > 1:
            alone = Ensemble([found.head], len(checkpoint.classes))
            if checkpoint.recipe.offsets and "val" in rows:
                _learn_offsets(alone, rows["val"])
            for name in ("val", "test"):
                if name in rows:
                    predicted = predict_logits(alone, rows[name].features).argmax(axis=1)
                    entry[name] = quick_scores(rows[name].classes, predicted, len(checkpoint.classes))
        of_each.append(entry)
    result: dict[str, Any] = {"seeds": of_each}
    if len(fits) > 1 and rows:
        result["over_seeds"] = {
            part: {
                what: {
                    "mean": float(np.mean([entry[part][what] for entry in of_each])),
                    "sd": float(np.std([entry[part][what] for entry in of_each], ddof=1)),
                }
                for what in ("macro_f1", "accuracy")
            }
            for part in ("val", "test")
            if part in rows
        }
    if checkpoint.recipe.offsets:
        result["offsets"] = dict(zip(checkpoint.classes, checkpoint.head.offsets.tolist(), strict=True))
    return result


def _checkpoint(
    cache: FeatureCache,
    fits: Sequence[Fit],
    recipe: Recipe,
    classes: list[str],
    split: Split,
    labels_file: Path,
    train: Rows,
) -> Checkpoint:
    return Checkpoint(
        head=Ensemble([found.head for found in fits], len(classes)).to(next(fits[0].head.parameters()).device),
        classes=classes,
        sizes=sizes_of(train.features),
        recipe=recipe,
        seeds=[recipe.reseeded(number).seed for number in range(len(fits))],
        identity=cache.header.identity,
        backbone=cache.header.backbone,
        split=split,
        best_epochs=[found.best_epoch for found in fits],
        made_from={"cache": str(cache.path.absolute()), "labels": str(labels_file)},
    )
