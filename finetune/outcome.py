"""What stage 2 brought: its scores beside those of stage 1, which of the two is kept, and whether it overfits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..heads.evaluation.metrics import interval, score
from ..heads.evaluation.statistics import paired_bootstrap
from ..heads.model.head import Ensemble
from ..heads.model.losses import fit_offsets
from ..heads.runs.checkpoint import Checkpoint, save_checkpoint
from ..heads.training.loop import predict_logits as predict_frozen
from .checkpoint import FinetunedCheckpoint
from .model import predict_parts
from .recipe import FinetuneRecipe
from .training import FinetuneFit, Labelled

_RISE = 0.01  # share by which a loss must have risen to be called rising
STAGES = ("stage1", "stage2")


class Outcome:
    """The models of stage 2 together, beside the head that they went on from.

    Parameters
    ----------
    stage1
        The checkpoint that stage 2 went on from.
    fits
        One per seed.
    settings
        Of stage 2.
    labelled
        Rows by part: ``train``, ``val`` and, where the split has it, ``test``.
    groups
        By part, (n,): rows with the same number are copies, and intervals are over groups.
    device
        A torch device.
    """

    def __init__(
        self,
        stage1: Checkpoint,
        fits: Sequence[FinetuneFit],
        settings: FinetuneRecipe,
        labelled: Mapping[str, Labelled],
        groups: Mapping[str, NDArray[np.int64]],
        device: str,
    ) -> None:
        self.stage1, self.fits, self.settings, self.labelled, self.groups = stage1, fits, settings, labelled, groups
        self.seeds = [stage1.recipe.reseeded(number).seed for number in range(len(fits))]
        self.together = Ensemble([found.model.head for found in fits], len(stage1.classes)).eval().to(device)
        models = [found.model for found in fits]
        frozen = {name: predict_frozen(stage1.head, each.rows.features) for name, each in labelled.items()}
        with torch.no_grad():
            logits = {
                name: self.together.combined([predict_parts(model, each.rows, device).mean(dim=0) for model in models])
                for name, each in labelled.items()
            }
            if stage1.recipe.offsets:
                offsets = fit_offsets(logits["val"].cpu().numpy(), labelled["val"].classes)
                self.together.offsets.copy_(self.together.offsets.new_tensor(offsets))
            finetuned = {name: (each + self.together.offsets).cpu().numpy() for name, each in logits.items()}
        self.predicted: dict[str, dict[str, NDArray[np.int64]]] = {
            stage: {name: each.argmax(axis=1) for name, each in of_stage.items()}
            for stage, of_stage in zip(STAGES, (frozen, finetuned), strict=True)
        }
        self.scores = {
            stage: {
                name: score(labelled[name].classes, each, stage1.classes, groups[name])
                for name, each in of_stage.items()
            }
            for stage, of_stage in self.predicted.items()
        }
        self.is_better = bool(self.scores["stage2"]["val"]["macro_f1"] > self.scores["stage1"]["val"]["macro_f1"])

    def metrics(self) -> dict[str, Any]:
        """Return what ``metrics.json`` says of stage 2 (see ``finetune``)."""
        model = self.fits[0].model
        backbone = sum(each.numel() for each in model.unfrozen())
        heads = self.together if self.is_better else self.stage1.head
        result: dict[str, Any] = {
            "kept": "stage 2" if self.is_better else "stage 1",
            **self.scores["stage2" if self.is_better else "stage1"],
            "difference": {name: self._difference(name) for name in ("val", "test") if name in self.labelled},
            "parameters": heads.n_parameters() + (backbone * len(self.fits) if self.is_better else 0),
            "unfrozen": {"layers": self.settings.layers(), "parameters": backbone, "names": sorted(model.changed())},
            "seeds": [
                {"seed": seed, "epochs": len(found.history), "best_epoch": found.best_epoch}
                for seed, found in zip(self.seeds, self.fits, strict=True)
            ],
            "overfitting": {
                str(seed): found
                for seed, fit in zip(self.seeds, self.fits, strict=True)
                if (found := overfitting(fit.history)) is not None
            },
        }
        for stage, scores in self.scores.items():
            result[stage] = {**scores, "gap": scores["train"]["macro_f1"] - scores["val"]["macro_f1"]}
        result["stage1"]["best_pt"] = str(self.stage1.path)
        if self.stage1.recipe.offsets:
            result["offsets"] = dict(zip(self.stage1.classes, heads.offsets.tolist(), strict=True))
        return result

    def _difference(self, part: str) -> dict[str, float]:
        """Return stage 2 less stage 1 in macro-F1, with a 95 % interval over groups of copies."""
        pair = np.stack([self.predicted[stage][part] for stage in STAGES])[:, None]
        true, n_classes = self.labelled[part].classes, len(self.stage1.classes)
        drawn = paired_bootstrap(true, pair, n_classes, seed=0, groups=self.groups[part]).macro_f1
        low, high = interval(drawn[:, 1] - drawn[:, 0])
        of_each = [self.scores[stage][part]["macro_f1"] for stage in STAGES]
        return {"macro_f1": of_each[1] - of_each[0], "low": low, "high": high}

    def kept(self, made_from: dict[str, str]) -> tuple[Checkpoint, Callable[[Path], None]]:
        """Return the checkpoint of the better stage, and what writes its best.pt."""
        if not self.is_better:
            kept = replace(self.stage1, made_from=made_from, path=None)
            return kept, lambda path: save_checkpoint(path, kept)
        checkpoint = replace(
            self.stage1,
            head=self.together,
            seeds=self.seeds,
            best_epochs=[found.best_epoch for found in self.fits],
            made_from=made_from,
            path=None,
        )
        found = FinetunedCheckpoint(checkpoint, self.settings, [each.model.changed() for each in self.fits])
        return checkpoint, found.save


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
