"""The run folder: what ``train-head`` leaves, and what ``--full`` reads back from it."""

import csv
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ...cache.atomic import write_json, write_text
from ...cache.errors import CheckpointError
from ...cache.labels import table_text
from ...cache.store import FeatureCache
from ...report.drawing import draw
from ..evaluation.splits import write_split
from ..recipe import Recipe
from .checkpoint import Checkpoint, save_checkpoint
from .folders import new_folder


class Fitted(Protocol):
    """What a run folder says of a fit of either stage."""

    history: list[dict[str, float]]
    best_epoch: int


def read_schedules(source: Path, earlier: Checkpoint) -> list[list[float] | None]:
    """Return, for each head of a run, the learning rates up to its best epoch; None for a linear head."""
    if earlier.recipe.head == "linear":
        return [None for _ in earlier.seeds]
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
    fits: Mapping[int, Fitted],
    metrics: dict[str, Any],
    config: dict[str, Any],
    labels: dict[str, str],
    started: float,
    name: str | None = None,
    save: Callable[[Path], None] | None = None,
    draw: Callable[..., None] = draw,
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
    save
        Writes best.pt; default: that of ``checkpoint``.
    draw
        Draws a figure: ``report.drawing.draw``, or a ``Pencil``.
    """
    first = next(iter(fits.values()))
    notes: list[str] = []
    with new_folder(runs, name or checkpoint.recipe.sees, notes.append) as (draft, folder):
        for what in ("cache", "labels"):
            place = os.path.realpath(checkpoint.made_from[what])
            checkpoint.made_from[f"{what}_from_run"] = os.path.relpath(place, os.path.realpath(folder))
        if save is None:
            save_checkpoint(draft / "best.pt", checkpoint)
        else:
            save(draft / "best.pt")
        columns = list(first.history[0])
        rows = ([seed, *(record[each] for each in columns)] for seed, found in fits.items() for record in found.history)
        write_text(draft / "history.csv", table_text(["seed", *columns], rows))
        write_split(draft / "splits", checkpoint.split, labels)
        if "lr" in columns:  # a linear head has no epochs
            histories, best_epochs = zip(*((found.history, found.best_epoch) for found in fits.values()), strict=True)
            draw("curves", histories, best_epochs, path=draft / "curves.png")
        shown = next(part for part in ("test", "val", "train") if part in metrics)
        draw("confusion", metrics[shown]["confusion"], checkpoint.classes, shown, path=draft / "confusion.png")
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
