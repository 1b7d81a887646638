"""Tables of stage 2, from plain data as it stands in ``metrics.json``."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .tables import count_of, score_tables, title_of_scores, with_interval

_STAGES = {"stage1": "stage 1", "stage2": "stage 2"}
_PARTS = ("train", "val", "test")


def stages_tables(result: Mapping[str, Any]) -> list[Table]:
    """Return both stages side by side: macro-F1 and accuracy by part, and F1 of each class on the test rows.

    Where the split has no test part, F1 of each class is on the validation rows.
    """
    parts = [part for part in _PARTS if part in result["stage1"]]
    table = Table(title=title_of_scores(result["stage1"][part] for part in parts), title_justify="left")
    table.add_column("rows of")
    table.add_column("n", justify="right")
    for what in ("macro-F1", "accuracy"):
        for name in _STAGES.values():
            table.add_column(f"{what}, {name}", justify="right")
    table.add_column("difference in macro-F1", justify="right")
    for part in parts:
        scores = [result[stage][part] for stage in _STAGES]
        cells = [with_interval(one[name], one[f"{name}_ci"]) for name in ("macro_f1", "accuracy") for one in scores]
        found = result["difference"].get(part)
        apart = "" if found is None else f"{found['macro_f1']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
        table.add_row(part, count_of(scores[0]), *cells, apart)
    last, of_last = {"test": ("test", "test"), "val": ("val", "validation")}[parts[-1]]
    _, by_class = score_tables({name: result[stage][last] for stage, name in _STAGES.items()}, result["classes"])
    by_class.title, by_class.title_justify = f"on the {of_last} rows", "left"
    return [table, by_class]


def stages_verdict(result: Mapping[str, Any]) -> str:
    """Say in words which stage is kept and why, how far training and validation are apart, and what is overfitted."""
    one, two = (result[stage]["val"]["macro_f1"] for stage in _STAGES)
    if result["kept"] == "stage 2":
        found = result["difference"]["val"]
        sure = found["low"] > 0
        said = [f"Stage 2 is better on the validation rows ({two:.3f}, stage 1 {one:.3f}), and best.pt holds it."]
        if not sure:
            said.append("The interval of that difference is not clear of 0: it may be luck (mmcli compare tells more).")
    else:
        said = [
            f"Stage 2 is no better than stage 1 on the validation rows ({two:.3f}, stage 1 {one:.3f}): best.pt holds "
            "stage 1."
        ]
    gaps = [result[stage]["gap"] for stage in _STAGES]
    said.append(f"Macro-F1 of training less validation rows: {gaps[0]:.3f} in stage 1, {gaps[1]:.3f} in stage 2.")
    for seed, found in result["overfitting"].items():
        of_seed = f" (seed {seed})" if len(result["seeds"]) > 1 else ""
        said.append(
            f"It is overfitting{of_seed}: after epoch {found['since']:.0f} the validation loss rises "
            f"({found['val_loss']:.3f} to {found['val_loss_end']:.3f}) while the training loss falls "
            f"({found['train_loss']:.3f} to {found['train_loss_end']:.3f})."
        )
    return " ".join(said)
