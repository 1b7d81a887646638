"""Both stages side by side: their scores, which is kept, and whether stage 2 overfits."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..evaluation.metrics import Scores, interval, score
from ..evaluation.statistics import paired_bootstrap
from ..model.head import Ensemble, predicted_classes
from ..model.inputs import Rows
from ..training.loop import Fit

_RISE = 0.01  # a loss has risen if it ends more than this share above its lowest value


class StageDifference(NamedTuple):
    """Macro-F1 of stage 2 less macro-F1 of stage 1, with a 95 % interval over groups of copies."""

    macro_f1: float
    low: float
    high: float


class Overfitting(NamedTuple):
    """The epoch with the lowest validation loss, and both losses in this epoch and in the last."""

    since: float
    val_loss: float
    train_loss: float
    val_loss_end: float
    train_loss_end: float


@dataclass(frozen=True)
class Stages:
    """Scores of the heads of stage 1, and of the models of stage 2 that started from them.

    Attributes
    ----------
    kept
        What best.pt holds: ``stage 2``, or ``stage 1`` if stage 2 is no better on the validation rows.
    scores
        By stage (``stage1``, ``stage2``) and part.
    stage1_best_pt
        The best.pt of stage 1.
    difference
        By part, without ``train``.
    layers, parameters, names
        Unfrozen layers by tower, number and names of their parameters.
    overfitting
        By seed of stage 2, for the models that overfit.
    seconds_before_training
        Time until all states were ready.
    """

    kept: str
    scores: dict[str, dict[str, Scores]]
    stage1_best_pt: str
    difference: dict[str, StageDifference]
    layers: dict[str, int]
    parameters: int
    names: list[str]
    overfitting: dict[int, Overfitting]
    seconds_before_training: float

    def gap(self, stage: str) -> float:
        """Return macro-F1 of a stage on the training rows less that on the validation rows."""
        return self.scores[stage]["train"].macro_f1 - self.scores[stage]["val"].macro_f1

    def to_dict(self) -> dict[str, Any]:
        """Return this as the entries of ``metrics.json``."""
        plain: dict[str, Any] = {
            "kept": self.kept,
            "difference": {part: difference._asdict() for part, difference in self.difference.items()},
            "unfrozen": {"layers": self.layers, "parameters": self.parameters, "names": self.names},
            "overfitting": {str(seed): losses._asdict() for seed, losses in self.overfitting.items()},
            "seconds_before_training": self.seconds_before_training,
        }
        for stage, scores in self.scores.items():
            plain[stage] = {part: asdict(part_scores) for part, part_scores in scores.items()}
            plain[stage]["gap"] = self.gap(stage)
        plain["stage1"]["best_pt"] = self.stage1_best_pt
        return plain


@dataclass(frozen=True)
class TrainedStages:
    """The heads of both stages, the fits of stage 2 by seed, its layers by tower, and the best.pt of stage 1."""

    stage1: Ensemble
    stage2: Ensemble
    fits: Mapping[int, Fit]
    layers: dict[str, int]
    stage1_best_pt: str


def compare_stages(
    trained: TrainedStages,
    classes: Sequence[str],
    rows: Mapping[str, Rows],
    groups: Mapping[str, NDArray[np.int64]],
    seconds_before_training: float,
) -> Stages:
    """Score both stages on each part: ``train``, ``val``, and ``test`` if the split has it.

    ``rows`` have the states that stage 2 needs. ``groups`` are the groups of copies of the rows, (n,) by part.
    """
    scores: dict[str, dict[str, Scores]] = {"stage1": {}, "stage2": {}}
    difference = {}
    for part, part_rows in rows.items():
        predicted = [predicted_classes(head, part_rows) for head in (trained.stage1, trained.stage2)]
        for stage, numbers in zip(scores, predicted, strict=True):
            scores[stage][part] = score(part_rows.classes, numbers, classes, groups[part])
        if part != "train":
            candidates = np.stack(predicted)[:, None]
            drawn = paired_bootstrap(part_rows.classes, candidates, len(classes), seed=0, groups=groups[part]).macro_f1
            change = scores["stage2"][part].macro_f1 - scores["stage1"][part].macro_f1
            difference[part] = StageDifference(change, *interval(drawn[:, 1] - drawn[:, 0]))
    unfrozen = next(iter(trained.fits.values())).head.unfrozen()
    losses = {seed: find_overfitting(fitted.history) for seed, fitted in trained.fits.items()}
    is_better = stage2_is_better(scores["stage1"]["val"].macro_f1, scores["stage2"]["val"].macro_f1)
    return Stages(
        kept="stage 2" if is_better else "stage 1",
        scores=scores,
        stage1_best_pt=trained.stage1_best_pt,
        difference=difference,
        layers=trained.layers,
        parameters=sum(weight.numel() for weight in unfrozen.values()),
        names=sorted(unfrozen),
        overfitting={seed: found for seed, found in losses.items() if found is not None},
        seconds_before_training=seconds_before_training,
    )


def stage2_is_better(stage1: float, stage2: float) -> bool:
    """Return whether stage 2 is kept, from the macro-F1 of both stages on the validation rows."""
    return stage2 > stage1


def find_overfitting(history: Sequence[Mapping[str, float]]) -> Overfitting | None:
    """Return where a fit began to overfit, or None if it did not.

    A fit overfits if, after the epoch with the lowest validation loss, the training loss falls further and the
    validation loss ends more than a hundredth above its lowest value.
    """
    turn, end = min(history, key=lambda record: record["val_loss"]), history[-1]
    if end["val_loss"] <= turn["val_loss"] * (1 + _RISE) or end["train_loss"] >= turn["train_loss"]:
        return None
    return Overfitting(turn["epoch"], turn["val_loss"], turn["train_loss"], end["val_loss"], end["train_loss"])
