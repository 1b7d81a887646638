import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmcli.heads.losses import class_weights
from mmcli.heads.metrics import (
    bootstrap_confusions,
    confusion_matrix,
    f1_per_class,
    interval,
    macro_f1,
    score,
)
from sklearn import metrics as witness

ROWS = st.integers(1, 60).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 3), min_size=n, max_size=n) for _ in range(2)])
)


@given(ROWS)
def test_scores_equal_scikit_learn(rows):
    true, predicted = (np.array(row, dtype=np.int64) for row in rows)
    found = score(true, predicted, ["a", "b", "c", "d"])
    known = {"labels": range(4), "zero_division": np.nan}
    assert found["confusion"] == witness.confusion_matrix(true, predicted, labels=range(4)).tolist()
    assert found["macro_f1"] == pytest.approx(witness.f1_score(true, predicted, average="macro", **known))
    assert found["accuracy"] == pytest.approx(witness.accuracy_score(true, predicted))
    theirs = witness.precision_recall_fscore_support(true, predicted, **known)
    for index, ours in enumerate(found["per_class"].values()):
        for name, values in zip(("precision", "recall", "f1", "support"), theirs, strict=True):
            undefined = np.isnan(values[index])
            expected = values[index] if not undefined else None if name == "f1" else 0
            assert ours[name] == (expected if expected is None else pytest.approx(expected))


def test_the_bootstrap_equals_resampling_rows():
    """The multinomial over cells against the naive loop over rows, scored by scikit-learn."""
    random = np.random.default_rng(1)
    true = random.integers(0, 3, 150)
    predicted = np.where(random.random(150) < 0.6, true, random.integers(0, 3, 150))
    naive = []
    for _ in range(1500):
        rows = random.integers(0, 150, 150)
        naive.append(witness.f1_score(true[rows], predicted[rows], average="macro", labels=range(3)))
    ours = macro_f1(bootstrap_confusions(confusion_matrix(true, predicted, 3), 20_000, seed=0))
    assert ours.mean() == pytest.approx(np.mean(naive), abs=0.005)
    assert ours.std() == pytest.approx(np.std(naive), rel=0.1)
    assert interval(ours) == pytest.approx(np.quantile(naive, [0.025, 0.975]), abs=0.01)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random = np.random.default_rng(0)
    cells = np.array([[0.2, 0.05, 0.05], [0.05, 0.15, 0.1], [0.1, 0.1, 0.2]])
    truth = macro_f1(cells * 1e6)
    samples = random.multinomial(400, cells.ravel(), size=300).reshape(-1, 3, 3)
    bounds = [interval(macro_f1(bootstrap_confusions(sample, 500, seed=0))) for sample in samples]
    covered = np.mean([low <= truth <= high for low, high in bounds])
    assert 0.90 <= covered <= 0.99


def test_an_absent_class_does_not_count():
    assert np.array_equal(f1_per_class(np.array([[3, 0], [0, 0]])), [1.0, np.nan], equal_nan=True)
    assert macro_f1(np.array([[3, 0], [0, 0]])) == 1


def test_a_perfect_head_has_no_interval_below_one_though_resamples_miss_a_class():
    classes = np.array([0] * 5 + [1] * 4 + [2])
    assert score(classes, classes, ["a", "b", "c"])["macro_f1_ci"] == [1, 1]


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
