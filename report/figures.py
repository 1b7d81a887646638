"""Figures as PNG files, from plain data: lists and dicts as they stand in ``history.csv`` and ``metrics.json``."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_MOST_NAMED = 15  # classes whose names and counts can still be read
_TRAIN, _VAL, _MARK = "#4c72b0", "#dd8452", "#555555"


def curves(history: Sequence[dict[str, float]], best_epoch: int, path: Path) -> None:
    """Draw loss and macro-F1 over epochs, training and validation, with a line at the best epoch."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    epochs = [record["epoch"] for record in history]
    for axes, what, title in zip(figure.subplots(1, 2), ("loss", "macro_f1"), ("Loss", "Macro-F1"), strict=True):
        axes.plot(epochs, [record[f"train_{what}"] for record in history], color=_TRAIN, label="train")
        if f"val_{what}" in history[0]:
            axes.plot(epochs, [record[f"val_{what}"] for record in history], color=_VAL, label="validation")
            axes.axvline(best_epoch, color=_MARK, linestyle=":", label=f"best epoch ({best_epoch})")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], part: str, path: Path) -> None:
    """Draw a confusion matrix: counts, shaded by the share of the true class; of many classes, the shades alone."""
    few = len(classes) <= _MOST_NAMED
    size = 2.2 + 0.9 * min(len(classes), _MOST_NAMED)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, counts in enumerate(matrix if few else []):
        for column, count in enumerate(counts):
            share = shares[row][column]
            axes.text(
                column,
                row,
                f"{count}\n{share:.0%}",
                ha="center",
                va="center",
                color="white" if share > 0.5 else "black",
            )
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=45 if len(classes) > 4 else 0, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title=f"Confusion, {part} rows")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class name in a script that the font lacks is drawn as boxes
        FigureCanvasAgg(figure).print_png(path)
