"""The result folder of an experiment: tables, out-of-fold probabilities, a figure."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import atomic_path, write_json, write_text
from ...cache.labels import table_text
from ..evaluation.folds import Fold, folds_of
from ..evaluation.metrics import softmax
from ..runs.folders import new_folder
from .candidates import Data

_ROWS_AT_ONCE = 4096


def write_results(
    out: Path,
    what: str,
    result: dict[str, Any],
    data: Data,
    logits: dict[str, NDArray[np.float32]],
    folds: Sequence[Fold],
) -> dict[str, Any]:
    """Write ``results.json``, ``results.csv``, ``out_of_fold.csv`` and ``results.png`` into a new folder in ``out``.

    Returns
    -------
    dict
        ``result`` with ``folder``.
    """
    from ...report import figures  # imported here, so that workers do not load matplotlib

    with new_folder(out, what) as (draft, folder):
        result = {"folder": str(folder.absolute()), **result}
        write_json(draft / "results.json", result)
        header, rows = results_table(result)
        write_text(draft / "results.csv", table_text(header, rows))
        write_out_of_fold(draft / "out_of_fold.csv", data, logits, folds)
        figures.differences(result["candidates"], result["against"], draft / "results.png")
    return result


def results_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of ``results.csv``, one row per candidate."""
    classes = result["classes"]
    header = ["candidate", "macro_f1", "macro_f1_low", "macro_f1_high", "accuracy", "accuracy_low", "accuracy_high"]
    for name in classes:
        header += [f"f1_{name}", f"f1_{name}_low", f"f1_{name}_high"]
    p_values = ["p_bootstrap", "p_bootstrap_holm", "p_corrected_t", "p_corrected_t_holm"]
    header += ["against", "difference", "difference_low", "difference_high", *p_values, "parameters", "fit_seconds"]
    rows = []
    for entry in result["candidates"]:
        numbers = [entry["macro_f1"], *entry["macro_f1_ci"], entry["accuracy"], *entry["accuracy_ci"]]
        for name in classes:
            numbers += [entry["per_class"][name]["f1"], *(entry["per_class"][name]["f1_ci"] or [None, None])]
        difference = entry["difference"]
        if difference is None:
            compared = [""] * 8
        else:
            values = [difference[name] for name in ("macro_f1", "low", "high", *p_values)]
            compared = [result["against"], *(f"{value:.6f}" for value in values)]
        fitted = [str(entry["parameters"]), f"{entry['fit_seconds']:.3f}"]
        rows.append(
            [entry["name"], *("" if value is None else f"{value:.6f}" for value in numbers), *compared, *fitted]
        )
    return header, rows


def write_out_of_fold(path: Path, data: Data, logits: dict[str, NDArray[np.float32]], folds: Sequence[Fold]) -> None:
    """Write a CSV with the probabilities of each candidate, repeat and row, a few thousand rows at a time.

    Parameters
    ----------
    logits
        (R, n, C) by candidate.
    """
    fold_of = folds_of(folds, len(data.guids))
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["candidate", "repeat", "fold", "guid", "tag", *data.classes])
        for name, repeats in logits.items():
            for repeat, repeat_logits in enumerate(repeats):
                for start in range(0, len(repeat_logits), _ROWS_AT_ONCE):
                    rows = slice(start, start + _ROWS_AT_ONCE)
                    columns = zip(
                        data.guids[rows],
                        data.rows.classes[rows].tolist(),
                        fold_of[repeat, rows].tolist(),
                        softmax(repeat_logits[rows]).tolist(),
                        strict=True,
                    )
                    writer.writerows(
                        [name, repeat, fold, guid, data.classes[number], *(f"{prob:.6f}" for prob in probs)]
                        for guid, number, fold, probs in columns
                    )
