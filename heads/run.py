"""``train_head`` and ``evaluate``: from a cache and labels to a run folder, and back from its best.pt."""

import contextlib
import csv
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.atomic import disk_full_is_clear, write_text
from ..cache.errors import CheckpointError, DataError
from ..cache.labels import read_labels, table_text
from ..cache.store import FeatureCache
from ..report import figures
from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .metrics import score
from .splits import Split, read_split, stratified_split, write_split
from .training import Fit, Recipe, Rows, fit, predict_logits

_DRAFT = ".unfinished-"

OnEpoch = Callable[[dict[str, float]], None]


def labels_of(cache: FeatureCache, path: str | Path | None) -> tuple[Path, dict[str, str], int]:
    """Return (labels file, label by guid of the rows in the cache, number of labels without a row).

    Raises
    ------
    DataError
        No labels file given or recorded, or no label for any row.
    """
    found = path if path is not None else cache.header.dataset["labels"]
    if found is None:
        raise DataError(f"{cache.path} was made without labels: give --labels FILE, a CSV with header guid,tag")
    if not Path(found).is_file():
        raise DataError(f"no such labels file: {found}; say with --labels where it is")
    labelled = {guid: tag for guid, tag in read_labels(found).items() if tag is not None}
    labels = {guid: tag for guid, tag in labelled.items() if guid in cache}
    if not labels:
        raise DataError(
            f"none of the {len(labelled)} labels in {found} is of a pair in {cache.path}: is it the labels file of "
            f"{cache.header.dataset['data']}?"
        )
    return Path(found).absolute(), labels, len(labelled) - len(labels)


def _check_writable(runs: Path) -> None:
    """Find out before training, not after it, that nothing can be written; an ``OSError`` says why."""
    runs.mkdir(parents=True, exist_ok=True)
    with disk_full_is_clear(runs), tempfile.TemporaryDirectory(prefix=_DRAFT, dir=runs):
        pass


def rows_of(cache: FeatureCache, guids: list[str], labels: dict[str, str], classes: list[str]) -> Rows:
    """Return embeddings and class numbers of ``guids``, in their order.

    Raises
    ------
    DataError
        Where a label is not one of ``classes``.
    """
    number = {name: index for index, name in enumerate(classes)}
    for guid in guids:
        if labels[guid] not in number:
            raise DataError(f"guid {guid!r} has the label {labels[guid]!r}, the head knows {', '.join(classes)}")
    image, text = cache.embeddings(guids)
    return Rows(image, text, np.array([number[labels[guid]] for guid in guids], dtype=np.int64))


def train_head(
    cache_path: str | Path,
    labels_path: str | Path | None = None,
    recipe: Recipe | None = None,
    split_dir: str | Path | None = None,
    split_seed: int = 42,
    runs: str | Path = "artifacts/runs",
    device: str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train a head on cached features and write a run folder.

    Parameters
    ----------
    cache_path
        What ``featurize`` wrote.
    labels_path
        CSV ``guid,tag``; default: the one recorded in the cache.
    recipe
        How to train.
    split_dir
        Folder with train, val and test CSVs to reuse; default: a stratified 8:1:1 split by ``split_seed``.
    runs
        Where the run folder goes; ``latest`` in it points at the newest.
    on_epoch
        Called with each epoch's scores.

    Returns
    -------
    dict
        What ``metrics.json`` holds: ``run``, ``best_pt``, ``train``, ``val``, ``test`` (see ``metrics.score``),
        ``parameters``, ``best_epoch``, ``epochs``, ``labels_without_features``, ``seconds``.
    """
    started = time.perf_counter()
    recipe = recipe or Recipe()
    _check_writable(Path(runs))
    with FeatureCache.open(cache_path) as cache:
        labels_file, labels, absent = labels_of(cache, labels_path)
        if split_dir is not None:
            split = read_split(split_dir, labels)
        else:
            split = stratified_split(list(labels), list(labels.values()), split_seed)
        classes = sorted({labels[guid] for guids in split.named().values() for guid in guids})
        rows = {name: rows_of(cache, guids, labels, classes) for name, guids in split.named().items()}
        trained = fit(recipe, len(classes), rows["train"], rows["val"], device=device, on_epoch=on_epoch)
        checkpoint = _checkpoint(cache, trained, recipe, classes, split, labels_file)
        metrics: dict[str, Any] = {name: _score(checkpoint, part) for name, part in rows.items()}
        metrics["labels_without_features"] = absent
        config = _config(cache, labels_file, recipe, split_dir, split_seed)
        return _write_run(Path(runs), checkpoint, trained, metrics, config, labels, started)


def train_full(
    source: str | Path,
    cache_path: str | Path | None = None,
    labels_path: str | Path | None = None,
    runs: str | Path = "artifacts/runs",
    device: str = "cpu",
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train the head of an earlier run again, on all labelled rows, for the epochs that it found best.

    Recipe, number of epochs and learning rate of each epoch are those of the run whose best.pt is ``source``. Nothing
    is held out, so there is no validation or test score.

    Returns
    -------
    dict
        As ``train_head``, with ``train`` only.
    """
    started = time.perf_counter()
    earlier = load_checkpoint(source)
    source = earlier.path or Path(source)
    _check_writable(Path(runs))
    if not earlier.split.val:
        raise CheckpointError(f"{source} was itself trained on all rows: give the run that held some out")
    history = source.parent / "history.csv"
    if not history.is_file():
        raise CheckpointError(f"no {history.name} beside {source}: give a best.pt inside its run folder")
    with history.open(newline="") as file:
        schedule = [float(row["lr"]) for row in csv.DictReader(file)][: earlier.best_epoch]
    with FeatureCache.open(cache_path or earlier.made_from["cache"]) as cache:
        earlier.check_cache(cache)
        labels_file, labels, absent = labels_of(cache, labels_path or earlier.made_from["labels"])
        split = Split(list(labels), [], [])
        rows = rows_of(cache, split.train, labels, earlier.classes)
        missing = sorted(set(earlier.classes) - set(labels.values()))
        if missing:
            raise DataError(f"{labels_file} has no row of class {missing[0]!r}, which the run of {source} knows")
        trained = fit(earlier.recipe, len(earlier.classes), rows, schedule=schedule, device=device, on_epoch=on_epoch)
        recipe = replace(earlier.recipe, epochs=len(schedule))
        checkpoint = _checkpoint(cache, trained, recipe, earlier.classes, split, labels_file)
        metrics = {"train": _score(checkpoint, rows), "labels_without_features": absent}
        config = _config(cache, labels_file, recipe, None, None) | {"full": True, "epochs_from": str(source)}
        return _write_run(Path(runs), checkpoint, trained, metrics, config, labels, started)


def evaluate(
    best_pt: str | Path,
    cache_path: str | Path | None = None,
    on: Sequence[str] = ("val", "test"),
    labels_path: str | Path | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score a best.pt on the rows that it held out, or on labelled rows that it has not seen.

    Parameters
    ----------
    cache_path, labels_path
        Default: those that the head was trained with.
    on
        Parts of its split (``train``, ``val``, ``test``), or ``new``: rows of ``labels_path`` that are in none of them.

    Returns
    -------
    dict
        ``best_pt``, ``classes``, ``fusion``, ``modality``, ``labels_without_features``, and a score (see
        ``metrics.score``) by part.
    """
    checkpoint = load_checkpoint(best_pt, device)
    with FeatureCache.open(cache_path or checkpoint.made_from["cache"]) as cache:
        checkpoint.check_cache(cache)
        _, labels, absent = labels_of(cache, labels_path or checkpoint.made_from["labels"])
        result: dict[str, Any] = {"best_pt": str(checkpoint.path), "classes": checkpoint.classes}
        result |= {"fusion": checkpoint.recipe.fusion, "modality": checkpoint.recipe.modality}
        result["labels_without_features"] = absent
        parts = checkpoint.split.named()
        seen = {guid for guids in parts.values() for guid in guids}
        parts["new"] = [guid for guid in labels if guid not in seen]
        for name in [on] if isinstance(on, str) else on:
            guids = parts[name]
            if not guids:
                why = (
                    "give --labels FILE with labels of other pairs"
                    if name == "new"
                    else "it learned from all rows; give --from the run that held some out"
                )
                raise DataError(f"{checkpoint.path} has no {name} row to be scored on: {why}")
            unlabelled = [guid for guid in guids if guid not in labels]
            if unlabelled:
                raise DataError(
                    f"{len(unlabelled)} of {len(guids)} {name} rows have no label or no features here, the first is "
                    f"{unlabelled[0]!r}: give the labels file and the cache that the head was trained with"
                )
            result[name] = _score(checkpoint, rows_of(cache, guids, labels, checkpoint.classes))
    return result


def _score(checkpoint: Checkpoint, rows: Rows) -> dict[str, Any]:
    logits = predict_logits(checkpoint.head, rows.image, rows.text)
    return score(rows.classes, logits.argmax(axis=1), checkpoint.classes)


def _checkpoint(
    cache: FeatureCache, trained: Fit, recipe: Recipe, classes: list[str], split: Split, labels_file: Path
) -> Checkpoint:
    return Checkpoint(
        head=trained.head,
        classes=classes,
        dim=cache.dim,
        recipe=recipe,
        identity=cache.header.identity,
        backbone=cache.header.backbone,
        split=split,
        best_epoch=trained.best_epoch,
        made_from={"cache": str(cache.path.absolute()), "labels": str(labels_file)},
    )


def _config(
    cache: FeatureCache, labels_file: Path, recipe: Recipe, split_dir: str | Path | None, split_seed: int | None
) -> dict[str, Any]:
    return {
        "recipe": recipe.to_dict(),
        "cache": str(cache.path.absolute()),
        "labels": str(labels_file),
        "split_dir": None if split_dir is None else str(Path(split_dir).absolute()),
        "split_seed": split_seed if split_dir is None else None,
        "fingerprint": cache.fingerprint,
        "backbone": cache.header.backbone,
        "dataset": cache.header.dataset,
        "versions": cache.header.versions,
    }


def _write_run(
    runs: Path,
    checkpoint: Checkpoint,
    trained: Fit,
    metrics: dict[str, Any],
    config: dict[str, Any],
    labels: dict[str, str],
    started: float,
) -> dict[str, Any]:
    """Write the run folder under a temporary name, then rename it and point ``latest`` at it."""
    _remove_abandoned(runs)
    with disk_full_is_clear(runs):
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=runs))
    folder = _reserve_name(runs, checkpoint.recipe)
    try:
        draft.chmod(0o755)
        with disk_full_is_clear(draft):
            save_checkpoint(draft / "best.pt", checkpoint)
            columns = list(trained.history[0])
            rows = ([record[name] for name in columns] for record in trained.history)
            write_text(draft / "history.csv", table_text(columns, rows))
            write_split(draft / "splits", checkpoint.split, labels)
            figures.curves(trained.history, trained.best_epoch, draft / "curves.png")
            shown = "test" if "test" in metrics else "train"
            figures.confusion(metrics[shown]["confusion"], checkpoint.classes, shown, draft / "confusion.png")
            write_text(draft / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
            result = {
                "run": str(folder.absolute()),
                "best_pt": str(folder.absolute() / "best.pt"),
                "classes": checkpoint.classes,
                "fusion": checkpoint.recipe.fusion,
                "modality": checkpoint.recipe.modality,
                "parameters": checkpoint.head.n_parameters(),
                "best_epoch": trained.best_epoch,
                "epochs": len(trained.history),
                **metrics,
                "seconds": time.perf_counter() - started,
            }
            write_text(draft / "metrics.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only a reserved name that was not used is empty
    _point_latest(runs, folder.name)
    return result


def _reserve_name(runs: Path, recipe: Recipe) -> Path:
    """Make an empty folder that no other run, of the same second or not, can take."""
    what = recipe.fusion if recipe.modality == "both" else recipe.modality
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{what}"
    folder, number = runs / name, 2
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder, number = runs / f"{name}-{number}", number + 1


def _remove_abandoned(runs: Path) -> None:
    """Delete the drafts of runs that were killed more than a day ago."""
    for draft in runs.glob(f"{_DRAFT}*"):
        if time.time() - draft.stat().st_mtime > 86_400:
            shutil.rmtree(draft, ignore_errors=True)


def _point_latest(runs: Path, name: str) -> None:
    pointer = runs / f".latest.{os.getpid()}.tmp"
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(name, target_is_directory=True)
        os.replace(pointer, runs / "latest")
    finally:
        pointer.unlink(missing_ok=True)
