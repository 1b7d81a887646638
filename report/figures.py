"""Figures as PNG files: learning curves, confusion matrices, differences between candidates."""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Estimate = tuple[float, float, float]  # a score or difference, and its interval

_MOST_NAMED = 15  # names and counts of more classes are too small to read
_TRAIN, _VAL, _MARK = "#4c72b0", "#dd8452", "#555555"


def curves(histories: Sequence[Sequence[dict[str, float]]], best_epochs: Sequence[int], path: Path) -> None:
    """Draw loss and macro-F1 of training and validation over the epochs, with a line per seed and the best epochs."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    alpha = 1.0 if len(histories) == 1 else 0.4
    for axes, what, title in zip(figure.subplots(1, 2), ("loss", "macro_f1"), ("Loss", "Macro-F1"), strict=True):
        for number, history in enumerate(histories):
            epochs = [record["epoch"] for record in history]
            for part, name, color in (("train", "train", _TRAIN), ("val", "validation", _VAL)):
                if f"{part}_{what}" in history[0]:
                    values = [record[f"{part}_{what}"] for record in history]
                    axes.plot(epochs, values, color=color, alpha=alpha, label=None if number else name)
        if f"val_{what}" in histories[0][0]:
            for number, best in enumerate(best_epochs):
                label = None if number else f"best epoch ({best})" if len(best_epochs) == 1 else "best epochs"
                axes.axvline(best, color=_MARK, linestyle=":", alpha=alpha, label=label)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    _write(figure, path)


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str], part: str, path: Path) -> None:
    """Draw a confusion matrix: counts, shaded by the share of the true class; many classes get shades only."""
    few, classes = len(classes) <= _MOST_NAMED, _drawable(classes)
    size = 2.2 + 0.9 * min(len(classes), _MOST_NAMED)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    axes = figure.subplots()
    shares = [[count / max(sum(row), 1) for count in row] for row in matrix]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, counts in enumerate(matrix if few else []):
        for column, count in enumerate(counts):
            share = shares[row][column]
            color = "white" if share > 0.5 else "black"
            axes.text(column, row, f"{count}\n{share:.0%}", ha="center", va="center", color=color)
    if few:
        axes.set_xticks(range(len(classes)), classes, rotation=45 if len(classes) > 4 else 0, parse_math=False)
        axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set(xlabel="predicted", ylabel="true", title=f"Confusion, {part} rows")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    _write(figure, path)


def differences(
    scores: Mapping[str, Estimate], changes: Mapping[str, Estimate | None], against: str, path: Path
) -> None:
    """Draw macro-F1 of each candidate with its interval, and its difference from ``against`` with its interval."""
    places = range(len(scores), 0, -1)
    figure = Figure(figsize=(10, 1.4 + 0.38 * len(scores)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, name in zip(places, scores, strict=True):
        _dot(left, place, scores[name], _TRAIN)
        change = changes[name]
        if change is None:
            right.plot(0, place, "D", color=_MARK)
        else:
            _dot(right, place, change, _MARK if change[1] <= 0 <= change[2] else _VAL)
    right.axvline(0, color=_MARK, linestyle=":")
    left.set_yticks(places, _drawable(list(scores)), parse_math=False)
    left.set(xlabel="macro-F1 out of fold", title="Score, 95 % interval")
    right.set(title="Difference, 95 % interval (orange: not across 0)")
    right.set_xlabel(f"difference in macro-F1 from {against}", parse_math=False)
    for axes in (left, right):
        axes.grid(alpha=0.3, axis="x")
        axes.set_ylim(0.4, len(scores) + 0.6)
    _write(figure, path)


def _write(figure: Figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the font may lack the script of a name, and draws boxes
        FigureCanvasAgg(figure).print_png(path)


def _drawable(names: Sequence[str]) -> list[str]:
    """Return names with escapes for lone surrogates and control characters, which no font has."""
    return [re.sub("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda match: ascii(match[0])[1:-1], name) for name in names]


def _dot(axes: Axes, place: float, estimate: Estimate, color: str) -> None:
    value, low, high = estimate
    axes.plot((low, high), [place, place], color=color, linewidth=2, alpha=0.6)
    axes.plot(value, place, "o", color=color)
