"""The result folder of an experiment: tables, out-of-fold probabilities, a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import write_json, write_text
from ...cache.labels import table_text
from ..folders import new_folder
from ..folds import Fold, folds_of
from ..metrics import softmax
from .fits import Data


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
    from ...report import figures  # here, because workers that only fit must not wait for matplotlib

    with new_folder(out, what) as (draft, folder):
        result = {"folder": str(folder.absolute()), **result}
        write_json(draft / "results.json", result)
        header, rows = results_table(result)
        write_text(draft / "results.csv", table_text(header, rows))
        write_text(draft / "out_of_fold.csv", _out_of_fold_text(data, logits, folds))
        figures.differences(result["candidates"], result["against"], draft / "results.png")
    return result


def results_table(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of ``results.csv``, one row per candidate."""
    classes = result["classes"]
    header = ["candidate", "macro_f1", "macro_f1_low", "macro_f1_high", "accuracy", "accuracy_low", "accuracy_high"]
    for name in classes:
        header += [f"f1_{name}", f"f1_{name}_low", f"f1_{name}_high"]
    p_values = ["p_bootstrap", "p_bootstrap_holm", "p_corrected_t", "p_corrected_t_holm"]
    header += [
        "against",
        "difference",
        "difference_low",
        "difference_high",
        *p_values,
        "parameters",
        "fit_seconds",
    ]
    rows = []
    for entry in result["candidates"]:
        numbers = [entry["macro_f1"], *entry["macro_f1_ci"], entry["accuracy"], *entry["accuracy_ci"]]
        for name in classes:
            numbers += [entry["per_class"][name]["f1"], *entry["per_class"][name]["f1_ci"]]
        found = entry["difference"]
        if found is None:
            compared = [""] * 8
        else:
            values = [found[name] for name in ("macro_f1", "low", "high", *p_values)]
            compared = [result["against"], *(f"{value:.6f}" for value in values)]
        fitted = [str(entry["parameters"]), f"{entry['fit_seconds']:.3f}"]
        rows.append([entry["name"], *(f"{value:.6f}" for value in numbers), *compared, *fitted])
    return header, rows


def _out_of_fold_text(data: Data, logits: dict[str, NDArray[np.float32]], folds: Sequence[Fold]) -> str:
    fold_of = folds_of(folds, len(data.guids))
    tags = [data.classes[number] for number in data.rows.classes]

    def rows() -> Any:
        for name, each in logits.items():
            for repeat, of_repeat in enumerate(each):
                listed = zip(data.guids, tags, fold_of[repeat].tolist(), softmax(of_repeat).tolist(), strict=True)
                for guid, tag, fold, probs in listed:
                    yield [name, str(repeat), str(fold), guid, tag, *(f"{value:.6f}" for value in probs)]

    return table_text(["candidate", "repeat", "fold", "guid", "tag", *data.classes], rows())
