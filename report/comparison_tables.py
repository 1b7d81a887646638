"""Tables of experiments, from plain data as it stands in ``results.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

from .score_table import ScoreTable
from .tables import class_table, with_interval

_MOST_CLASSES = 40  # rows that a table of classes can have
_FEW_FITS = 8


def comparison_tables(result: Mapping[str, Any], by_class: bool = True) -> list[ScoreTable | str]:
    """Return the scores with differences, F1 by class, and a sentence on which differences are real."""
    candidates, classes = result["candidates"], result["classes"]
    rows = [
        (
            candidate["name"],
            with_interval(candidate["macro_f1"], candidate["macro_f1_ci"]),
            with_interval(candidate["accuracy"], candidate["accuracy_ci"]),
            *_difference_cells(candidate["difference"]),
            f"{candidate['parameters']:,}",
            f"{candidate['fit_seconds']:.2f}",
        )
        for candidate in candidates
    ]
    columns = ("", "macro-F1", "accuracy", "difference", "p", "p Holm", "p folds", "parameters", "fit s")
    parts: list[ScoreTable | str] = [ScoreTable(columns, rows, _comparison_title(result))]
    if by_class and len(classes) <= _MOST_CLASSES:
        parts.append(class_table({candidate["name"]: candidate for candidate in candidates}, classes))
    elif by_class:
        parts.append(f"F1 of each of the {len(classes)} classes: in results.json")
    return [*parts, verdict(result)]


def _comparison_title(result: Mapping[str, Any]) -> str:
    protocol = f"{result['folds']} folds x {result['repeats']}, {result['rows']:,} rows"
    groups = result["rows"] - result["copies"]
    copies = f" in {groups:,} groups of copies, kept on one side and drawn together" if result["copies"] else ""
    left_out = ", test rows left out" if result["without_test"] else ""
    return f"out of fold, 95 % intervals; {protocol}{copies}{left_out}; differences from {result['against']}"


def _difference_cells(difference: Mapping[str, Any] | None) -> list[str]:
    """Return the difference in macro-F1 with its interval, and its three p values; dashes where there is none."""
    if difference is None:
        return ["-"] * 4
    change = f"{difference['macro_f1']:+.3f} [{difference['low']:+.3f}, {difference['high']:+.3f}]"
    return [change, *(_p(difference[name]) for name in ("p_bootstrap", "p_bootstrap_holm", "p_corrected_t_holm"))]


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"


def verdict(result: Mapping[str, Any], level: float = 0.05) -> str:
    """Say in words which candidates differ from ``against``."""
    differences = {entry["name"]: entry["difference"] for entry in result["candidates"] if entry["difference"]}
    if not differences:
        return ""
    by_rows = [name for name, each in differences.items() if each["p_bootstrap_holm"] < level]
    clear = [name for name in by_rows if differences[name]["p_corrected_t_holm"] < level]
    rows_only = [name for name in by_rows if name not in clear]
    alike = [name for name in differences if name not in by_rows]
    against = result["against"]
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
    fits = result["folds"] * result["repeats"]
    if fits < _FEW_FITS:
        sentences.append(
            f"({fits} fits per candidate say little about how much fits vary: more --repeats make differences clearer.)"
        )
    return " ".join(sentences)


def focus_table(result: Mapping[str, Any]) -> ScoreTable:
    """One column per candidate: F1 and recall of the focus class, and which classes its rows are taken for."""
    focus, classes, candidates = result["focus_class"], result["classes"], result["candidates"]
    scores = [candidate["per_class"][focus] for candidate in candidates]
    counts = [candidate["confusion"][classes.index(focus)] for candidate in candidates]
    rows = [
        ("F1", *(with_interval(each["f1"], each["f1_ci"]) for each in scores)),
        ("recall", *(with_interval(each["recall"], each["recall_ci"]) for each in scores)),
    ]
    for number, name in enumerate(classes):
        shares = (f"{row[number] / max(sum(row), 1):.0%} ({row[number]:.0f})" for row in counts)
        rows.append((f"called {name}", *shares))
    title = f"rows of class {focus}: scores, and what they are called"
    return ScoreTable(("", *(candidate["name"] for candidate in candidates)), rows, title)


def single_split_tables(result: Mapping[str, Any], what: str) -> list[ScoreTable]:
    """Return the published report's table of fusions (``what`` compare) or of modalities (``ablate``)."""
    sizes = ", ".join(f"{count:,} {name}" for name, count in result["rows"].items())
    scored = [candidate[part] for candidate in result["candidates"] for part in ("val", "test")]
    copies = ", copies drawn together" if any(scores["n_groups"] < scores["n"] for scores in scored) else ""
    title = f"one split: {sizes} rows; 95 % intervals{copies}"
    focus, classes = result["focus_class"], result["classes"]
    rows = []
    for candidate in result["candidates"]:
        val, test = candidate["val"], candidate["test"]
        of_focus = test["per_class"][focus]
        f1_of_focus = "no row" if of_focus["f1"] is None else with_interval(of_focus["f1"], of_focus["f1_ci"])
        test_f1 = with_interval(test["macro_f1"], test["macro_f1_ci"])
        if what == "compare":
            val_f1 = with_interval(val["macro_f1"], val["macro_f1_ci"])
            cells = [val_f1, test_f1, f"{candidate['gap']:+.3f}", f1_of_focus, f"{candidate['parameters']:,}"]
        else:
            accuracy = with_interval(test["accuracy"], test["accuracy_ci"])
            called = map(str, test["confusion"][classes.index(focus)])
            cells = [accuracy, test_f1, f1_of_focus, f"{of_focus['recall']:.2f}", *called]
        rows.append((candidate["name"], *cells))
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
