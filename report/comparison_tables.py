"""Tables of experiments."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .score_table import ScoreTable
from .tables import class_table, f1_of_class, with_interval

if TYPE_CHECKING:
    from ..heads.experiments.results import Comparison, Difference, SplitComparison

_MOST_CLASSES = 40  # rows that a table of classes can have
_FEW_FITS = 8


def comparison_tables(result: "Comparison", by_class: bool = True) -> list[ScoreTable | str]:
    """Return the scores with differences, F1 by class, and a sentence on which differences are real."""
    candidates, classes = result.candidates, result.data.classes
    rows = [
        (
            candidate.name,
            with_interval(candidate.macro_f1, candidate.macro_f1_ci),
            with_interval(candidate.accuracy, candidate.accuracy_ci),
            *_difference_cells(candidate.difference),
            f"{candidate.parameters:,}",
            f"{candidate.fit_seconds:.2f}",
        )
        for candidate in candidates
    ]
    columns = ("", "macro-F1", "accuracy", "difference", "p", "p Holm", "p folds", "parameters", "fit s")
    parts: list[ScoreTable | str] = [ScoreTable(columns, rows, _comparison_title(result))]
    if by_class and len(classes) <= _MOST_CLASSES:
        parts.append(class_table({candidate.name: candidate for candidate in candidates}, classes))
    elif by_class:
        parts.append(f"F1 of each of the {len(classes)} classes: in results.json")
    return [*parts, verdict(result)]


def _comparison_title(result: "Comparison") -> str:
    protocol, n_rows, copies = result.protocol, result.data.n_rows, result.data.copies
    title = f"out of fold, 95 % intervals; {protocol.folds} folds x {protocol.repeats}, {n_rows:,} rows"
    if copies:
        title += f" in {n_rows - copies:,} groups of copies, kept on one side and drawn together"
    left_out = ", test rows left out" if protocol.without_test else ""
    return f"{title}{left_out}; differences from {result.against}"


def _difference_cells(difference: "Difference | None") -> list[str]:
    """Return the difference in macro-F1 with its interval, and its three p values; dashes where there is none."""
    if difference is None:
        return ["-"] * 4
    change = f"{difference.macro_f1:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    return [change, *map(_p, (difference.p_bootstrap, difference.p_bootstrap_holm, difference.p_corrected_t_holm))]


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"


def verdict(result: "Comparison", level: float = 0.05) -> str:
    """Say in words which candidates differ from ``against``."""
    compared = {candidate.name: candidate.difference for candidate in result.candidates if candidate.difference}
    if not compared:
        return ""
    by_rows = [name for name, difference in compared.items() if difference.p_bootstrap_holm < level]
    clear = [name for name in by_rows if compared[name].p_corrected_t_holm < level]
    rows_only = [name for name in by_rows if name not in clear]
    alike = [name for name in compared if name not in by_rows]
    against = result.against
    sentences = []
    if clear:
        sentences.append(f"Different from {against} by both tests: {', '.join(clear)}.")
    if rows_only:
        sentences.append(
            "Different for these fits (p Holm), but perhaps not for other training rows (p folds): "
            f"{', '.join(rows_only)}."
        )
    if alike:
        sentences.append(f"Not distinguishable from {against}: {', '.join(alike)}.")
    fits = result.protocol.folds * result.protocol.repeats
    if fits < _FEW_FITS:
        sentences.append(
            f"({fits} fits per candidate say little about how much fits vary: more --repeats make differences clearer.)"
        )
    return " ".join(sentences)


def focus_table(result: "Comparison") -> ScoreTable:
    """One column per candidate: F1 and recall of the focus class, and which classes its rows are taken for."""
    focus, classes, candidates = result.focus_class, result.data.classes, result.candidates
    scores = [candidate.per_class[focus] for candidate in candidates]
    counts = [candidate.confusion[classes.index(focus)] for candidate in candidates]
    rows = [
        ("F1", *map(f1_of_class, scores)),
        ("recall", *(with_interval(of_class.recall or 0, of_class.recall_ci or (0, 0)) for of_class in scores)),
    ]
    for number, name in enumerate(classes):
        shares = (f"{row[number] / max(sum(row), 1):.0%} ({row[number]:.0f})" for row in counts)
        rows.append((f"called {name}", *shares))
    title = f"rows of class {focus}: scores, and what they are called"
    return ScoreTable(("", *(candidate.name for candidate in candidates)), rows, title)


def single_split_tables(result: "SplitComparison", what: str) -> list[ScoreTable]:
    """Return the published report's table of fusions (``what`` compare) or of modalities (``ablate``)."""
    sizes = ", ".join(f"{count:,} {name}" for name, count in result.n_rows.items())
    scored = [scores for candidate in result.candidates for scores in (candidate.val, candidate.test)]
    copies = ", copies drawn together" if any(scores.n_groups < scores.n for scores in scored) else ""
    title = f"one split: {sizes} rows; 95 % intervals{copies}"
    focus, classes = result.focus_class, result.data.classes
    rows = []
    for candidate in result.candidates:
        test, focus_scores = candidate.test, candidate.test.per_class[focus]
        test_f1 = with_interval(test.macro_f1, test.macro_f1_ci)
        if what == "compare":
            val_f1 = with_interval(candidate.val.macro_f1, candidate.val.macro_f1_ci)
            gap, parameters = f"{candidate.gap:+.3f}", f"{candidate.parameters:,}"
            cells = [val_f1, test_f1, gap, f1_of_class(focus_scores), parameters]
        else:
            called = map(str, test.confusion[classes.index(focus)])
            scores = [with_interval(test.accuracy, test.accuracy_ci), test_f1, f1_of_class(focus_scores)]
            cells = [*scores, f"{focus_scores.recall:.2f}", *called]
        rows.append((candidate.name, *cells))
    if what == "compare":
        columns = ["val F1", "test F1", "gap", f"F1 of {focus}", "parameters"]
    else:
        called_names = [f"called {name}" for name in classes]
        columns = ["test accuracy", "test F1", f"F1 of {focus}", f"recall of {focus}", *called_names]
    return [ScoreTable(("", *columns), rows, title)]


def fusions_table(fusions: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], n_classes: int) -> ScoreTable:
    """One row per fusion: formula, source, parameters of the head."""
    numbers = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items() if size)
    rows = []
    for fusion in fusions:
        source = fusion["source"] + ("; needs featurize --tokens" if fusion["needs_tokens"] else "")
        counted = "no tokens here" if fusion["parameters"] is None else f"{fusion['parameters']:,}"
        linear = "-" if fusion["parameters_linear"] is None else f"{fusion['parameters_linear']:,}"
        rows.append((fusion["name"], fusion["formula"], source, counted, linear))
    columns = ("fusion", "what the MLP sees", "source", "parameters", "with --head linear")
    title = f"v image, t text; parameters of the whole head for {numbers}, {n_classes} classes"
    return ScoreTable(columns, rows, title, text_columns=3)
