"""Results as tables for the terminal."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from .score_table import ScoreTable

if TYPE_CHECKING:
    from ..heads.evaluation.metrics import ClassScores, Scores
    from ..heads.experiments.results import CandidateResult, ClassResult
    from ..heads.runs.run_folder import RunResult

_COUNTED = ("content", "labels", "without_files", "codecs", "truncated")  # shown in words, not as they are


def shown_path(path: str) -> str:
    """Shorten a path that is below the current folder."""
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def with_interval(value: float, bounds: Sequence[float]) -> str:
    """Format a score with its 95 % interval: ``0.595 [0.535, 0.653]``."""
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def title_of_scores(parts: "Iterable[Scores]") -> str:
    """Return a title for scores; it says whether the intervals draw copies together."""
    copies = any(scores.n_groups < scores.n for scores in parts)
    return "scores with 95 % bootstrap intervals" + (", copies drawn together" if copies else "")


def count_of(scores: "Scores") -> str:
    """Return the number of scored rows and of their groups of copies: ``360 in 72 groups``."""
    return f"{scores.n}" if scores.n == scores.n_groups else f"{scores.n} in {scores.n_groups} groups"


def pairs_table(rows: Mapping[str, object]) -> Table:
    """Two columns, name and value, without lines."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def score_tables(parts: "Mapping[str, Scores]", classes: Sequence[str]) -> tuple[ScoreTable, ScoreTable]:
    """One row per part (train, val, test) with macro-F1 and accuracy; one row per class with its F1 in each part."""
    overall = [
        (
            name,
            count_of(scores),
            with_interval(scores.macro_f1, scores.macro_f1_ci),
            with_interval(scores.accuracy, scores.accuracy_ci),
        )
        for name, scores in parts.items()
    ]
    return (
        ScoreTable(("rows", "n", "macro-F1", "accuracy"), overall, title_of_scores(parts.values())),
        class_table(parts, classes),
    )


def class_table(
    scores: "Mapping[str, Scores | CandidateResult]", classes: Sequence[str], title: str = ""
) -> ScoreTable:
    """One row per class, one column per name in ``scores``: the F1 in its ``per_class``."""
    rows = [(name, *(f1_of_class(of_name.per_class[name]) for of_name in scores.values())) for name in classes]
    return ScoreTable(("F1 of class", *scores), rows, title)


def f1_of_class(scores: "ClassScores | ClassResult") -> str:
    """Format the F1 of a class with its interval."""
    if scores.f1 is None or scores.f1_ci is None:
        return "no row"
    return with_interval(scores.f1, scores.f1_ci)


def counted(guids: Sequence[str], shown: int = 10) -> str:
    """Format guids: their number, then the first few."""
    listed = ", ".join(guids[:shown]) + (f", and {len(guids) - shown} more" if len(guids) > shown else "")
    return f"{len(guids)}: {listed}" if guids else "0"


def runs_table(runs: "Mapping[str, RunResult]") -> ScoreTable:
    """One row per run: validation and test macro-F1 with intervals, test accuracy, seconds."""
    rows = []
    for name, run in runs.items():
        val, test = run.scores["val"], run.scores["test"]
        cells = [with_interval(scores.macro_f1, scores.macro_f1_ci) for scores in (val, test)]
        cells += [with_interval(test.accuracy, test.accuracy_ci), f"{run.parameters:,}", f"{run.seconds:.1f}"]
        rows.append((name, *cells))
    columns = ("head sees", "val macro-F1", "test macro-F1", "test accuracy", "parameters", "seconds")
    return ScoreTable(columns, rows, "macro-F1 and accuracy with 95 % bootstrap intervals")


def featurize_table(summary: Mapping[str, Any], next_command: str) -> Table:
    """Show what ``featurize`` did, what the cache holds, and what to type next."""
    labels = summary["labels"]
    speed = summary["pairs_per_second"]
    rate = f", {speed:.{0 if speed >= 10 else 1}f} pairs/s" if summary["computed"] else ""
    listed = f", see {shown_path(summary['rejects_file'])}" if summary["rejects_file"] else ""
    rows = {
        "rows": f"{summary['rows']:,} ({labels['labelled']:,} labelled, {labels['unlabelled']:,} without a label)",
        "computed now": f"{summary['computed']:,}; from an interrupted run {summary['resumed']:,}, "
        f"unchanged {summary['unchanged']:,}",
        "rejects": f"{summary['rejects']:,}" + (listed if summary["rejects"] else ""),
        **content_rows(summary["content"], labels),
    }
    if summary["unreadable"]:
        rows["kept"] = (
            f"{summary['unreadable']:,} cached pairs cannot be read now; example: {summary['unreadable_example']}"
            + listed
        )
    if summary["gone"]:
        kept = "dropped" if summary["pruned"] else "kept; --prune drops them"
        rows["gone"] = f"{summary['gone']:,} cached pairs are no longer in the dataset ({kept})"
    if summary["labels_missing"]:
        rows["labels missing"] = f"no such file now: {summary['labels_missing']}; give its place with --labels"
    if summary["unused_columns"]:
        rows["not used"] = "columns " + ", ".join(summary["unused_columns"])
    rows |= {
        "time": f"{summary['seconds']:.1f} s" + rate,
        "file": f"{shown_path(summary['out'])}, {summary['bytes'] / 1e6:.1f} MB",
        "backbone": f"{summary['backbone']}, {summary['dtype']}",
        "fingerprint": summary["fingerprint"][:16],
    }
    return pairs_table(rows | {"next": next_command})


def content_rows(content: Mapping[str, Any], labels: Mapping[str, Any]) -> dict[str, str]:
    """Return lines on the texts, repeated pairs and labels of a cache, by their names."""
    codecs = ", ".join(f"{codec} {count:,}" for codec, count in content["codecs"].items())
    rows = {
        "texts": f"{codecs}; {content['empty_texts']:,} empty, {content['truncated_texts']:,} truncated",
        "repeated": f"{content['repeated_pairs']:,} pairs, {content['repeated_images']:,} images, "
        f"{content['repeated_texts']:,} texts repeat an earlier one",
    }
    if labels["file"] is None:
        return rows
    if labels["classes"]:
        rows["classes"] = _counts(labels["classes"])
    if labels["alike_classes"]:
        alike = "; ".join(", ".join(map(repr, names)) for names in labels["alike_classes"])
        rows["alike"] = f"classes that differ only in spelling: {alike}"
    if labels["read_as_unlabelled"]:
        plain = {"": "an empty cell", "guid given twice": "a guid given twice"}
        spelled = {plain.get(name, repr(name)): count for name, count in labels["read_as_unlabelled"].items()}
        rows["no label"] = "read as no label: " + _counts(spelled)
    left = (
        (labels["labels_without_pair"], "labels without a pair", labels["label"]),
        (labels["pairs_without_label"], "pairs that the labels file does not name", labels["pair"]),
    )
    unjoined = [f"{count:,} {what}, such as {example!r}" for count, what, example in left if count]
    if unjoined:
        rows["not joined"] = "; ".join(unjoined)
    if labels["labels_without_pair"] and labels["said"]:
        rows["spelling"] = labels["said"]
    return rows


def _counts(by_name: Mapping[str, int], most: int = 12) -> str:
    """Format counts by name; of many, only the largest."""
    shown = list(by_name.items())
    if len(shown) > most:
        shown = sorted(shown, key=lambda item: -item[1])[:most]
    listed = ", ".join(f"{name} {count:,}" for name, count in shown)
    return listed + (f", and {len(by_name) - most} more" if len(by_name) > most else "")


def run_table(result: "RunResult", next_command: str) -> Table:
    """Show epochs, size, time and folder of a run, and what to type next."""
    seeds = result.seeds
    epochs = f"{seeds[0].epochs}, best {seeds[0].best_epoch}"
    if len(seeds) > 1:
        epochs = " ".join(str(seed.epochs) for seed in seeds)
    rows = {} if result.head == "linear" and result.stages is None else {"epochs": epochs}
    rows |= {"parameters": f"{result.parameters:,}", "time": f"{result.seconds:.1f} s", "run": shown_path(result.run)}
    return pairs_table(rows | {"next": next_command})


def next_after_training(runs: Path | None) -> str:
    """Return what to type after a run is written: into the default folder, or into ``runs``."""
    source = "" if runs is None else f"--from {runs / 'latest' / 'best.pt'} "
    return f"mmcli predict {source}--ids FILE --out submission.txt"


def seeds_table(result: "RunResult") -> ScoreTable:
    """Show scores of single seeds beside those of their ensemble."""
    rows = []
    for part, spreads in result.over_seeds.items():
        cells = []
        for name, spread in spreads.items():
            cells += [f"{spread.mean:.3f} ± {spread.sd:.3f}", f"{getattr(result.scores[part], name):.3f}"]
        rows.append((part, *cells))
    columns = ("rows", "macro-F1, mean ± sd", "macro-F1, ensemble", "accuracy, mean ± sd", "accuracy, ensemble")
    seeds = result.seeds
    return ScoreTable(columns, rows, f"{len(seeds)} seeds, {seeds[0].seed} to {seeds[-1].seed}")


def info_table(result: Mapping[str, Any]) -> Table:
    """Show what ``cache info`` says."""
    rows = {name: flat(value) for name, value in result.items() if name not in _COUNTED}
    without_files = result.get("without_files", {"rows": 0})
    if without_files["rows"]:
        rows["without files"] = (
            f"{without_files['rows']:,} rows whose files are not both there, such as {without_files['example']!r}"
        )
    return pairs_table(rows | content_rows(result["content"], result.get("labels", {"file": None})))


def flat(value: Any) -> str:
    """Nested plain data on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(inner)}" for key, inner in value.items())
    return str(value)


def demo_hints(folder: object) -> list[str]:
    """Say after the demo where things are and what to try next."""
    return [
        f"\nFeatures: {folder}/features.h5; a folder with scores and figures per head: {folder}/runs/",
        "In this sample neither the text nor the picture alone tells every label. On your own pairs, with a folder",
        "DATA of <guid>.jpg and <guid>.txt and a CSV with header guid,tag:\n",
        "  mmcli featurize DATA --labels labels.csv --backbone offline    (or a CLIP folder, or a hub id)",
        "  mmcli train-head --fusion concat",
        "  mmcli evaluate --on test",
        "  mmcli predict --data MORE --out predictions.csv --probs",
    ]
