import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmcli.cache import MmcliError
from mmcli.heads.evaluation.metrics import accuracy, f1_per_class, interval, macro_f1, score, softmax
from mmcli.heads.evaluation.statistics import resampling_units
from mmcli.heads.model.losses import class_weights
from mmcli.heads.runs.labelled import RowReport
from mmcli.heads.runs.scorer import Evaluation
from mmcli.report.notes import note_about_run
from scipy import stats
from sklearn import metrics as witness

ROWS = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(2)])
)


@given(ROWS)
def test_scores_equal_scikit_learn(rows):
    true, predicted = (np.array(row, dtype=np.int64) for row in rows)
    found = score(true, predicted, ["a", "b", "c", "d"])
    known = {"labels": range(4), "zero_division": np.nan}
    assert found.confusion == witness.confusion_matrix(true, predicted, labels=range(4)).tolist()
    with_rows = {"labels": np.unique(true), "zero_division": np.nan}
    assert found.macro_f1 == pytest.approx(witness.f1_score(true, predicted, average="macro", **with_rows))
    assert found.accuracy == pytest.approx(witness.accuracy_score(true, predicted))
    theirs = witness.precision_recall_fscore_support(true, predicted, **known)
    for index, ours in enumerate(found.per_class.values()):
        for name, values in zip(("precision", "recall", "f1", "support"), theirs, strict=True):
            undefined = np.isnan(values[index]) or (name == "f1" and index not in true)
            expected = values[index] if not undefined else None if name == "f1" else 0
            assert getattr(ours, name) == (expected if expected is None else pytest.approx(expected))


def drawn(true, predicted, replicates, groups=None, n_classes=3):
    """Confusion matrices of bootstrap replicates, (replicates, C, C)."""
    units = resampling_units(true * n_classes + predicted, n_classes**2, groups)
    return units.draw(np.random.default_rng(0), replicates).reshape(-1, n_classes, n_classes)


def naive_bootstrap(true, predicted, groups, replicates):
    """Draw groups one by one and score their rows with scikit-learn: macro-F1 and accuracy, (replicates, 2)."""
    random = np.random.default_rng(1)
    rows_of = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    scores = []
    for _ in range(replicates):
        rows = np.concatenate([rows_of[group] for group in random.integers(0, len(rows_of), len(rows_of))])
        macro = witness.f1_score(true[rows], predicted[rows], average="macro", labels=range(3))
        scores.append((macro, witness.accuracy_score(true[rows], predicted[rows])))
    return np.array(scores)


def rows_in_groups(group_sizes, seed=1, copies_differ=0.2):
    """Rows whose copies have one class and, nearly always, one prediction; groups in a random order."""
    random = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(group_sizes)), group_sizes)
    true = random.integers(0, 3, len(group_sizes))[groups]
    predicted = np.where(random.random(len(group_sizes))[groups] < 0.6, true, random.integers(0, 3, len(groups)))
    shared = random.integers(0, 3, len(group_sizes))[groups]
    predicted = np.where((predicted != true) & (random.random(len(groups)) > copies_differ), shared, predicted)
    order = random.permutation(len(groups))
    return true[order], predicted[order], 7 * groups[order]


@pytest.mark.parametrize(
    "group_sizes", [[1] * 150, [5] * 40, [1] * 60 + [2] * 20 + [9] * 8], ids=["no copies", "fives", "mixed"]
)
def test_the_bootstrap_equals_drawing_groups_and_scoring_with_scikit_learn(group_sizes):
    true, predicted, groups = rows_in_groups(group_sizes)
    naive = naive_bootstrap(true, predicted, groups, 1200)
    confusions = drawn(true, predicted, 20_000, groups)
    for number, ours in enumerate((macro_f1(confusions), accuracy(confusions))):
        assert ours.mean() == pytest.approx(naive[:, number].mean(), abs=0.006)
        assert ours.std() == pytest.approx(naive[:, number].std(), rel=0.1)
        assert interval(ours) == pytest.approx(np.quantile(naive[:, number], [0.025, 0.975]), abs=0.02)
    found = score(true, predicted, ["a", "b", "c"], groups)
    assert (found.n, found.n_groups) == (len(true), len(group_sizes))
    assert found.accuracy_ci == pytest.approx(np.quantile(naive[:, 1], [0.025, 0.975]), abs=0.02)
    assert found.macro_f1_ci == pytest.approx(np.quantile(naive[:, 0], [0.025, 0.975]), abs=0.02)
    for number, name in enumerate("abc"):
        assert found.per_class[name].groups == len(set(groups[true == number].tolist()))


def test_without_copies_the_draws_are_one_multinomial_over_the_confusion_matrix():
    true, predicted, groups = rows_in_groups([1] * 150)
    counts = witness.confusion_matrix(true, predicted, labels=range(3))
    expected = np.random.default_rng(0).multinomial(150, counts.ravel() / 150, size=2000).reshape(-1, 3, 3)
    for numbers in (None, groups):
        assert np.array_equal(drawn(true, predicted, 2000, numbers), expected)
        assert score(true, predicted, ["a", "b", "c"], numbers).macro_f1_ci == interval(macro_f1(expected))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=40))
def test_each_replicate_holds_whole_groups_and_as_many_as_there_are(rows):
    kinds, groups = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    units = resampling_units(kinds, 4, groups)
    assert units.counts.sum() == len(set(groups.tolist()))
    contents = np.eye(4, dtype=np.int64)
    if units.contents is not None:
        contents = np.concatenate([contents, units.contents.toarray().T])
    assert (units.counts @ contents).tolist() == np.bincount(kinds, minlength=4).tolist()
    theirs = sorted(tuple(np.bincount(kinds[groups == group], minlength=4)) for group in set(groups.tolist()))
    assert sorted(tuple(each) for each in np.repeat(contents, units.counts, axis=0)) == theirs
    one_by_one = units.draw(np.random.default_rng(0), 5)
    assert one_by_one.shape == (5, 4)


@pytest.mark.parametrize("copies", [1, 5])
def test_an_interval_covers_the_truth_about_as_often_as_it_says_with_copies_too(copies):
    """360 rows; with five copies of each, an interval over rows covered the truth in 665 of 1,000 cases."""
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(360 // copies), copies)
    covered = []
    for _ in range(150):
        right = (random.random(360 // copies) < 0.7)[groups]
        true = random.integers(0, 3, 360 // copies)[groups]
        low, high = score(true, np.where(right, true, (true + 1) % 3), ["a", "b", "c"], groups).accuracy_ci
        covered.append(low <= 0.7 <= high)
    assert 0.90 <= np.mean(covered) <= 0.99


def test_the_interval_of_macro_f1_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    cells = np.array([[0.2, 0.05, 0.05], [0.05, 0.15, 0.1], [0.1, 0.1, 0.2]])
    truth = macro_f1(cells * 1e6)
    covered = []
    for _ in range(300):
        kinds = random.choice(9, 400, p=cells.ravel())
        low, high = interval(macro_f1(drawn(kinds // 3, kinds % 3, 500)))
        covered.append(low <= truth <= high)
    assert 0.90 <= np.mean(covered) <= 0.99


@given(st.lists(st.lists(st.floats(-60, 60, width=32), min_size=3, max_size=3), min_size=1, max_size=20))
def test_probabilities_sum_to_one_as_exactly_as_scikit_learn_asks(logits):
    probs = softmax(np.array(logits, dtype=np.float32))
    assert probs.dtype == np.float64
    assert probs.sum(axis=1) == pytest.approx(1, abs=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        witness.log_loss(np.zeros(len(probs)), probs, labels=[0, 1, 2])


def test_an_absent_class_does_not_count():
    assert np.array_equal(f1_per_class(np.array([[3, 0], [0, 0]])), [1.0, np.nan], equal_nan=True)
    assert macro_f1(np.array([[3, 0], [0, 0]])) == 1


def test_no_row_is_no_score():
    with pytest.raises(MmcliError, match="no row to score"):
        score(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), ["a", "b"])


def test_scores_that_rest_on_too_few_rows_are_said_so(capsys):
    def notes(true, predicted, groups=None):
        scores = score(np.array(true), np.array(predicted), ["a", "b", "c"], groups)
        note_about_run(Evaluation("best.pt", ["a", "b", "c"], "concat", "both", {"test": scores}, RowReport(0)))
        return capsys.readouterr().err

    many = [0] * 20 + [1] * 20
    assert notes([*many, *[2] * 9], [0] * 19 + [1] * 21 + [2] * 9) == ""
    assert "no test row is of class 'c': not in the macro-F1" in notes(many, [2, *many[1:]])
    assert "fewer than 5 test rows of 'c'" in notes([*many, 2, 2], [*many, 2, 0])
    copies = np.array([*range(20), *[20] * 20])
    assert "fewer than 5 test rows (copies counted once) of 'b'" in notes(many, [1, *many[1:]], copies)
    bound = stats.binomtest(40, 40).proportion_ci(0.90, method="exact").low  # one-sided 95 %
    assert f"up to {1 - bound:.1%} of all pairs may still be wrong" in notes(many, many)


def test_a_perfect_head_has_no_interval_below_one_though_resamples_miss_a_class():
    classes = np.array([0] * 5 + [1] * 4 + [2])
    assert score(classes, classes, ["a", "b", "c"]).macro_f1_ci == (1, 1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1, 1, 1]),
        ("inverse", np.array([1 / 100, 1 / 10, 1 / 50]) / np.mean([1 / 100, 1 / 10, 1 / 50])),
        ("sqrt", np.sqrt([1 / 100, 1 / 10, 1 / 50]) / np.mean(np.sqrt([1 / 100, 1 / 10, 1 / 50]))),
    ],
)
def test_class_weights(kind, expected):
    assert class_weights(np.array([100, 10, 50]), kind) == pytest.approx(expected)


def test_effective_weights_are_the_sum_of_a_geometric_series():
    counts = [100, 10, 50]
    numbers = [sum(0.999**power for power in range(count)) for count in counts]  # Cui et al., eq. 2, term by term
    expected = np.array([1 / number for number in numbers])
    assert class_weights(np.array(counts), "effective") == pytest.approx(expected / expected.mean(), rel=1e-5)
