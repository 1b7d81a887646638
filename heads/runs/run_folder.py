"""The run folder, which ``train-head`` and ``finetune`` write and ``--full`` reads."""

import csv
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cache.atomic import write_json, write_text
from ...cache.errors import CheckpointError
from ...cache.labels import table_text
from ...cache.store import FeatureCache
from ..evaluation.splits import write_split
from ..recipe import Recipe
from ..training.loop import Fit
from .best_pt import save_checkpoint
from .checkpoint import Checkpoint
from .folders import new_folder


def read_schedules(earlier: Checkpoint) -> list[list[float] | None]:
    """Return the learning rates of each head up to its best epoch; None for a linear head of stage 1."""
    if earlier.recipe.head == "linear" and earlier.recipe.finetune is None:
        return [None for _ in earlier.seeds]
    assert earlier.path is not None
    history = earlier.path.with_name("history.csv")
    if not history.is_file():
        raise CheckpointError(f"no {history.name} beside {earlier.path}: give a best.pt inside its run folder")
    with history.open(newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    return [
        [float(record["lr"]) for record in records if int(record["seed"]) == seed][:epochs]
        for seed, epochs in zip(earlier.seeds, earlier.best_epochs, strict=True)
    ]


def config_of(cache: FeatureCache, labels_file: Path, recipe: Recipe) -> dict[str, Any]:
    """Return the content of ``config.json`` that all runs have."""
    return {
        "recipe": recipe.to_dict(),
        "cache": str(cache.path.absolute()),
        "labels": str(labels_file),
        "fingerprint": cache.fingerprint,
        "backbone": cache.header.backbone,
        "dataset": cache.header.dataset,
        "versions": cache.header.versions,
    }


@dataclass(frozen=True)
class RunContent:
    """The content of a run folder.

    Attributes
    ----------
    name
        Last part of the name of the folder.
    checkpoint
        The content of best.pt. Writing it adds ``cache_from_run`` and ``labels_from_run`` to ``made_from``.
    fits
        By seed.
    metrics
        The content of ``metrics.json``, without what is the same for all runs.
    config
        The content of ``config.json``.
    labels
        Label by guid of the rows in the split.
    """

    name: str
    checkpoint: Checkpoint
    fits: Mapping[int, Fit]
    metrics: dict[str, Any]
    config: dict[str, Any]
    labels: dict[str, str]


def write_run(runs: Path, content: RunContent, started: float) -> dict[str, Any]:
    """Write a run folder into ``runs``; return its ``metrics.json``, with ``notes`` if there are any.

    Parameters
    ----------
    started
        ``time.perf_counter()`` at the start of the run.
    """
    from ...report import figures  # imported here, because importing matplotlib takes a while

    checkpoint, metrics, fits = content.checkpoint, content.metrics, list(content.fits.values())
    notes: list[str] = []
    with new_folder(runs, content.name, notes.append) as (draft, folder):
        for source in ("cache", "labels"):
            path = os.path.realpath(checkpoint.made_from[source])
            checkpoint.made_from[f"{source}_from_run"] = os.path.relpath(path, os.path.realpath(folder))
        save_checkpoint(draft / "best.pt", checkpoint)
        columns = list(fits[0].history[0])
        rows = (
            [seed, *(record[column] for column in columns)]
            for seed, fitted in content.fits.items()
            for record in fitted.history
        )
        write_text(draft / "history.csv", table_text(["seed", *columns], rows))
        write_split(draft / "splits", checkpoint.split, content.labels)
        if "lr" in columns:  # a linear head has no epochs
            histories = [fitted.history for fitted in fits]
            figures.curves(histories, [fitted.best_epoch for fitted in fits], draft / "curves.png")
        shown = next(part for part in ("test", "val", "train") if part in metrics)
        figures.confusion(metrics[shown]["confusion"], checkpoint.classes, shown, draft / "confusion.png")
        write_json(draft / "config.json", content.config)
        result = {
            "run": str(folder.absolute()),
            "best_pt": str(folder.absolute() / "best.pt"),
            "classes": checkpoint.classes,
            "fusion": checkpoint.recipe.fusion,
            "modality": checkpoint.recipe.modality,
            "head": checkpoint.recipe.head,
            "parameters": checkpoint.head.n_parameters(),
            "best_epoch": fits[0].best_epoch,
            "epochs": len(fits[0].history),
            **metrics,
            "seconds": time.perf_counter() - started,
        }
        write_json(draft / "metrics.json", result)
    return result | ({"notes": notes} if notes else {})
