"""Every table on a narrow screen: nothing is cut, nothing is wider than the screen."""

import io
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.heads.evaluation.metrics import ClassScores, Scores
from mmcli.heads.experiments.results import (
    CandidateResult,
    ClassResult,
    Comparison,
    Difference,
    SplitCandidate,
    SplitComparison,
)
from mmcli.heads.experiments.setup import DataSummary, Protocol
from mmcli.heads.runs.labelled import RowReport
from mmcli.heads.runs.run_folder import RunResult, SeedScores
from mmcli.heads.runs.stages import StageDifference, Stages
from mmcli.report.comparison_tables import comparison_tables, focus_table, fusions_table, single_split_tables
from mmcli.report.score_table import ScoreTable
from mmcli.report.stage2_tables import stages_tables
from mmcli.report.tables import pairs_table, runs_table, score_tables, seeds_table
from mmcli.report.terminal import print_parts
from rich.cells import cell_len

CLASSES = {
    "long": [f"a rather long class name, number {number}, with a comma" for number in range(4)],
    "thirty": [f"class {number}" for number in range(30)],
    "chinese": ["中性的情感类别，既不积极也不消极", "积极的", "消极的"],
    "one word": ["Donaudampfschifffahrtsgesellschaftskapitänspatent" * 2, "Rindfleischetikettierung"],
}
CANDIDATES = ["concat", "cross_attn:finetune", "label_smoothing=0.1 lr=0.003 weight_decay=0.05 dropout=0.25", "late"]


def part(classes):
    n = len(classes)
    per_class = dict.fromkeys(classes, ClassScores(0.5, 0.5, 0.5, (0.4, 0.6), 1200, 1100))
    return Scores(3600, 3437, 0.5, (0.4, 0.6), 0.5, (0.4, 0.6), per_class, [list(range(n))] * n)


def data(classes):
    return DataSummary("features.h5", "labels.csv", 3600, 163, classes, [1] * len(classes), RowReport(0), split=None)


def comparison(classes):
    n, per_class = len(classes), dict.fromkeys(classes, ClassResult(0.5, (0.4, 0.6), 0.5, (0.4, 0.6)))
    scores = {"macro_f1": 0.5, "macro_f1_ci": (0.4, 0.6), "accuracy": 0.5, "accuracy_ci": (0.4, 0.6)}
    scores |= {"per_class": per_class, "confusion": [list(range(n))] * n, "fold_macro_f1": [0.5] * 10}
    size = {"parameters": 12345678, "fit_seconds": 12.3, "epochs": 7.5, "difference": Difference(*[0.1] * 8)}
    candidates = [CandidateResult(name, **scores, **size) for name in CANDIDATES]
    protocol = Protocol(folds=5, repeats=2)
    return Comparison("f", "compare", data(classes), classes[0], protocol, CANDIDATES[2], 6, candidates, recipes={})


def one_split(classes):
    candidates = [SplitCandidate(name, part(classes), part(classes), 0.01, 12345678) for name in CANDIDATES]
    rows = {"train": 2880, "val": 354, "test": 366}
    return SplitComparison("folder", data(classes), rows, classes[0], False, candidates)


def stages(classes):
    scores = {name: part(classes) for name in ("train", "val", "test")}
    both, difference = {"stage1": scores, "stage2": scores}, {"test": StageDifference(0.1, -0.1, 0.2)}
    return Stages("stage 2", both, "best.pt", difference, {"text": 1}, 1, ["weight"], {}, 1.0)


def run(classes):
    parts = {name: part(classes) for name in ("val", "test")}
    alone = {name: {"macro_f1": 0.5, "accuracy": 0.5} for name in parts}
    seeds = [SeedScores(seed, epochs=9, best_epoch=7, scores=alone) for seed in (42, 51)]
    about = {"classes": classes, "fusion": "concat", "modality": "both", "head": "mlp", "parameters": 12345678}
    about |= {"best_epoch": 7, "epochs": 9, "scores": parts, "seeds": seeds, "seconds": 12.3, "rows": RowReport(0)}
    return RunResult("run", "run/best.pt", **about, offsets=None, stages=None, full_of=None)


FUSION = {
    "name": "cross_attn",
    "formula": "[σ(a) pool(attn(Q = text, K = V = image)); t; v]",
    "source": "some one 2019",
}
FUSIONS = [FUSION | {"needs_tokens": needs, "parameters": 492932, "parameters_linear": None} for needs in (True, False)]
TABLES = {
    "scores": lambda classes: score_tables({"train": part(classes), "test": part(classes)}, classes),
    "compare": lambda classes: comparison_tables(comparison(classes))[:2],
    "focus": lambda classes: [focus_table(comparison(classes))],
    "single split, compare": lambda classes: single_split_tables(one_split(classes), "compare"),
    "single split, ablate": lambda classes: single_split_tables(one_split(classes), "ablate"),
    "stages": lambda classes: stages_tables(stages(classes), classes),
    "runs": lambda classes: [runs_table({"both": run(classes)})],
    "seeds": lambda classes: [seeds_table(run(classes))],
    "fusions": lambda classes: [fusions_table(FUSIONS, {"image": 512, "text": 512}, len(classes))],
}


def printed(table, columns, monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(columns))
    print_parts(table)
    return stream.getvalue()


def letters(*texts):
    return Counter("".join("".join(texts).split()))


def check_nothing_is_lost(table, text, columns):
    """Count letters: those of the first column as often as there are tables, all others once."""
    assert max(map(cell_len, text.splitlines())) <= columns
    lines = text.splitlines()
    rules = [line for line in lines if line and set(line) == {"─"}]
    first = [table.columns[0], *(row[0] for row in table.rows)]
    others = [*table.columns[1:], *(cell for row in table.rows for cell in row[1:])]
    expected = letters(table.title, *others, *first * len(rules))
    assert letters(*(line for line in lines if line not in rules)) == expected


@pytest.mark.parametrize("columns", [60, 80, 160])
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", TABLES)
def test_no_table_is_cut(monkeypatch, name, classes, columns):
    for table in TABLES[name](CLASSES[classes]):
        text = printed(table, columns, monkeypatch)
        check_nothing_is_lost(table, text, columns)
        intervals = [cell for row in table.rows for cell in row[1:] if "[" in cell and table.text_columns == 1]
        assert sum(text.count(cell) for cell in set(intervals)) == len(intervals)  # each of them on one line


def test_columns_stay_together_while_they_fit(monkeypatch):
    table = ScoreTable(["name", "one", "two"], [["a", "1", "2"]])
    assert printed(table, 20, monkeypatch).splitlines() == ["name  one  two", "──────────────", "a       1    2", ""]
    assert printed(table, 13, monkeypatch).splitlines() == [
        *("name  one", "─────────", "a       1", ""),
        *("name  two", "─────────", "a       2", ""),
    ]


cells = st.text("abc 很好", max_size=40)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 5).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=4)),
    st.integers(30, 100),
)
def test_any_table_keeps_all_its_letters(rows, columns):
    with pytest.MonkeyPatch.context() as monkeypatch:
        table = ScoreTable(rows[0], rows)
        check_nothing_is_lost(table, printed(table, columns, monkeypatch), columns)


@pytest.mark.parametrize("columns", [60, 80])
def test_names_and_values_are_not_cut(monkeypatch, columns):
    rows = {"fingerprint": "0123456789abcdef" * 6, "classes": ", ".join(CLASSES["long"])}
    text = printed(pairs_table(rows), columns, monkeypatch)
    assert max(map(cell_len, text.splitlines())) <= columns
    assert letters(text) == letters(*rows, *rows.values())


def test_a_pipe_is_wide_unless_columns_says_otherwise(cli, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert max(map(len, cli("fusions")[1].splitlines())) > 80
    monkeypatch.setenv("COLUMNS", "60")
    assert max(map(len, cli("fusions")[1].splitlines())) <= 60
