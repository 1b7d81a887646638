"""Tables of experiments, from plain data as it stands in ``results.json``."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .tables import with_interval

_MOST_CLASSES = 8  # columns that a table can still have
_FEW_FITS = 8


def comparison_tables(result: Mapping[str, Any], by_class: bool = True) -> list[Table | str]:
    """Return the scores with differences, F1 by class, and a sentence on which differences are real."""
    entries = result["candidates"]
    protocol = f"{result['folds']} folds x {result['repeats']}, {result['rows']:,} rows"
    groups = result["rows"] - result["copies"]
    copies = f" in {groups:,} groups of copies, kept on one side and drawn together" if result["copies"] else ""
    left_out = ", test rows left out" if result["without_test"] else ""
    table = Table(
        title=f"out of fold, 95 % intervals; {protocol}{copies}{left_out}; differences from {result['against']}",
        title_justify="left",
    )
    table.add_column("")
    names = ["macro-F1", "accuracy", "difference", "p", "p Holm", "p folds", "parameters", "fit s"]
    for name in names:
        table.add_column(name, justify="right")
    for entry in entries:
        found = entry["difference"]
        apart = ["-"] * 4
        if found is not None:
            apart = [f"{found['macro_f1']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"]
            apart += [_p(found[name]) for name in ("p_bootstrap", "p_bootstrap_holm", "p_corrected_t_holm")]
        table.add_row(
            entry["name"],
            with_interval(entry["macro_f1"], entry["macro_f1_ci"]),
            with_interval(entry["accuracy"], entry["accuracy_ci"]),
            *apart,
            f"{entry['parameters']:,}",
            f"{entry['fit_seconds']:.2f}",
        )
    parts: list[Table | str] = [table]
    if by_class and len(result["classes"]) <= _MOST_CLASSES:
        parts.append(_class_table(entries, result["classes"]))
    return [*parts, verdict(result)]


def _class_table(entries: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> Table:
    table = Table()
    table.add_column("F1 of class")
    for name in classes:
        table.add_column(name, justify="right")
    for entry in entries:
        found = [entry["per_class"][name] for name in classes]
        table.add_row(
            entry["name"],
            *("no row" if one["f1"] is None else with_interval(one["f1"], one["f1_ci"]) for one in found),
        )
    return table


def _p(value: float) -> str:
    return "<.001" if value < 0.001 else f"{value:.3f}"


def verdict(result: Mapping[str, Any], level: float = 0.05) -> str:
    """Say in words which candidates differ from the one that they are compared with."""
    found = [(entry["name"], entry["difference"]) for entry in result["candidates"] if entry["difference"]]
    if not found:
        return ""
    clear = [name for name, each in found if each["p_bootstrap_holm"] < level and each["p_corrected_t_holm"] < level]
    rows_only = [name for name, each in found if each["p_bootstrap_holm"] < level and name not in clear]
    alike = [name for name, _ in found if name not in clear and name not in rows_only]
    against = result["against"]
    said = []
    if clear:
        said.append(f"Different from {against} by both tests: {', '.join(clear)}.")
    if rows_only:
        said.append(
            "Different for these fits (p Holm), but not clearly so for other training rows (p folds): "
            f"{', '.join(rows_only)}."
        )
    if alike:
        said.append(f"Not distinguishable from {against}: {', '.join(alike)}.")
    fits = result["folds"] * result["repeats"]
    if fits < _FEW_FITS:
        said.append(
            f"({fits} fits each say little about how much fits vary: with more --repeats, differences get clearer.)"
        )
    return " ".join(said)


def focus_table(result: Mapping[str, Any]) -> Table:
    """One row per candidate: what becomes of the rows of the focus class."""
    focus, classes = result["focus_class"], result["classes"]
    table = Table(title=f"rows of class {focus}: recall, and what they are called", title_justify="left")
    table.add_column("")
    for name in (f"F1 of {focus}", f"recall of {focus}", *classes):
        table.add_column(name, justify="right")
    for entry in result["candidates"]:
        one = entry["per_class"][focus]
        counts = entry["confusion"][classes.index(focus)]
        total = max(sum(counts), 1)
        table.add_row(
            entry["name"],
            with_interval(one["f1"], one["f1_ci"]),
            with_interval(one["recall"], one["recall_ci"]),
            *(f"{count / total:.0%} ({count:.0f})" for count in counts),
        )
    return table


def single_split_tables(result: Mapping[str, Any], what: str) -> list[Table]:
    """Return the published report's table of fusions (``what`` compare) or of modalities (``ablate``)."""
    sizes = ", ".join(f"{count:,} {name}" for name, count in result["rows"].items())
    scored = [entry[part] for entry in result["candidates"] for part in ("val", "test")]
    copies = ", copies drawn together" if any(each["n_groups"] < each["n"] for each in scored) else ""
    focus, classes = result["focus_class"], result["classes"]
    table = Table(title=f"one split: {sizes} rows; 95 % intervals{copies}", title_justify="left")
    table.add_column("")
    fusions = what == "compare"
    names = ["val F1", "test F1", "gap"] if fusions else ["test accuracy", "test F1"]
    names += [f"F1 of {focus}"] if fusions else [f"F1 of {focus}", f"recall of {focus}"]
    names += ["parameters"] if fusions else [f"called {name}" for name in classes]
    for name in names:
        table.add_column(name, justify="right")
    for entry in result["candidates"]:
        val, test = entry["val"], entry["test"]
        one = test["per_class"][focus]
        of_focus = "no row" if one["f1"] is None else with_interval(one["f1"], one["f1_ci"])
        macro = with_interval(test["macro_f1"], test["macro_f1_ci"])
        if fusions:
            scores = [with_interval(val["macro_f1"], val["macro_f1_ci"]), macro, f"{entry['gap']:+.3f}", of_focus]
            table.add_row(entry["name"], *scores, f"{entry['parameters']:,}")
        else:
            accuracy = with_interval(test["accuracy"], test["accuracy_ci"])
            counts = test["confusion"][classes.index(focus)]
            table.add_row(entry["name"], accuracy, macro, of_focus, f"{one['recall']:.2f}", *map(str, counts))
    return [table]


def fusions_table(fusions: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], n_classes: int) -> Table:
    """One row per fusion: formula, source, parameters of the head."""
    numbers = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in sizes.items() if size)
    table = Table(title=f"v image, t text; parameters of the whole head for {numbers}, {n_classes} classes")
    for name in ("fusion", "what the MLP sees", "source"):
        table.add_column(name)
    for name in ("parameters", "with --head linear"):
        table.add_column(name, justify="right")
    for each in fusions:
        needs = "; needs featurize --tokens" if each["needs_tokens"] else ""
        counted = "no tokens here" if each["parameters"] is None else f"{each['parameters']:,}"
        linear = "-" if each["parameters_linear"] is None else f"{each['parameters_linear']:,}"
        table.add_row(each["name"], each["formula"], each["source"] + needs, counted, linear)
    return table
