"""Results as tables for the terminal, from plain data."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def with_interval(value: float, bounds: Sequence[float]) -> str:
    """Format a score with its 95 % interval: ``0.595 [0.535, 0.653]``."""
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"


def pairs_table(rows: Mapping[str, object]) -> Table:
    """Two columns, name and value, without lines."""
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def scores_table(parts: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> Table:
    """One row per part (train, val, test): macro-F1 and accuracy with intervals, F1 of each class."""
    table = Table(title="scores with 95 % bootstrap intervals", title_justify="left")
    table.add_column("rows of")
    for name in ("n", "macro-F1", "accuracy", *(f"F1 {name}" for name in classes)):
        table.add_column(name, justify="right")
    for name, scores in parts.items():
        table.add_row(
            name,
            str(scores["n"]),
            with_interval(scores["macro_f1"], scores["macro_f1_ci"]),
            with_interval(scores["accuracy"], scores["accuracy_ci"]),
            *(f"{scores['per_class'][each]['f1']:.3f}" for each in classes),
        )
    return table


def runs_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per run: validation and test macro-F1 with intervals, test accuracy, seconds."""
    table = Table(title="macro-F1 and accuracy with 95 % bootstrap intervals", title_justify="left")
    table.add_column("head sees")
    for name in ("val macro-F1", "test macro-F1", "test accuracy", "parameters", "seconds"):
        table.add_column(name, justify="right")
    for name, run in runs.items():
        table.add_row(
            name,
            with_interval(run["val"]["macro_f1"], run["val"]["macro_f1_ci"]),
            with_interval(run["test"]["macro_f1"], run["test"]["macro_f1_ci"]),
            with_interval(run["test"]["accuracy"], run["test"]["accuracy_ci"]),
            f"{run['parameters']:,}",
            f"{run['seconds']:.1f}",
        )
    return table


def featurize_table(summary: Mapping[str, Any], next_command: str) -> Table:
    """Show what ``featurize`` did, and what to type next."""
    rejects = f"{summary['rejects']:,}"
    rate = f", {summary['pairs_per_second']:.0f} pairs/s" if summary["computed"] else ""
    rows = {
        "rows": f"{summary['rows']:,} ({summary['labelled']:,} labelled, {summary['unlabelled']:,} without a label)",
        "computed now": f"{summary['computed']:,} ({summary['resumed']:,} from an interrupted run, "
        f"{summary['unchanged']:,} unchanged)",
        "rejects": rejects + (f", see {summary['rejects_file']}" if summary["rejects"] else ""),
        "time": f"{summary['seconds']:.1f} s" + rate,
        "file": f"{summary['out']}, {summary['bytes'] / 1e6:.1f} MB",
        "backbone": f"{summary['backbone']}, {summary['dtype']}",
        "fingerprint": summary["fingerprint"][:16],
    }
    if summary["gone"]:
        kept = "dropped" if summary["pruned"] else "kept; --prune drops them"
        rows["gone"] = f"{summary['gone']:,} cached pairs are no longer in the dataset ({kept})"
    return pairs_table(rows | {"next": next_command})


def run_table(result: Mapping[str, Any], next_command: str) -> Table:
    """Show what ``train-head`` did beside the scores, and what to type next."""
    return pairs_table(
        {
            "epochs": f"{result['epochs']}, best {result['best_epoch']}",
            "parameters": f"{result['parameters']:,}",
            "time": f"{result['seconds']:.1f} s",
            "run": result["run"],
            "next": next_command,
        }
    )


def flat(value: Any) -> str:
    """Nested plain data on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {flat(each)}" for key, each in value.items())
    return str(value)
