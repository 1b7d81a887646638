"""Tables of stage 2."""

from typing import TYPE_CHECKING

from .score_table import ScoreTable
from .tables import class_table, count_of, title_of_scores, with_interval

if TYPE_CHECKING:
    from ..heads.runs.stages import Stages

_STAGES = {"stage1": "stage 1", "stage2": "stage 2"}
_PARTS = {"train": "training", "val": "validation", "test": "test"}


def stages_tables(stages: "Stages", classes: list[str]) -> list[ScoreTable]:
    """Return both stages side by side: macro-F1 and accuracy by part, and F1 of each class on the test rows.

    If the split has no test part, F1 of each class is on the validation rows.
    """
    rows, parts = [], [part for part in _PARTS if part in stages.scores["stage1"]]
    for part in parts:
        scores = [stages.scores[stage][part] for stage in _STAGES]
        cells = [with_interval(of_stage.macro_f1, of_stage.macro_f1_ci) for of_stage in scores]
        cells += [with_interval(of_stage.accuracy, of_stage.accuracy_ci) for of_stage in scores]
        if part in stages.difference:
            change, low, high = stages.difference[part]
            cells.append(f"{change:+.3f} [{low:+.3f}, {high:+.3f}]")
        else:
            cells.append("")
        rows.append((part, count_of(scores[0]), *cells))
    columns = [f"{score}, {stage}" for score in ("macro-F1", "accuracy") for stage in _STAGES.values()]
    by_stage = {name: stages.scores[stage][parts[-1]] for stage, name in _STAGES.items()}
    title = title_of_scores(stages.scores["stage1"].values())
    return [
        ScoreTable(("rows", "n", *columns, "difference in macro-F1"), rows, title),
        class_table(by_stage, classes, f"on the {_PARTS[parts[-1]]} rows"),
    ]


def stages_verdict(stages: "Stages", several: bool) -> str:
    """Say in words which stage is kept and why, how far training and validation are apart, and what overfits.

    ``several`` says whether stage 2 trained several models.
    """
    first, second = (stages.scores[stage]["val"].macro_f1 for stage in _STAGES)
    if stages.kept == "stage 2":
        text = [f"Stage 2 is better on the validation rows ({second:.3f}, stage 1 {first:.3f}): best.pt holds stage 2."]
        if stages.difference["val"].low <= 0:
            text.append("The interval of that difference includes 0: it may be luck (mmcli compare tells more).")
    else:
        text = [
            f"Stage 2 is no better than stage 1 on the validation rows ({second:.3f}, stage 1 {first:.3f}): best.pt "
            "holds stage 1."
        ]
    gaps = [stages.gap(stage) for stage in _STAGES]
    text.append(
        f"Macro-F1 on training rows minus macro-F1 on validation rows: {gaps[0]:.3f} in stage 1, {gaps[1]:.3f} in "
        "stage 2."
    )
    for seed, losses in stages.overfitting.items():
        model = f" (seed {seed})" if several else ""
        text.append(
            f"Stage 2 overfits{model}: after epoch {losses.since:.0f} the validation loss rises "
            f"({losses.val_loss:.3f} to {losses.val_loss_end:.3f}) while the training loss falls "
            f"({losses.train_loss:.3f} to {losses.train_loss_end:.3f})."
        )
    return " ".join(text)
