"""The run folder: what ``train-head`` leaves, and what ``--full`` reads back from it."""

import csv
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...cache.atomic import write_json, write_text
from ...cache.errors import CheckpointError
from ...cache.labels import table_text
from ...cache.store import FeatureCache
from ..evaluation.splits import write_split
from ..recipe import Recipe
from ..training.loop import Fit
from .checkpoint import Checkpoint, save_checkpoint
from .folders import new_folder


def read_schedules(earlier: Checkpoint) -> list[list[float] | None]:
    """Return, for each head of a run, the learning rates up to its best epoch; None for a linear head of stage 1."""
    if earlier.recipe.head == "linear" and earlier.recipe.finetune is None:
        return [None for _ in earlier.seeds]
    source = earlier.path
    assert source is not None
    history = source.parent / "history.csv"
    if not history.is_file():
        raise CheckpointError(f"no {history.name} beside {source}: give a best.pt inside its run folder")
    with history.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    return [
        [float(record["lr"]) for record in records if int(record["seed"]) == seed][:epochs]
        for seed, epochs in zip(earlier.seeds, earlier.best_epochs, strict=True)
    ]


def config_of(cache: FeatureCache, labels_file: Path, recipe: Recipe) -> dict[str, Any]:
    """Return what ``config.json`` holds."""
    return {
        "recipe": recipe.to_dict(),
        "cache": str(cache.path.absolute()),
        "labels": str(labels_file),
        "fingerprint": cache.fingerprint,
        "backbone": cache.header.backbone,
        "dataset": cache.header.dataset,
        "versions": cache.header.versions,
    }


def write_run(
    runs: Path,
    checkpoint: Checkpoint,
    fits: Mapping[int, Fit],
    metrics: dict[str, Any],
    config: dict[str, Any],
    labels: dict[str, str],
    started: float,
    name: str | None = None,
) -> dict[str, Any]:
    """Write a run folder into ``runs``; return what its ``metrics.json`` holds, and ``notes`` where there are any.

    Parameters
    ----------
    fits
        By seed.
    metrics, config
        What goes into ``metrics.json``, beside what can be said of any run, and into ``config.json``.
    name
        Last part of the folder's name; default: what the head sees.
    """
    from ...report import figures  # here, because whoever draws nothing must not wait for matplotlib

    first = next(iter(fits.values()))
    notes: list[str] = []
    with new_folder(runs, name or checkpoint.recipe.sees, notes.append) as (draft, folder):
        for what in ("cache", "labels"):
            place = os.path.realpath(checkpoint.made_from[what])
            checkpoint.made_from[f"{what}_from_run"] = os.path.relpath(place, os.path.realpath(folder))
        save_checkpoint(draft / "best.pt", checkpoint)
        columns = list(first.history[0])
        rows = ([seed, *(record[each] for each in columns)] for seed, found in fits.items() for record in found.history)
        write_text(draft / "history.csv", table_text(["seed", *columns], rows))
        write_split(draft / "splits", checkpoint.split, labels)
        if "lr" in columns:  # a linear head has no epochs
            histories, best_epochs = zip(*((found.history, found.best_epoch) for found in fits.values()), strict=True)
            figures.curves(histories, best_epochs, draft / "curves.png")
        shown = next(part for part in ("test", "val", "train") if part in metrics)
        figures.confusion(metrics[shown]["confusion"], checkpoint.classes, shown, draft / "confusion.png")
        write_json(draft / "config.json", config)
        result = {
            "run": str(folder.absolute()),
            "best_pt": str(folder.absolute() / "best.pt"),
            "classes": checkpoint.classes,
            "fusion": checkpoint.recipe.fusion,
            "modality": checkpoint.recipe.modality,
            "head": checkpoint.recipe.head,
            "parameters": checkpoint.head.n_parameters(),
            "best_epoch": first.best_epoch,
            "epochs": len(first.history),
            **metrics,
            "seconds": time.perf_counter() - started,
        }
        write_json(draft / "metrics.json", result)
    return result | ({"notes": notes} if notes else {})
