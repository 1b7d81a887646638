"""From finished fits to the checkpoint of a run and the scores of its heads."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.store import FeatureCache
from ..evaluation.metrics import quick_scores, score
from ..evaluation.splits import Split
from ..model.head import Ensemble, predict_logits
from ..model.inputs import Rows
from ..model.losses import fit_offsets
from ..recipe import Recipe
from ..training.loop import Fit
from .checkpoint import Checkpoint


def checkpoint_of(
    cache: FeatureCache, fits: Sequence[Fit], recipe: Recipe, classes: list[str], split: Split, labels_file: Path
) -> Checkpoint:
    """Return the checkpoint of the heads in ``fits``, whose seeds are consecutive."""
    heads = [fitted.head for fitted in fits]
    return Checkpoint(
        head=Ensemble(heads, len(classes)).eval().to(next(heads[0].parameters()).device),
        classes=classes,
        sizes=heads[0].sizes,
        recipe=recipe,
        seeds=[recipe.reseeded(number).seed for number in range(len(fits))],
        identity=cache.header.identity,
        backbone=cache.header.backbone,
        split=split,
        best_epochs=[fitted.best_epoch for fitted in fits],
        made_from={"cache": str(cache.path.absolute()), "labels": str(labels_file)},
        changed=[head.weights()["changed"] for head in heads if head.tops],
    )


def learn_offsets(head: Ensemble, val: Rows) -> None:
    """Fit the offset of each class, so that macro-F1 rises on the validation rows."""
    offsets = fit_offsets(predict_logits(head, val.features), val.classes)
    head.offsets.copy_(head.offsets.new_tensor(offsets))


def predicted(head: Ensemble, rows: Rows) -> NDArray[np.int64]:
    """Return the number of the predicted class of each row, (n,)."""
    return predict_logits(head, rows.features).argmax(axis=1)


def scores_by_part(
    head: Ensemble, rows: Mapping[str, Rows], classes: list[str], groups: Mapping[str, NDArray[np.int64]]
) -> dict[str, Any]:
    """Return the scores (see ``metrics.score``) of each part."""
    return {name: score(part.classes, predicted(head, part), classes, groups[name]) for name, part in rows.items()}


def seed_scores(checkpoint: Checkpoint, fits: Sequence[Fit], rows: Mapping[str, Rows]) -> dict[str, Any]:
    """Return the scores of each single head, their mean and standard deviation, and the offsets of the ensemble."""
    entries = []
    for seed, fitted in zip(checkpoint.seeds, fits, strict=True):
        entry: dict[str, Any] = {"seed": seed, "epochs": len(fitted.history), "best_epoch": fitted.best_epoch}
        if len(fits) > 1:
            alone = Ensemble([fitted.head], len(checkpoint.classes))
            if checkpoint.recipe.offsets and "val" in rows:
                learn_offsets(alone, rows["val"])
            for name in ("val", "test"):
                if name in rows:
                    classes = predicted(alone, rows[name])
                    entry[name] = quick_scores(rows[name].classes, classes, len(checkpoint.classes))
        entries.append(entry)
    result: dict[str, Any] = {"seeds": entries}
    if len(fits) > 1 and rows:
        result["over_seeds"] = {
            part: {
                metric: {
                    "mean": float(np.mean([entry[part][metric] for entry in entries])),
                    "sd": float(np.std([entry[part][metric] for entry in entries], ddof=1)),
                }
                for metric in ("macro_f1", "accuracy")
            }
            for part in ("val", "test")
            if part in rows
        }
    if checkpoint.recipe.offsets:
        result["offsets"] = checkpoint.offset_by_class()
    return result
