from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from mmcli.cache import FeatureCache, Features, MmcliError
from mmcli.heads import Ensemble, Head, Recipe, Rows, fit, predict_logits
from mmcli.heads.model.head import sizes_of
from mmcli.heads.model.inputs import Batch, Standardise
from mmcli.heads.recipe import Modality
from mmcli.heads.training import training_rows
from mmcli.heads.training.loop import FitOptions
from scipy.stats import chi2_contingency
from sklearn.preprocessing import StandardScaler
from small_finetune import Ready


def rows(n=120, dim=8, seed=0):
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, n)
    image, text = (random.standard_normal((n, dim)).astype(np.float32) for _ in range(2))
    image[:, 0] += 2.5 * classes
    text[:, 0] -= 2.5 * classes
    return Rows(Features(image, text), classes.astype(np.int64))


def changed(each, **arrays):
    return Rows(replace(each.features, **arrays), each.classes)


QUICK = Recipe(epochs=15, patience=15, hidden=(16,), dropout=0.1, lr=1e-2)


@pytest.mark.parametrize("modality", get_args(Modality))
def test_a_head_learns(modality):
    trained = fit(replace(QUICK, modality=modality), 3, rows(400, seed=0), rows(seed=1))
    held_out = rows(300, seed=2)
    predicted = predict_logits(trained.head, held_out.features).argmax(axis=1)
    assert (predicted == held_out.classes).mean() > 0.6  # by chance 0.33


@pytest.mark.parametrize(("modality", "ignored"), [("text", "image"), ("image", "text")])
def test_a_single_modality_head_does_not_see_the_other(modality, ignored):
    """Neither in training nor in evaluation: noise, zeros and NaN there change no bit."""
    train, val = rows(seed=0), rows(seed=1)
    recipe = replace(QUICK, epochs=3, modality=modality)
    random = np.random.default_rng(0)
    shape = train.features.image.shape
    noisy = [changed(each, **{ignored: random.standard_normal(shape).astype(np.float32)}) for each in (train, val)]
    plain, other = fit(recipe, 3, train, val).head, fit(recipe, 3, *noisy).head
    expected = predict_logits(plain, val.features)
    assert np.array_equal(expected, predict_logits(other, val.features))
    for fill in (0, np.nan):
        replaced = changed(val, **{ignored: np.full_like(val.features.image, fill)})
        assert np.array_equal(expected, predict_logits(plain, replaced.features))


def test_a_head_for_both_sees_both():
    trained = fit(replace(QUICK, epochs=2), 3, rows(seed=0), rows(seed=1))
    val = rows(seed=2)
    expected = predict_logits(trained.head, val.features)
    for side in ("image", "text"):
        replaced = changed(val, **{side: np.zeros_like(val.features.image)})
        assert not np.allclose(expected, predict_logits(trained.head, replaced.features))


def test_a_constant_column_becomes_zero():
    constant = np.zeros((10, 4), np.float32)
    constant[:, 0] = 1
    features = Features(constant, constant)
    head = Head(sizes_of(features), 2, Recipe())
    head.learn_inputs(features)
    batch = Batch(torch.from_numpy(constant), torch.from_numpy(constant))
    assert torch.equal(head.standardised(batch).image, torch.zeros(10, 4))


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8, 1e25])
def test_what_is_constant_depends_on_the_scale_of_a_column(scale):
    """As ``StandardScaler`` says it, in float64, of the same numbers in float32."""
    random = np.random.default_rng(0)
    columns = np.column_stack([random.standard_normal(500), np.full(500, 0.1), 1000 + random.standard_normal(500)])
    stored = (columns * scale).astype(np.float32)
    module = Standardise(3, normalize=False)
    module.learn(torch.from_numpy(part) for part in np.array_split(stored, 7))
    expected = StandardScaler().fit(stored.astype(np.float64))
    assert module.scale[1] == 0
    assert np.allclose(module.scale[[0, 2]], 1 / expected.scale_[[0, 2]], rtol=1e-6)
    assert np.allclose(module.mean, expected.mean_, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("sizes", [[1], [3, 0, 2, 1], [0]])
def test_a_single_row_and_an_empty_block_warn_of_nothing(sizes):
    rows = np.random.default_rng(0).standard_normal((sum(sizes), 4)).astype(np.float32)
    module = Standardise(4, normalize=False)
    module.learn(torch.from_numpy(part) for part in np.split(rows, np.cumsum(sizes)[:-1]))
    if sum(sizes) > 1:
        assert np.allclose(module.scale, 1 / rows.std(axis=0), rtol=1e-5)
        assert np.allclose(module.mean, rows.mean(axis=0), atol=1e-6)
    else:
        assert torch.equal(module.scale, torch.zeros(4))


def test_the_mlp_has_the_designed_shape_and_its_parameters_are_counted():
    head = Head(sizes_of(Features(*np.zeros((2, 1, 512), np.float32))), 3, Recipe())
    (mlp,) = head.mlps
    linear = [module for module in mlp if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(1024, 256), (256, 64), (64, 3)]
    by_hand = 1024 * 256 + 256 + 2 * 256 + 256 * 64 + 64 + 2 * 64 + 64 * 3 + 3
    assert head.n_parameters() == by_hand
    assert Ensemble([head, head], 3).n_parameters() == 2 * by_hand


def test_the_best_epoch_is_kept_and_patience_ends_it():
    trained = fit(replace(QUICK, epochs=200, patience=4), 3, rows(seed=0), rows(seed=1))
    best = max(record["val_macro_f1"] for record in trained.history)
    assert trained.history[trained.best_epoch - 1]["val_macro_f1"] == best
    scores = [record["val_macro_f1"] for record in trained.history]
    assert len(scores) == scores.index(best) + 1 + 4
    val = rows(seed=1)
    found = (predict_logits(trained.head, val.features).argmax(axis=1) == val.classes).mean()
    assert found == pytest.approx(trained.history[trained.best_epoch - 1]["val_accuracy"])


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_one_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (fit(QUICK, 3, rows(seed=0), rows(seed=1)).head.state_dict() for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = fit(replace(QUICK, seed=1), 3, rows(seed=0), rows(seed=1)).head.state_dict()
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_without_validation_rows_the_given_schedule_is_followed():
    trained = fit(QUICK, 3, rows(), options=FitOptions(rates=[1e-2, 1e-3, 1e-4]))
    assert [record["lr"] for record in trained.history] == [1e-2, 1e-3, 1e-4]
    assert trained.best_epoch == 3


def test_a_last_batch_of_one_row_is_survived():
    assert fit(replace(QUICK, epochs=1, batch_size=7), 3, rows(n=15), rows(seed=1)).best_epoch == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fusion": "magic"}, "unknown fusion 'magic': choose one of concat"),
        ({"modality": "smell"}, "unknown modality 'smell': choose one of both, text, image"),
        ({"class_weights": "heavy"}, "unknown class weights 'heavy': choose one of none, inverse"),
        ({"lr": 0}, "lr must be above 0"),
        ({"dropout": 1.0}, "dropout must be in"),
        ({"head": "forest"}, "unknown head 'forest': choose one of mlp, linear"),
        ({"loss": "hinge"}, "unknown loss 'hinge': choose one of ce, focal"),
        ({"focal_gamma": -1.0}, "focal_gamma must be 0 or more"),
        ({"seed": -1}, "seed must be in"),
        ({"head": "linear", "views": True}, "views have no meaning"),
        ({"head": "linear", "fusion": "gated"}, "cannot learn the weights of gated: use concat, product or late"),
        ({"fusion": "cross_attn"}, "cross_attn needs token states"),
        ({"views": True}, "trains on augmented views, but these features have none"),
    ],
)
def test_names_and_numbers_that_do_not_exist(change, words):
    with pytest.raises(MmcliError, match=words):
        fit(replace(QUICK, **change), 3, rows(), rows(seed=1))


def weights_after(recipe, train, val):
    state = fit(recipe, 3, train, val).head.state_dict()
    return torch.cat([state[name].float().ravel() for name in sorted(state)])


@pytest.mark.parametrize(
    "change",
    [
        {"weight_decay": 0.0},
        {"dropout": 0.0},
        {"class_weights": "none"},
        {"lr": 2e-2},
        {"batch_size": 16},
        {"loss": "focal"},
        {"label_smoothing": 0.1},
        {"logit_adjustment": 1.0},
        {"normalize": False},
        {"seed": 7},
    ],
)
def test_every_setting_of_the_recipe_matters(change):
    skewed = rows(150)
    keep = (skewed.classes > 0) | (np.arange(150) % 5 == 0)
    train = skewed.take(np.flatnonzero(keep))
    recipe = replace(QUICK, epochs=2)
    assert not torch.equal(
        weights_after(recipe, train, rows(seed=1)), weights_after(replace(recipe, **change), train, rows(seed=1))
    )


def test_the_learning_rate_falls_on_a_plateau():
    recipe = replace(QUICK, epochs=30, patience=30, lr=0.05, lr_patience=1, lr_factor=0.1)
    trained = fit(recipe, 3, rows(seed=0), rows(20, seed=1))
    rates = [record["lr"] for record in trained.history]
    assert rates[0] == 0.05
    assert rates[-1] < 0.006
    assert rates == sorted(rates, reverse=True)


def test_the_inputs_are_standardised_by_the_training_rows_alone():
    train, val = rows(seed=0), rows(seed=1)
    head = fit(replace(QUICK, epochs=1), 3, train, val).head
    unit = train.features.image / np.linalg.norm(train.features.image, axis=1, keepdims=True)
    assert np.allclose(head.image_input.mean, unit.mean(axis=0), atol=1e-5)


def test_a_class_without_training_rows_and_a_loss_that_runs_away_are_errors():
    few = rows(60)
    with pytest.raises(MmcliError, match="class number 3 has no training row"):
        fit(replace(QUICK, epochs=1), 4, few, few)
    with pytest.raises(MmcliError, match=r"training diverged in epoch .*lower --lr"):
        fit(replace(QUICK, lr=1e30, epochs=5), 3, few, few)
    with pytest.raises(MmcliError, match="lr must be above 0, found nan"):
        replace(QUICK, lr=float("nan"))


def test_the_order_of_rows_is_the_same_for_every_fusion(monkeypatch):
    """The heads of two fusions take other random numbers to begin with; the batches must not."""
    from mmcli.heads.training import training_rows

    seen = []
    original = training_rows.token_batches

    def spy(features, wanted, order, *rest):
        seen.append(order.tolist())
        return original(features, wanted, order, *rest)

    monkeypatch.setattr(training_rows, "token_batches", spy)
    for fusion in ("concat", "film", "late"):
        fit(replace(QUICK, fusion=fusion, epochs=2), 3, rows(), rows(seed=1))
    assert seen[:2] == seen[2:4] == seen[4:]
    assert seen[0] != seen[1]


def test_a_random_view_of_each_row_is_seen_in_training_and_none_in_evaluation():
    train, val = rows(200), rows(seed=1)
    views = np.repeat(train.features.image[:, None], 3, axis=1)
    recipe = replace(QUICK, epochs=3)
    with_views = fit(replace(recipe, views=True), 3, changed(train, views=views), val)
    plain = fit(recipe, 3, train, val)
    assert with_views.history[-1]["train_loss"] == pytest.approx(plain.history[-1]["train_loss"], rel=0.2)
    scrambled = changed(train, views=np.random.default_rng(0).standard_normal(views.shape).astype(np.float32))
    noisy = fit(replace(recipe, views=True), 3, scrambled, val)
    assert noisy.history[-1]["train_loss"] > 1.03 * plain.history[-1]["train_loss"]  # the views are what it learns from
    assert np.array_equal(noisy.head.image_input.mean, plain.head.image_input.mean)  # standardised by the image itself


def test_the_view_of_a_row_says_nothing_about_its_place_in_the_epoch():
    """Over seeds: the place of the first of eight rows, and which of four views stands for it."""
    from mmcli.heads.training.training_rows import TrainingRows

    few = rows(8)
    few = changed(few, views=np.repeat(few.features.image[:, None], 4, axis=1))
    table = np.zeros((8, 4))
    for seed in range(1200):
        recipe = replace(QUICK, views=True, seed=seed, class_weights="none")
        batches = TrainingRows(few, Head(sizes_of(few.features), 3, recipe), recipe, 8, "cpu")
        order = torch.randperm(8, generator=batches.order).tolist()
        view = torch.randint(4, (8,), generator=batches.which_view)
        table[order.index(0), int(view[0])] += 1
    assert chi2_contingency(table).pvalue > 0.001


def test_each_epoch_draws_its_views_anew(monkeypatch):
    train = rows(50)
    number = np.tile(np.arange(4, dtype=np.float32)[None, :, None], (50, 1, 8))
    seen = []
    from mmcli.heads.training.training_rows import TrainingRows

    original = TrainingRows.batches

    def spy(self):
        seen.append(list(original(self)))
        return iter(seen[-1])

    monkeypatch.setattr(TrainingRows, "batches", spy)
    text = np.repeat(np.arange(50, dtype=np.float32)[:, None], 8, axis=1)
    recipe = replace(QUICK, epochs=3, views=True, normalize=False)
    fit(recipe, 3, changed(train, views=number, text=text), rows(seed=1))
    view_of = []
    for epoch in seen:
        image, row = (torch.cat([getattr(batch, side)[:, 0] for batch, _ in epoch]) for side in ("image", "text"))
        assert len(set(row.tolist())) == 50
        view_of.append(image[row.argsort()].tolist())
        assert len(set(view_of[-1])) == 4  # not one view for all rows
    assert view_of[0] != view_of[1] != view_of[2]


def test_an_ensemble_votes_with_the_mean_of_its_probabilities():
    train, val = rows(seed=0), rows(seed=1)
    heads = [fit(replace(QUICK, epochs=2, seed=seed), 3, train, val).head for seed in range(3)]
    each = [torch.softmax(torch.from_numpy(predict_logits(head, val.features)).double(), dim=1) for head in heads]
    together = torch.softmax(torch.from_numpy(predict_logits(Ensemble(heads, 3), val.features)).double(), dim=1)
    assert torch.allclose(together, torch.stack(each).mean(dim=0), atol=1e-5)
    alone = Ensemble(heads[:1], 3)
    assert np.array_equal(predict_logits(alone, val.features), predict_logits(heads[0], val.features))
    alone.offsets += torch.tensor([0.0, 5.0, 0.0])
    moved = predict_logits(alone, val.features) - predict_logits(heads[0], val.features)
    assert np.allclose(moved, [0, 5, 0], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "change", "matters"),
    [
        ({}, {"lr_attn": 1e-2}, False),
        ({"fusion": "cross_attn"}, {"lr_attn": 1e-2}, True),
        ({"fusion": "cross_attn", "modality": "text"}, {"lr_attn": 1e-2}, False),
        ({"modality": "image"}, {"fusion": "late"}, False),
        ({}, {"fusion": "late"}, True),
        ({}, {"focal_gamma": 1.0}, False),
        ({"loss": "focal"}, {"focal_gamma": 1.0}, True),
        ({"head": "linear"}, {"lr": 1.0, "hidden": (3,), "epochs": 1}, False),
        ({"head": "linear"}, {"class_weights": "none"}, True),
        ({"head": "linear"}, {"seed": 1}, True),
    ],
)
def test_the_settings_that_matter(settings, change, matters):
    recipe = Recipe(**settings)
    assert (recipe.that_matter() != recipe.changed(**change).that_matter()) == matters


@pytest.mark.parametrize("max_bytes", [1, 2000])
def test_stage_2_takes_no_more_steps_than_its_plan_where_rows_are_left_in_the_file(stage1, monkeypatch, max_bytes):
    """Each block of rows from the file ends with a smaller batch."""
    monkeypatch.setattr(training_rows, "_STRETCH_ROWS", 10)
    ready = Ready(stage1(), batch_size=4, epochs=3)
    with FeatureCache.open(ready.checkpoint.made_from["cache"]) as cache:
        stored = cache.features(ready.checkpoint.split.train, max_bytes=max_bytes)
        train = ready.rows["train"]
        train = replace(train, features=replace(stored, states=train.features.states))
        steps = []
        options = FitOptions(on_step=lambda *done_and_most: steps.append(done_and_most))
        fitted = fit(ready.recipe, 3, train, options=options, start=ready.model)
    done, most = steps[-1]
    assert 0 <= most - done <= 3
    assert all(record["lr"] > 0 for record in fitted.history)
