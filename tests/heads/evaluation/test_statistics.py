"""Statistics against scipy, scikit-learn and naive loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmcli.heads.evaluation.statistics import (
    FitSpread,
    bootstrap_p,
    corrected_t,
    fit_spread,
    holm,
    influence,
    paired_bootstrap,
    tail_p,
    with_fits,
)
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, recall_score


def predictions(n=160, candidates=2, repeats=2, seed=0):
    random = np.random.default_rng(seed)
    true = random.choice(3, n, p=[0.3, 0.2, 0.5])
    said = np.where(
        random.random((candidates, repeats, n)) < 0.6, true, random.integers(0, 3, (candidates, repeats, n))
    )
    return true, said


def test_the_paired_bootstrap_equals_drawing_rows_and_scoring_with_scikit_learn():
    true, said = predictions()
    random = np.random.default_rng(1)
    naive = []
    for _ in range(1200):
        rows = random.integers(0, len(true), len(true))
        naive.append(
            [
                np.mean([f1_score(true[rows], one[rows], average="macro", labels=range(3)) for one in of_one])
                for of_one in said
            ]
        )
    naive = np.array(naive)
    ours = paired_bootstrap(true, said, 3, seed=0, replicates=20_000).macro_f1
    for number in range(2):
        assert ours[:, number].mean() == pytest.approx(naive[:, number].mean(), abs=0.006)
        assert ours[:, number].std() == pytest.approx(naive[:, number].std(), rel=0.1)
    # Paired: both candidates saw the same rows, so the difference spreads as the naive one does.
    assert (ours[:, 0] - ours[:, 1]).std() == pytest.approx((naive[:, 0] - naive[:, 1]).std(), rel=0.1)
    assert np.corrcoef(ours.T)[0, 1] == pytest.approx(np.corrcoef(naive.T)[0, 1], abs=0.1)


def test_the_paired_bootstrap_draws_groups_of_copies():
    true, said = (np.repeat(each, 4, axis=-1) for each in predictions(60))
    said[:, :, ::7] = 0  # copies are not always given the same class
    groups = np.repeat(np.random.default_rng(2).permutation(60), 4)
    random = np.random.default_rng(1)
    naive = []
    for _ in range(500):
        rows = np.concatenate([np.flatnonzero(groups == group) for group in random.integers(0, 60, 60)])
        naive.append(
            [
                np.mean([f1_score(true[rows], one[rows], average="macro", labels=range(3)) for one in of_one])
                for of_one in said
            ]
        )
    naive = np.array(naive)
    ours = paired_bootstrap(true, said, 3, seed=0, groups=groups).macro_f1
    for number in range(2):
        assert ours[:, number].mean() == pytest.approx(naive[:, number].mean(), abs=0.01)
        assert ours[:, number].std() == pytest.approx(naive[:, number].std(), rel=0.1)
    assert (ours[:, 0] - ours[:, 1]).std() == pytest.approx((naive[:, 0] - naive[:, 1]).std(), rel=0.1)


def test_all_scores_of_the_paired_bootstrap_are_centred_on_those_of_scikit_learn():
    true, said = predictions(400, candidates=1, repeats=1)
    drawn = paired_bootstrap(true, said, 3, seed=0)
    one = said[0, 0]
    assert drawn.accuracy.mean() == pytest.approx(accuracy_score(true, one), abs=0.003)
    assert np.allclose(drawn.f1[:, 0].mean(axis=0), f1_score(true, one, average=None), atol=0.01)
    assert np.allclose(drawn.recall[:, 0].mean(axis=0), recall_score(true, one, average=None), atol=0.01)


def test_the_bootstrap_in_several_blocks_is_as_good(monkeypatch):
    true, said = predictions()
    whole = paired_bootstrap(true, said, 3, seed=0, replicates=4000).macro_f1
    monkeypatch.setattr("mmcli.heads.evaluation.statistics._CELLS_AT_ONCE", 1000)
    blocks = paired_bootstrap(true, said, 3, seed=0, replicates=4000).macro_f1
    assert blocks.shape == whole.shape
    assert blocks.std() == pytest.approx(whole.std(), rel=0.05)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_equals_the_rule_step_by_step(p_values):
    adjusted = holm(np.array(p_values))
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = set()
        for step, index in enumerate(np.argsort(p_values, kind="stable")):  # Holm 1979: stop at the first that fails
            if not p_values[index] * (len(p_values) - step) <= level:
                break
            rejected.add(int(index))
        assert rejected == set(np.flatnonzero(adjusted <= level).tolist())


def test_the_corrected_t_without_overlap_is_that_of_scipy():
    random = np.random.default_rng(0)
    one, other = random.standard_normal((2, 10))
    t, p = corrected_t(one - other, test_share=0.0)
    theirs = stats.ttest_rel(one, other)
    assert (t, p) == pytest.approx((theirs.statistic, theirs.pvalue))


def test_the_corrected_t_by_hand():
    differences = np.array([0.02, 0.01, 0.03, -0.01, 0.02])
    t, p = corrected_t(differences, test_share=0.25)
    expected = differences.mean() / np.sqrt((1 / 5 + 0.25) * differences.var(ddof=1))
    assert t == pytest.approx(expected)
    assert p == pytest.approx(2 * (1 - stats.t.cdf(expected, 4)))
    assert corrected_t(np.zeros(5), 0.25) == (0.0, 1.0)
    assert corrected_t(np.full(5, 0.1), 0.25) == (np.inf, 0.0)


def test_the_p_of_a_bootstrap_is_twice_the_smaller_tail():
    normal = np.random.default_rng(0).standard_normal(200_000)
    assert bootstrap_p(normal + 1.0) == pytest.approx(2 * stats.norm.sf(1.0), rel=0.02)
    assert bootstrap_p(normal - 1.0) == pytest.approx(2 * stats.norm.sf(1.0), rel=0.02)
    assert bootstrap_p(np.ones(999)) == pytest.approx(0.002)
    assert bootstrap_p(np.zeros(99)) == 1.0


def test_the_influence_is_the_derivative_of_macro_f1():
    true, said = predictions(60)
    predicted = said[0, 0]
    found = influence(true, predicted, 3)
    step = 1e-6
    for row in range(60):
        weights = np.ones(60)
        weights[row] += step
        plain, moved = (
            f1_score(true, predicted, average="macro", sample_weight=each) for each in (np.ones(60), weights)
        )
        assert found[row] == pytest.approx(60 * (moved - plain) / step, abs=1e-3)
    assert found.mean() == pytest.approx(0, abs=1e-12)


def rows_with_fits(random, n=500, folds=5, repeats=2, of_fits=0.1, copies=1):
    """Rows of variance 1 about their fit, alike in part over repeats, and fits of deviation ``of_fits`` about 0."""
    n_groups = n // copies
    fold_of = np.stack([random.permutation(np.arange(n_groups) % folds) for _ in range(repeats)])
    effects = of_fits * random.standard_normal((repeats, folds))
    own = np.sqrt(0.3) * random.standard_normal((repeats, n_groups)) + np.sqrt(0.7) * random.standard_normal(n_groups)
    values = own + np.take_along_axis(effects, fold_of, axis=1)
    groups = np.repeat(np.arange(n_groups), copies)
    return values[:, groups], fold_of[:, groups], groups


@pytest.mark.parametrize("copies", [1, 5])
def test_the_spread_of_fits_is_found(copies):
    random = np.random.default_rng(0)
    found = []
    for _ in range(400):
        values, fold_of, groups = rows_with_fits(random, of_fits=0.3, copies=copies)
        spread = fit_spread(values - values.mean(axis=1, keepdims=True), fold_of, groups)
        found.append((spread.between - spread.within, spread.within))
        assert spread.freedom == 8
    assert np.mean(found, axis=0) == pytest.approx([0.3**2 / 10, copies / 1000], rel=0.1)


def rejections(folds, repeats, of_fits, copies=1, simulations=500):
    """How often no difference is found different at 5 %: with fits and copies allowed for, and by rows alone."""
    random = np.random.default_rng(1)
    allowed = naive = 0
    for number in range(simulations):
        values, fold_of, groups = rows_with_fits(random, 400, folds, repeats, of_fits, copies)
        of_groups = values.mean(axis=0)[::copies]
        deviation = of_groups.std() / np.sqrt(len(of_groups))
        over_rows = values.mean() + deviation * random.standard_normal(2000)
        spread = fit_spread(values - values.mean(axis=1, keepdims=True), fold_of, groups)
        allowed += bootstrap_p(with_fits(over_rows, spread, seed=number)) < 0.05
        naive += bootstrap_p(over_rows) < 0.05
    return allowed / simulations, naive / simulations


@pytest.mark.parametrize(
    ("folds", "repeats", "of_fits"),
    [(5, 2, 0.0), (5, 2, 0.1), (5, 2, 0.4), (2, 1, 0.2), (3, 1, 0.2), (5, 1, 0.2)],
)
def test_no_difference_is_called_one_at_most_as_often_as_it_says_with_few_folds_too(folds, repeats, of_fits):
    """The null: two copies of one head. With few folds, how much fits vary is hardly known, and p says so."""
    allowed, naive = rejections(folds, repeats, of_fits)
    assert 0.01 < allowed < 0.065
    if of_fits == 0.4:
        assert naive > 0.3


@pytest.mark.parametrize("of_fits", [0.0, 0.2])
def test_no_difference_is_called_one_at_most_as_often_as_it_says_with_copies_too(of_fits):
    allowed, _ = rejections(5, 2, of_fits, copies=5)
    assert 0.02 < allowed < 0.07


def test_the_tail_far_out_is_that_of_students_t():
    drawn = 3.0 + np.random.default_rng(0).standard_normal(100_000)
    drawn = 3.0 + (drawn - drawn.mean()) / drawn.std()
    for difference in (3.0, 6.0, 9.0):
        moved = drawn + difference - 3.0
        rows_only = tail_p(moved, FitSpread(0.0, 1.0, 8), 1000)
        assert rows_only == pytest.approx(2 * stats.t.sf(difference, 999), rel=1e-3)
        fits_only = tail_p(1e-6 * drawn + difference, FitSpread(1.0, 0.0, 8), 10**6)
        assert fits_only == pytest.approx(2 * stats.t.sf(difference, 8), rel=5e-3)
    assert tail_p(drawn + 100, FitSpread(0.0, 1.0, 8), 12) == 2.0**-11  # all twelve favour one side
    assert tail_p(np.ones(99), FitSpread(0.0, 0.0, 8), 4) == 2.0**-3
    assert tail_p(np.zeros(99), FitSpread(0.0, 0.0, 8), 0) == 1


@pytest.mark.parametrize("freedom", [1, 4, 8])
def test_the_tail_agrees_with_replicates_where_these_can_be_counted(freedom):
    over_rows = 2.5 + np.random.default_rng(0).standard_normal(1_000_000)
    spread = FitSpread(0.8, 0.5, freedom)
    counted = bootstrap_p(with_fits(over_rows, spread, seed=3))
    assert tail_p(over_rows, spread, 10**6) == pytest.approx(counted, rel=0.05)


def test_a_p_is_counted_where_replicates_are_there_and_computed_beyond():
    normal = np.random.default_rng(0).standard_normal(10_000)
    assert bootstrap_p(normal + 1.0, 0.5) == bootstrap_p(normal + 1.0) != 0.5
    assert bootstrap_p(normal + 9.0, 1e-9) == 1e-9


def test_a_replicate_without_a_class_bends_neither_its_f1_nor_its_recall():
    true = np.array([0] * 30 + [1] * 2)
    drawn = paired_bootstrap(true, true[None, None], 2, seed=0)
    assert np.nanmin(drawn.recall) == np.nanmin(drawn.f1) == 1
    assert np.isnan(drawn.recall[:, 0, 1]).any()
