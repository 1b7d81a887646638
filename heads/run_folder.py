"""The run folder: what ``train-head`` leaves, and what ``--full`` reads back from it."""

import csv
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..cache.atomic import write_json, write_text
from ..cache.errors import CheckpointError
from ..cache.labels import table_text
from ..cache.store import FeatureCache
from .checkpoint import Checkpoint, save_checkpoint
from .folders import new_folder
from .recipe import Recipe
from .splits import write_split
from .training import Fit


def read_schedules(source: Path, earlier: Checkpoint) -> list[list[float] | None]:
    """Return, for each head of a run, the learning rates up to its best epoch; None for a linear head."""
    if earlier.recipe.head == "linear":
        return [None for _ in earlier.seeds]
    history = source.parent / "history.csv"
    if not history.is_file():
        raise CheckpointError(f"no {history.name} beside {source}: give a best.pt inside its run folder")
    with history.open(newline="") as file:
        records = list(csv.DictReader(file))
    return [
        [float(record["lr"]) for record in records if int(record["seed"]) == seed][:epochs]
        for seed, epochs in zip(earlier.seeds, earlier.best_epochs, strict=True)
    ]


def config_of(
    cache: FeatureCache, labels_file: Path, recipe: Recipe, split_dir: str | Path | None, split_seed: int | None
) -> dict[str, Any]:
    """Return what ``config.json`` holds."""
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


def write_run(
    runs: Path,
    checkpoint: Checkpoint,
    fits: Sequence[Fit],
    metrics: dict[str, Any],
    config: dict[str, Any],
    labels: dict[str, str],
    started: float,
) -> dict[str, Any]:
    """Write a run folder into ``runs`` and return what its ``metrics.json`` holds."""
    from ..report import figures  # here, because workers that only fit must not wait for matplotlib

    histories = {seed: found.history for seed, found in zip(checkpoint.seeds, fits, strict=True)}
    with new_folder(runs, checkpoint.recipe.sees) as (draft, folder):
        save_checkpoint(draft / "best.pt", checkpoint)
        columns = list(fits[0].history[0])
        rows = ([seed, *(record[name] for name in columns)] for seed, each in histories.items() for record in each)
        write_text(draft / "history.csv", table_text(["seed", *columns], rows))
        write_split(draft / "splits", checkpoint.split, labels)
        if checkpoint.recipe.head == "mlp":
            figures.curves(list(histories.values()), checkpoint.best_epochs, draft / "curves.png")
        shown = "test" if "test" in metrics else "train"
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
            "best_epoch": fits[0].best_epoch,
            "epochs": len(fits[0].history),
            **metrics,
            "seconds": time.perf_counter() - started,
        }
        write_json(draft / "metrics.json", result)
    return result
