"""``FusionClassifier`` as scikit-learn wants it."""

import numpy as np
import pytest
from mmcli.heads import FUSIONS, FusionClassifier, Recipe, Rows, fit, predict_logits
from sklearn.base import clone
from sklearn.datasets import make_classification
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks

QUICK = {"epochs": 10, "hidden": (16,), "dropout": 0.1, "lr": 1e-2, "random_state": 0}


_ODD = "the check has an odd number of columns, which cannot be halved"
_CHECKS_WITH_ODD_COLUMNS = (
    "check_dict_unchanged",
    "check_dont_overwrite_parameters",
    "check_estimators_dtypes",
    "check_estimators_nan_inf",
    "check_estimators_pickle",
    "check_f_contiguous_array_estimator",
    "check_fit2d_predict1d",
    "check_fit_score_takes_y",
    "check_methods_sample_order_invariance",
    "check_methods_subset_invariance",
    "check_pipeline_consistency",
    "check_supervised_y_2d",
)
_BLOBS = "the check needs both of its two columns to separate three blobs, and "


def expected_failed_checks(estimator):
    """Return the checks that an estimator cannot pass because of its settings, each with its reason."""
    halves_are_equal = estimator.modality == "both" and FUSIONS[estimator.fusion].equal_halves
    impossible = {}
    if estimator.image_columns is None or halves_are_equal:
        impossible = dict.fromkeys(_CHECKS_WITH_ODD_COLUMNS, _ODD)
    if estimator.modality != "both":
        impossible["check_classifiers_train"] = _BLOBS + "a single modality sees one of them"
    elif estimator.fusion == "gated":
        impossible["check_classifiers_train"] = _BLOBS + "a scalar gate leaves a single mixture of them"
    return impossible


def data(n=200, columns=8, seed=0):
    X, y = make_classification(
        n, columns, n_informative=columns, n_redundant=0, n_classes=3, n_clusters_per_class=1, random_state=seed
    )
    return X, np.array(["negative", "neutral", "positive"])[y]


@parametrize_with_checks(
    [
        FusionClassifier(),
        FusionClassifier(image_columns=1),
        FusionClassifier(head="linear", image_columns=1),
        FusionClassifier(fusion="film", image_columns=1),
        FusionClassifier(fusion="late", image_columns=1),
        FusionClassifier(fusion="gated"),
        FusionClassifier(fusion="product"),
        FusionClassifier(modality="text"),
    ],
    expected_failed_checks=expected_failed_checks,
)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.parametrize("settings", [{}, {"fusion": "gated"}, {"fusion": "product"}, {"modality": "image"}])
def test_the_list_of_impossible_checks_is_exact(settings):
    estimator = FusionClassifier(**settings)
    failed = {each["check_name"] for each in check_estimator(estimator, on_fail=None) if each["status"] == "failed"}
    listed = expected_failed_checks(estimator)
    assert failed == set(listed)
    assert all(len(reason) > 20 for reason in listed.values())


@pytest.mark.parametrize("settings", [{}, {"head": "linear"}, {"fusion": "film"}, {"fusion": "late"}])
def test_other_fusions_have_none_where_it_is_said_which_columns_are_the_image(settings):
    assert expected_failed_checks(FusionClassifier(**settings, image_columns=1)) == {}


@pytest.mark.parametrize("fusion", ["concat", "gated", "film", "product", "late"])
def test_it_learns(fusion):
    X, y = data(400)
    assert FusionClassifier(fusion=fusion, **QUICK).fit(X[:300], y[:300]).score(X[300:], y[300:]) > 0.6


def test_clone_grid_search_cross_validation_and_pipelines():
    X, y = data()
    estimator = FusionClassifier(**QUICK)
    assert clone(estimator).get_params() == estimator.get_params()
    assert cross_val_score(make_pipeline(StandardScaler(), estimator), X, y, cv=3).mean() > 0.5
    search = GridSearchCV(estimator, {"fusion": ["concat", "late"], "lr": [1e-2, 1e-5]}, cv=2).fit(X, y)
    assert search.best_params_["lr"] == 1e-2


def test_the_halves_are_image_and_text():
    X, y = data()
    for modality, ignored in (("image", slice(4, 8)), ("text", slice(0, 4))):
        fitted = FusionClassifier(modality=modality, **QUICK).fit(X, y)
        noisy = X.copy()
        noisy[:, ignored] = 99.0
        assert np.array_equal(fitted.predict_proba(X), fitted.predict_proba(noisy))
        noisy = X.copy()
        noisy[:, [column for column in range(8) if column not in range(8)[ignored]]] = 99.0
        assert not np.array_equal(fitted.predict_proba(X), fitted.predict_proba(noisy))


@pytest.mark.parametrize(("modality", "seen"), [("image", slice(0, 5)), ("text", slice(5, 8))])
def test_image_columns_says_where_the_image_ends(modality, seen):
    X, y = data()
    alone = FusionClassifier(modality=modality, image_columns=5, **QUICK).fit(X, y)
    elsewhere = X.copy()
    elsewhere[:, [column for column in range(8) if column not in range(8)[seen]]] = 99.0
    assert np.array_equal(alone.predict_proba(X), alone.predict_proba(elsewhere))
    for column in range(8)[seen]:
        changed = X.copy()
        changed[:, column] += 5.0
        assert not np.array_equal(alone.predict_proba(X), alone.predict_proba(changed))


def test_probabilities_sum_to_one_in_float64():
    X, y = data()
    sums = FusionClassifier(**QUICK).fit(X, y).predict_proba(X).sum(axis=1)
    assert np.abs(sums - 1).max() < 1e-12


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 2.0**-27, 1e8, 1e25])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_scale_of_a_column_means_nothing(scale, head):
    X, y = data()
    settings = {**QUICK, "head": head}
    plain = FusionClassifier(**settings).fit(X, y).predict_proba(X)
    scaled = FusionClassifier(**settings).fit(X * scale, y).predict_proba(X * scale)
    assert np.allclose(scaled, plain, atol=0.02)
    if scale == 2.0**-27:  # a power of two changes no digit
        assert np.array_equal(scaled, plain)


def test_values_that_float32_cannot_hold_are_refused():
    X, y = data(60)
    with pytest.raises(ValueError, match="beyond what float32 can hold"):
        FusionClassifier(**QUICK).fit(X * 1e300, y)


@pytest.mark.filterwarnings("error")
def test_an_empty_half_warns_of_nothing():
    X, y = data()
    fitted = FusionClassifier(modality="image", image_columns=8, **QUICK).fit(X, y)
    assert fitted.score(X, y) > 0.6


def test_it_is_the_head_that_train_head_trains():
    from mmcli.cache import Features
    from sklearn.model_selection import train_test_split
    from sklearn.utils import check_random_state

    X, y = data()
    fitted = FusionClassifier(normalize=True, **QUICK).fit(X, y)
    random = check_random_state(0)
    classes = np.unique(y, return_inverse=True)[1]
    train, stop = train_test_split(np.arange(len(y)), test_size=0.1, stratify=classes, random_state=random)
    rows = Rows(Features(X[:, :4].astype(np.float32), X[:, 4:].astype(np.float32)), classes)
    settings = {name: value for name, value in QUICK.items() if name != "random_state"}
    recipe = Recipe(**settings, seed=int(random.randint(2**31)))
    head = fit(recipe, 3, rows.take(train), rows.take(stop)).head
    assert np.allclose(fitted.decision_function(X), predict_logits(head, rows.features), atol=1e-4)


def test_decision_offsets_and_the_linear_head():
    X, y = data(600)
    X = X + 3 * np.random.default_rng(0).standard_normal(X.shape)
    rare = np.concatenate([np.flatnonzero(y != "neutral"), np.flatnonzero(y == "neutral")[:40]])
    fitted = FusionClassifier(offsets=True, class_weights="none", **QUICK).fit(X[rare], y[rare])
    assert fitted.offsets_.any()
    probs = fitted.predict_proba(X)
    assert np.allclose(probs.sum(axis=1), 1)
    assert (fitted.predict(X) == fitted.classes_[probs.argmax(axis=1)]).all()


@pytest.mark.parametrize(
    ("settings", "columns", "words"),
    [
        ({}, 7, r"7 feature\(s\) cannot be halved: give the number of image columns"),
        (
            {"fusion": "late", "normalize": True},
            7,
            r"7 feature\(s\) cannot be halved: give the number of image columns",
        ),
        ({"image_columns": 8}, 8, r"image_columns must be a whole number from 1 to 7 .* 8 feature\(s\), found 8"),
        ({"image_columns": -1}, 8, "image_columns must be a whole number from 1 to 7"),
        ({"image_columns": 2.5}, 8, "image_columns must be a whole number from 1 to 7"),
        ({"image_columns": 8, "modality": "text"}, 8, "image_columns must be a whole number from 0 to 7"),
        ({"fusion": "gated", "image_columns": 3}, 8, r"combines image and text elementwise.*found 3 image columns"),
        ({"fusion": "cross_attn"}, 8, "needs token states, which X does not hold"),
        ({"fusion": "magic"}, 8, "unknown fusion 'magic'"),
        ({"modality": "smell"}, 8, "unknown modality 'smell'"),
        ({"lr": -1.0}, 8, "lr must be above 0"),
        ({"validation_fraction": 1.5}, 8, "validation_fraction must be in"),
        ({"fusion": "late"}, 1, r"1 feature\(s\) cannot be halved"),
        ({"image_columns": 1}, 1, r"found 1|1 feature"),
    ],
)
def test_what_cannot_be_is_a_value_error(settings, columns, words):
    X, y = data(60)
    with pytest.raises(ValueError, match=words):
        FusionClassifier(**settings).fit(np.tile(X, 2)[:, :columns], y)


def test_a_linear_head_holds_nothing_out(monkeypatch):
    from mmcli.heads import estimator

    sizes = []
    original = estimator.fit
    monkeypatch.setattr(
        estimator,
        "fit",
        lambda recipe, n, train, *rest, **more: (sizes.append(len(train)), original(recipe, n, train, *rest, **more))[
            1
        ],
    )
    X, y = data()
    FusionClassifier(head="linear").fit(X, y)
    FusionClassifier(**QUICK).fit(X, y)
    assert sizes == [200, 180]
    with pytest.raises(ValueError, match=r"offsets are fitted on a held-out share of 0\.1 of the rows"):
        FusionClassifier(offsets=True).fit(X[:20], y[:20])


def test_predicting_leaves_the_estimator_as_it_was():
    import pickle

    X, y = data()
    fitted = FusionClassifier(**QUICK).fit(X, y)
    before = pickle.dumps(fitted)
    fitted.predict_proba(X)
    assert pickle.dumps(fitted) == before
