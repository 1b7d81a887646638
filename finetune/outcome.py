"""What stage 2 brought: its scores beside those of stage 1, which of the two is kept, and whether it overfits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..heads.evaluation.metrics import interval, score
from ..heads.evaluation.statistics import paired_bootstrap
from ..heads.model.inputs import Rows
from ..heads.runs.assembly import predicted
from ..heads.runs.checkpoint import Checkpoint
from ..heads.training.loop import Fit

_RISE = 0.01  # share by which a loss must have risen to be called rising


@dataclass(frozen=True)
class Outcome:
    """The models of stage 2 together, beside the heads that they started from.

    Attributes
    ----------
    stages
        By name (``stage1``, ``stage2``): the checkpoint.
    fits
        Of stage 2, in the order of its seeds.
    scores
        By stage and part: see ``metrics.score``.
    difference
        By part: macro-F1 of stage 2 minus that of stage 1, with a 95 % interval over groups of copies.
    """

    stages: dict[str, Checkpoint]
    fits: Sequence[Fit]
    scores: dict[str, dict[str, Any]]
    difference: dict[str, dict[str, float]]

    @property
    def is_better(self) -> bool:
        """Whether stage 2 has the higher macro-F1 on the validation rows."""
        return bool(self.scores["stage2"]["val"]["macro_f1"] > self.scores["stage1"]["val"]["macro_f1"])

    @property
    def kept(self) -> Checkpoint:
        """The checkpoint of the better stage."""
        return self.stages["stage2" if self.is_better else "stage1"]

    def metrics(self) -> dict[str, Any]:
        """Return what ``metrics.json`` says of both stages (see ``finetune``)."""
        first, second = self.stages["stage1"], self.stages["stage2"]
        head = self.fits[0].head
        unfrozen = head.unfrozen()
        warnings = {seed: overfitting(fit.history) for seed, fit in zip(second.seeds, self.fits, strict=True)}
        assert second.recipe.finetune is not None
        result: dict[str, Any] = {
            "kept": "stage 2" if self.is_better else "stage 1",
            **self.scores["stage2" if self.is_better else "stage1"],
            "difference": self.difference,
            "unfrozen": {
                "layers": second.recipe.finetune.layers(),
                "parameters": sum(weight.numel() for weight in unfrozen.values()),
                "names": sorted(unfrozen),
            },
            "overfitting": {str(seed): warning for seed, warning in warnings.items() if warning is not None},
        }
        for stage, scores in self.scores.items():
            result[stage] = {**scores, "gap": scores["train"]["macro_f1"] - scores["val"]["macro_f1"]}
        result["stage1"]["best_pt"] = str(first.path)
        return result


def compare_stages(
    stage1: Checkpoint,
    stage2: Checkpoint,
    fits: Sequence[Fit],
    rows: Mapping[str, Rows],
    groups: Mapping[str, NDArray[np.int64]],
) -> Outcome:
    """Score both stages on each part.

    Parameters
    ----------
    stage1, stage2, fits
        The checkpoints, and the fits of ``stage2``.
    rows
        By part (``train``, ``val`` and, where the split has it, ``test``), with the states that stage 2 sees.
    groups
        By part, (n,): rows with the same number are copies, and intervals are over groups.
    """
    stages = {"stage1": stage1, "stage2": stage2}
    classes = {
        stage: {name: predicted(checkpoint.head, part) for name, part in rows.items()}
        for stage, checkpoint in stages.items()
    }
    scores = {
        stage: {
            name: score(rows[name].classes, numbers, stage1.classes, groups[name]) for name, numbers in parts.items()
        }
        for stage, parts in classes.items()
    }
    difference = {}
    for name in ("val", "test"):
        if name in rows:
            both = np.stack([classes[stage][name] for stage in stages])[:, None]
            n_classes = len(stage1.classes)
            drawn = paired_bootstrap(rows[name].classes, both, n_classes, seed=0, groups=groups[name]).macro_f1
            low, high = interval(drawn[:, 1] - drawn[:, 0])
            change = scores["stage2"][name]["macro_f1"] - scores["stage1"][name]["macro_f1"]
            difference[name] = {"macro_f1": change, "low": low, "high": high}
    return Outcome(stages, fits, scores, difference)


def overfitting(history: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Say where a fit began to learn its training rows by heart; None where it did not.

    That is so where, after the epoch with the lowest validation loss, the training loss falls further and the
    validation loss ends more than a hundredth above its lowest.

    Returns
    -------
    dict
        ``since`` (the epoch with the lowest validation loss), and ``val_loss``, ``train_loss`` there and at the end as
        ``val_loss_end``, ``train_loss_end``.
    """
    turn, end = min(history, key=lambda record: record["val_loss"]), history[-1]
    if end["val_loss"] <= turn["val_loss"] * (1 + _RISE) or end["train_loss"] >= turn["train_loss"]:
        return None
    return {
        "since": turn["epoch"],
        **{name: turn[name] for name in ("val_loss", "train_loss")},
        **{f"{name}_end": end[name] for name in ("val_loss", "train_loss")},
    }
