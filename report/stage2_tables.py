"""Tables of stage 2, from plain data as it stands in ``metrics.json``."""

from collections.abc import Mapping
from typing import Any

from .score_table import ScoreTable
from .tables import class_table, count_of, title_of_scores, with_interval

_STAGES = {"stage1": "stage 1", "stage2": "stage 2"}
_SCORES = {"macro_f1": "macro-F1", "accuracy": "accuracy"}
_PARTS = {"train": "training", "val": "validation", "test": "test"}


def stages_tables(result: Mapping[str, Any]) -> list[ScoreTable]:
    """Return both stages side by side: macro-F1 and accuracy by part, and F1 of each class on the test rows.

    If the split has no test part, F1 of each class is on the validation rows.
    """
    parts = [part for part in _PARTS if part in result["stage1"]]
    rows = []
    for part in parts:
        scores = [result[stage][part] for stage in _STAGES]
        cells = [with_interval(of_stage[name], of_stage[f"{name}_ci"]) for name in _SCORES for of_stage in scores]
        found = result["difference"].get(part)
        difference = "" if found is None else f"{found['macro_f1']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        rows.append((part, count_of(scores[0]), *cells, difference))
    columns = [f"{score}, {stage}" for score in _SCORES.values() for stage in _STAGES.values()]
    title = title_of_scores(result["stage1"][part] for part in parts)
    last = parts[-1]
    return [
        ScoreTable(("rows", "n", *columns, "difference in macro-F1"), rows, title),
        class_table(
            {name: result[stage][last] for stage, name in _STAGES.items()},
            result["classes"],
            f"on the {_PARTS[last]} rows",
        ),
    ]


def stages_verdict(result: Mapping[str, Any]) -> str:
    """Say in words which stage is kept and why, how far training and validation are apart, and what overfits."""
    one, two = (result[stage]["val"]["macro_f1"] for stage in _STAGES)
    if result["kept"] == "stage 2":
        text = [f"Stage 2 is better on the validation rows ({two:.3f}, stage 1 {one:.3f}): best.pt holds stage 2."]
        if result["difference"]["val"]["low"] <= 0:
            text.append("The interval of that difference includes 0: it may be luck (mmcli compare tells more).")
    else:
        text = [
            f"Stage 2 is no better than stage 1 on the validation rows ({two:.3f}, stage 1 {one:.3f}): best.pt holds "
            "stage 1."
        ]
    gaps = [result[stage]["gap"] for stage in _STAGES]
    text.append(
        f"Macro-F1 on training rows minus macro-F1 on validation rows: {gaps[0]:.3f} in stage 1, {gaps[1]:.3f} in "
        "stage 2."
    )
    for seed, losses in result["overfitting"].items():
        model = f" (seed {seed})" if len(result["seeds"]) > 1 else ""
        text.append(
            f"Stage 2 overfits{model}: after epoch {losses['since']:.0f} the validation loss rises "
            f"({losses['val_loss']:.3f} to {losses['val_loss_end']:.3f}) while the training loss falls "
            f"({losses['train_loss']:.3f} to {losses['train_loss_end']:.3f})."
        )
    return " ".join(text)
