"""Results of experiments, and their files: tables, out-of-fold probabilities, a figure."""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import atomic_path, write_json, write_text
from ...cache.labels import table_text
from ..evaluation.folds import Fold, folds_of
from ..evaluation.metrics import Scores, softmax
from .setup import Data, DataSummary, Protocol

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ClassResult:
    """F1 and recall of a class out of fold, with 95 % intervals; None for a class that is not scored."""

    f1: float | None
    f1_ci: tuple[float, float] | None
    recall: float | None
    recall_ci: tuple[float, float] | None


@dataclass(frozen=True)
class Difference:
    """Difference in macro-F1 of two candidates, with its 95 % interval and its p values, raw and adjusted by Holm."""

    macro_f1: float
    low: float
    high: float
    p_bootstrap: float
    t_corrected: float
    p_corrected_t: float
    p_bootstrap_holm: float = math.nan
    p_corrected_t_holm: float = math.nan


@dataclass(frozen=True)
class CandidateResult:
    """Scores of a candidate out of fold: means over the repeats, with 95 % intervals.

    Attributes
    ----------
    confusion
        (C, C) mean counts; rows true, columns predicted.
    fold_macro_f1
        Macro-F1 of each fit on its fold.
    parameters, fit_seconds, epochs
        Size of the head, median duration and mean number of epochs of a fit.
    difference
        From the candidate ``against``; None for this candidate itself.
    """

    name: str
    macro_f1: float
    macro_f1_ci: tuple[float, float]
    accuracy: float
    accuracy_ci: tuple[float, float]
    per_class: dict[str, ClassResult]
    confusion: list[list[float]]
    fold_macro_f1: list[float]
    parameters: int
    fit_seconds: float
    epochs: float
    difference: Difference | None = None


@dataclass(frozen=True)
class Comparison:
    """The result of an experiment: candidates scored out of fold, best first.

    Attributes
    ----------
    folder
        The result folder.
    what
        The experiment: ``compare``, ``ablate`` or ``sweep``.
    against, differences_tested
        The candidate from which differences are taken, and how many differences were tested.
    recipes
        By candidate, as plain data.
    best, best_goes_on
        After ``sweep``: changes of the best candidate from the baseline, and whether it has a stage 2.
    """

    folder: str
    what: str
    data: DataSummary
    focus_class: str
    protocol: Protocol
    against: str
    differences_tested: int
    candidates: list[CandidateResult]
    recipes: dict[str, dict[str, Any]]
    best: dict[str, Any] | None = None
    best_goes_on: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data, with the entries of data and protocol on top."""
        apart = ("data", "protocol", "candidates")
        plain = {name: value for name, value in vars(self).items() if value is not None and name not in apart}
        plain |= self.data.to_dict() | asdict(self.protocol)
        return plain | {"candidates": [asdict(candidate) for candidate in self.candidates]}


@dataclass(frozen=True)
class SplitCandidate:
    """Scores of a candidate on the validation and test rows, and validation less test macro-F1."""

    name: str
    val: Scores
    test: Scores
    gap: float
    parameters: int


@dataclass(frozen=True)
class SplitComparison:
    """Candidates trained on one split. ``n_rows`` is by part; ``offsets`` says whether a recipe has them."""

    folder: str
    data: DataSummary
    n_rows: dict[str, int]
    focus_class: str
    offsets: bool
    candidates: list[SplitCandidate]

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data, with the entries of data on top."""
        plain = {"folder": self.folder, "focus_class": self.focus_class, "offsets": self.offsets}
        candidates = [asdict(candidate) for candidate in self.candidates]
        return self.data.to_dict() | plain | {"rows": self.n_rows, "candidates": candidates}


def write_results(
    draft: Path, result: Comparison, data: Data, logits: dict[str, NDArray[np.float32]], folds: Sequence[Fold]
) -> None:
    """Write ``results.json``, ``results.csv``, ``out_of_fold.csv`` and ``results.png`` into ``draft``."""
    from ...report import figures  # imported here, so that workers do not load matplotlib

    write_json(draft / "results.json", result.to_dict())
    write_text(draft / "results.csv", table_text(*results_table(result)))
    write_out_of_fold(draft / "out_of_fold.csv", data, logits, folds)
    scores = {candidate.name: (candidate.macro_f1, *candidate.macro_f1_ci) for candidate in result.candidates}
    changes = {candidate.name: candidate.difference for candidate in result.candidates}
    changes_with_bounds = {
        name: None if change is None else (change.macro_f1, change.low, change.high) for name, change in changes.items()
    }
    figures.differences(scores, changes_with_bounds, result.against, draft / "results.png")


def results_table(result: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of ``results.csv``, one row per candidate."""
    classes = result.data.classes
    header = ["candidate", "macro_f1", "macro_f1_low", "macro_f1_high", "accuracy", "accuracy_low", "accuracy_high"]
    for name in classes:
        header += [f"f1_{name}", f"f1_{name}_low", f"f1_{name}_high"]
    p_values = ["p_bootstrap", "p_bootstrap_holm", "p_corrected_t", "p_corrected_t_holm"]
    header += ["against", "difference", "difference_low", "difference_high", *p_values, "parameters", "fit_seconds"]
    rows = []
    for candidate in result.candidates:
        numbers = [candidate.macro_f1, *candidate.macro_f1_ci, candidate.accuracy, *candidate.accuracy_ci]
        scores = [*numbers, *(n for name in classes for n in _f1_numbers(candidate.per_class[name]))]
        compared = [""] * 8
        if candidate.difference is not None:
            values = [getattr(candidate.difference, name) for name in ("macro_f1", "low", "high", *p_values)]
            compared = [result.against, *(f"{value:.6f}" for value in values)]
        cells = ["" if value is None else f"{value:.6f}" for value in scores]
        rows.append([candidate.name, *cells, *compared, str(candidate.parameters), f"{candidate.fit_seconds:.3f}"])
    return header, rows


def _f1_numbers(scores: ClassResult) -> list[float | None]:
    return [scores.f1, *(scores.f1_ci or (None, None))]


def write_out_of_fold(path: Path, data: Data, logits: dict[str, NDArray[np.float32]], folds: Sequence[Fold]) -> None:
    """Write a CSV with the probabilities of each candidate, repeat and row, from logits (R, n, C) by candidate."""
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
