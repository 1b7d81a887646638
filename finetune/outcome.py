"""The outcome of stage 2: the scores of both stages, which stage is kept, and whether stage 2 overfits."""

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

_RISE = 0.01  # a loss has risen if it ends more than this share above its lowest value


@dataclass(frozen=True)
class Outcome:
    """Both stages side by side: the heads of stage 1, and the models of stage 2 that started from them.

    Attributes
    ----------
    stages
        The checkpoints by name (``stage1``, ``stage2``).
    fits
        The fits of stage 2, in the order of its seeds.
    scores
        By stage and part; see ``metrics.score``.
    difference
        Macro-F1 of stage 2 less macro-F1 of stage 1 by part, with a 95 % interval over groups of copies.
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
        """Return the entries of ``metrics.json`` about both stages (see ``finetune``)."""
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
        Rows by part (``train``, ``val``, and ``test`` if the split has it), with the states that stage 2 needs.
    groups
        Group of each row by part, (n,): rows of a group are copies, and intervals are over groups.
    """
    stages = {"stage1": stage1, "stage2": stage2}
    scores: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    difference = {}
    for name, part in rows.items():
        classes = [predicted(checkpoint.head, part) for checkpoint in stages.values()]
        for stage, numbers in zip(stages, classes, strict=True):
            scores[stage][name] = score(part.classes, numbers, stage1.classes, groups[name])
        if name != "train":
            both, n_classes = np.stack(classes)[:, None], len(stage1.classes)
            drawn = paired_bootstrap(part.classes, both, n_classes, seed=0, groups=groups[name]).macro_f1
            low, high = interval(drawn[:, 1] - drawn[:, 0])
            change = scores["stage2"][name]["macro_f1"] - scores["stage1"][name]["macro_f1"]
            difference[name] = {"macro_f1": change, "low": low, "high": high}
    return Outcome(stages, fits, scores, difference)


def overfitting(history: Sequence[Mapping[str, float]]) -> dict[str, float] | None:
    """Return where a fit began to overfit, or None if it did not.

    A fit overfits if, after the epoch with the lowest validation loss, the training loss falls further and the
    validation loss ends more than a hundredth above its lowest value.

    Returns
    -------
    dict
        ``since`` (the epoch with the lowest validation loss), ``val_loss`` and ``train_loss`` in this epoch, and
        ``val_loss_end`` and ``train_loss_end`` in the last epoch.
    """
    turn, end = min(history, key=lambda record: record["val_loss"]), history[-1]
    if end["val_loss"] <= turn["val_loss"] * (1 + _RISE) or end["train_loss"] >= turn["train_loss"]:
        return None
    return {
        "since": turn["epoch"],
        **{name: turn[name] for name in ("val_loss", "train_loss")},
        **{f"{name}_end": end[name] for name in ("val_loss", "train_loss")},
    }
