"""The run folder, which ``train-head`` and ``finetune`` write and ``--full`` reads."""

import csv
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...cache.atomic import write_json, write_text
from ...cache.errors import CheckpointError, MmcliError
from ...cache.labels import table_text
from ...cache.schema import Header
from ...featurize.encode import OnProgress
from ..evaluation.metrics import Scores
from ..evaluation.splits import write_split
from ..recipe import Recipe
from ..training.loop import Fit
from .checkpoint import Checkpoint, save_checkpoint
from .folders import new_folder
from .labelled import RowReport
from .stages import Stages


@dataclass(frozen=True)
class RunOptions:
    """Where a run is written, and how its heads are trained.

    Attributes
    ----------
    runs
        Folder of run folders; ``latest`` in it points at the newest.
    seeds
        Number of heads, which differ in their seed; best.pt is the ensemble of their probabilities. Default: 1, or in
        stage 2 a head for each head of stage 1.
    device
        A torch device.
    jobs
        Processes for several heads of stage 1; default: one per core.
    max_bytes
        Memory for all processes together; features that do not fit are read as they are needed.
    """

    runs: str | Path = "artifacts/runs"
    seeds: int | None = None
    device: str = "cpu"
    jobs: int | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.seeds is not None and self.seeds < 1:
            raise MmcliError(f"seeds must be 1 or more, found {self.seeds}")


@dataclass(frozen=True)
class Watch:
    """Callbacks during the run; each may be None.

    Attributes
    ----------
    on_fit
        Called with (heads trained, heads to train) in stage 1; for a single head, with (epochs done, epochs at most).
    on_states
        Called with (pairs computed, pairs to compute) while the frozen part of stage 2 is computed.
    on_step
        Called with (steps done, steps at most) in stage 2.
    on_note
        Called with a sentence for the user.
    """

    on_states: OnProgress | None = None
    on_step: OnProgress | None = None
    on_note: Callable[[str], None] | None = None
    on_fit: OnProgress | None = None

    def note(self, text: str) -> None:
        """Pass a sentence to the user."""
        if self.on_note is not None:
            self.on_note(text)


class Spread(NamedTuple):
    """Mean and standard deviation of a score over heads that differ in their seed."""

    mean: float
    sd: float


@dataclass(frozen=True)
class SeedScores:
    """A head of an ensemble: its seed, its epochs, and by part its macro-F1 and accuracy (for several heads)."""

    seed: int
    epochs: int
    best_epoch: int
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data, with the scores of each part on top."""
        return {"seed": self.seed, "epochs": self.epochs, "best_epoch": self.best_epoch, **self.scores}


@dataclass(frozen=True)
class RunResult:
    """What a run gave: the content of its ``metrics.json``.

    Attributes
    ----------
    run, best_pt
        The run folder, and the file in it.
    parameters, best_epoch, epochs
        Parameters of all heads, and the epochs of the first head. After stage 2, epochs and seeds are those of stage 2.
    scores
        By part: ``train``, and ``val`` and ``test`` where the split has them.
    seeds
        Each head alone.
    offsets
        Number added to the logits of each class, where they were fitted.
    rows
        What became of the labelled rows.
    stages
        After stage 2, both stages side by side.
    full_of
        The best.pt of the run that was repeated on all rows.
    """

    run: str
    best_pt: str
    classes: list[str]
    fusion: str
    modality: str
    head: str
    parameters: int
    best_epoch: int
    epochs: int
    scores: dict[str, Scores]
    seeds: list[SeedScores]
    offsets: dict[str, float] | None
    rows: RowReport
    stages: Stages | None
    full_of: str | None
    seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def over_seeds(self) -> dict[str, dict[str, Spread]]:
        """Spread of macro-F1 and accuracy over single heads, by part; empty for a single head."""
        spreads: dict[str, dict[str, Spread]] = {}
        for part in self.seeds[0].scores:
            for name in ("macro_f1", "accuracy"):
                values = [seed.scores[part][name] for seed in self.seeds]
                spreads.setdefault(part, {})[name] = Spread(float(np.mean(values)), float(np.std(values, ddof=1)))
        return spreads

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data, with the scores of each part, the rows and the stages on top."""
        plain = {name: value for name, value in vars(self).items() if value is not None}
        plain["seeds"] = [seed.to_dict() for seed in self.seeds]
        plain |= {part: scores.to_dict() for part, scores in plain.pop("scores").items()} | plain.pop("rows").to_dict()
        if self.stages is not None:
            plain |= plain.pop("stages").to_dict()
        if self.over_seeds:
            plain["over_seeds"] = {
                part: {name: spread._asdict() for name, spread in spreads.items()}
                for part, spreads in self.over_seeds.items()
            }
        if not self.notes:
            del plain["notes"]
        return plain


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


@dataclass(frozen=True)
class RunContent:
    """What ``write_run`` needs beside the checkpoint.

    Attributes
    ----------
    recipe
        As trained, so with stage 2 even where stage 1 is kept.
    header
        Header of the cache.
    labels
        Label by guid of the rows in the split.
    fits, seeds
        The fits, and the heads in them alone.
    config
        Further entries of ``config.json``.
    started
        ``time.perf_counter()`` at the start of the run.
    scores, rows, stages, full_of
        As in ``RunResult``.
    """

    recipe: Recipe
    header: Header
    labels: dict[str, str]
    fits: Sequence[Fit]
    seeds: list[SeedScores]
    config: Mapping[str, Any]
    started: float
    scores: dict[str, Scores]
    rows: RowReport
    stages: Stages | None = None
    full_of: str | None = None


def write_run(runs: str | Path, checkpoint: Checkpoint, content: RunContent) -> RunResult:
    """Write a run folder into ``runs``. Adds ``cache_from_run`` and ``labels_from_run`` to ``checkpoint.made_from``."""
    from ...report import figures  # imported here, because importing matplotlib takes a while

    recipe, fits, scores = content.recipe, content.fits, content.scores
    name = recipe.sees if recipe.finetune is None else f"{recipe.sees}-finetune"
    config = {
        "recipe": recipe.to_dict(),
        **checkpoint.made_from,
        "fingerprint": checkpoint.fingerprint,
        "backbone": content.header.backbone,
        "dataset": content.header.dataset,
        "versions": content.header.versions,
        **content.config,
    }
    notes: list[str] = []
    with new_folder(Path(runs), name, notes.append) as (draft, folder):
        for source in ("cache", "labels"):
            path = os.path.realpath(checkpoint.made_from[source])
            checkpoint.made_from[f"{source}_from_run"] = os.path.relpath(path, os.path.realpath(folder))
        save_checkpoint(draft / "best.pt", checkpoint)
        columns = list(fits[0].history[0])
        records = (
            [head.seed, *(record[column] for column in columns)]
            for head, fitted in zip(content.seeds, fits, strict=True)
            for record in fitted.history
        )
        write_text(draft / "history.csv", table_text(["seed", *columns], records))
        write_split(draft / "splits", checkpoint.split, content.labels)
        if "lr" in columns:  # a linear head has no epochs
            histories = [fitted.history for fitted in fits]
            figures.curves(histories, [fitted.best_epoch for fitted in fits], draft / "curves.png")
        shown = next(part for part in ("test", "val", "train") if part in scores)
        figures.confusion(scores[shown].confusion, checkpoint.classes, shown, draft / "confusion.png")
        write_json(draft / "config.json", config)
        result = RunResult(
            run=str(folder.absolute()),
            best_pt=str(folder.absolute() / "best.pt"),
            classes=checkpoint.classes,
            fusion=checkpoint.recipe.fusion,
            modality=checkpoint.recipe.modality,
            head=checkpoint.recipe.head,
            parameters=checkpoint.head.n_parameters(),
            best_epoch=fits[0].best_epoch,
            epochs=len(fits[0].history),
            scores=scores,
            seeds=content.seeds,
            offsets=checkpoint.offset_by_class() if recipe.offsets else None,
            rows=content.rows,
            stages=content.stages,
            full_of=content.full_of,
            seconds=time.perf_counter() - content.started,
        )
        write_json(draft / "metrics.json", result.to_dict())
    return replace(result, notes=notes)
