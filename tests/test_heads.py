from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from mmcli.cache import MmcliError
from mmcli.heads import FUSIONS, Head, Recipe, Rows, fit, predict_logits
from mmcli.heads.model import Modality


def rows(n=120, dim=8, seed=0):
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, n)
    image, text = (random.standard_normal((n, dim)).astype(np.float32) for _ in range(2))
    image[:, 0] += 2.5 * classes
    text[:, 0] -= 2.5 * classes
    return Rows(image, text, classes.astype(np.int64))


QUICK = Recipe(epochs=15, patience=15, hidden=(16,), dropout=0.1, lr=1e-2)


@pytest.mark.parametrize("modality", get_args(Modality))
def test_a_head_learns(modality):
    trained = fit(replace(QUICK, modality=modality), 3, rows(400, seed=0), rows(seed=1))
    held_out = rows(300, seed=2)
    predicted = predict_logits(trained.head, held_out.image, held_out.text).argmax(axis=1)
    assert (predicted == held_out.classes).mean() > 0.6  # by chance 0.33


@pytest.mark.parametrize(("modality", "ignored"), [("text", "image"), ("image", "text")])
def test_a_single_modality_head_does_not_see_the_other(modality, ignored):
    """Neither in training nor in evaluation: noise, zeros and NaN there change no bit."""
    train, val = rows(seed=0), rows(seed=1)
    recipe = replace(QUICK, epochs=3, modality=modality)
    random = np.random.default_rng(0)
    noisy = [
        replace(each, **{ignored: random.standard_normal(each.image.shape).astype(np.float32)}) for each in (train, val)
    ]
    plain, other = fit(recipe, 3, train, val).head, fit(recipe, 3, *noisy).head
    expected = predict_logits(plain, val.image, val.text)
    assert np.array_equal(expected, predict_logits(other, val.image, val.text))
    for fill in (0, np.nan):
        replaced = replace(val, **{ignored: np.full_like(val.image, fill)})
        assert np.array_equal(expected, predict_logits(plain, replaced.image, replaced.text))


def test_a_head_for_both_sees_both():
    trained = fit(replace(QUICK, epochs=2), 3, rows(seed=0), rows(seed=1))
    val = rows(seed=2)
    expected = predict_logits(trained.head, val.image, val.text)
    for side in ("image", "text"):
        replaced = replace(val, **{side: np.zeros_like(val.image)})
        assert not np.allclose(expected, predict_logits(trained.head, replaced.image, replaced.text))


def test_concat_equals_its_formula():
    head = Head(8, 3, "concat").eval()
    each = rows(5)
    image, text = torch.from_numpy(each.image), torch.from_numpy(each.text)
    head.learn_inputs(image, text)
    halves = []
    for half in (each.image.astype(np.float64), each.text.astype(np.float64)):
        unit = half / np.linalg.norm(half, axis=1, keepdims=True)
        halves.append((unit - unit.mean(axis=0)) / unit.std(axis=0))
    expected = head.mlp(torch.from_numpy(np.hstack(halves)).float())
    assert torch.allclose(head(image, text), expected, atol=1e-4)


def test_a_constant_column_becomes_zero():
    head = Head(4, 2)
    constant = torch.zeros(10, 4)
    constant[:, 0] = 1
    head.learn_inputs(constant, constant)
    assert torch.equal(head.standardised(constant, constant)[0], torch.zeros(10, 4))


def test_the_mlp_has_the_designed_shape_and_its_parameters_are_counted():
    head = Head(512, 3)
    linear = [module for module in head.mlp if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(1024, 256), (256, 64), (64, 3)]
    by_hand = 1024 * 256 + 256 + 2 * 256 + 256 * 64 + 64 + 2 * 64 + 64 * 3 + 3
    assert head.n_parameters() == by_hand


def test_the_best_epoch_is_kept_and_patience_ends_it():
    trained = fit(replace(QUICK, epochs=200, patience=4), 3, rows(seed=0), rows(seed=1))
    best = max(record["val_macro_f1"] for record in trained.history)
    assert trained.history[trained.best_epoch - 1]["val_macro_f1"] == best
    scores = [record["val_macro_f1"] for record in trained.history]
    assert len(scores) == scores.index(best) + 1 + 4
    val = rows(seed=1)
    found = (predict_logits(trained.head, val.image, val.text).argmax(axis=1) == val.classes).mean()
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
    trained = fit(QUICK, 3, rows(), schedule=[1e-2, 1e-3, 1e-4])
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
    ],
)
def test_names_and_numbers_that_do_not_exist(change, words):
    with pytest.raises(MmcliError, match=words):
        fit(replace(QUICK, **change), 3, rows(), rows(seed=1))


def test_every_fusion_says_its_formula():
    assert all(fusion.formula and fusion.__doc__ for fusion in FUSIONS.values())


def weights_after(recipe, train, val):
    state = fit(recipe, 3, train, val).head.state_dict()
    return torch.cat([state[name].float().ravel() for name in sorted(state)])


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.0}, {"dropout": 0.0}, {"class_weights": "none"}, {"lr": 2e-2}, {"batch_size": 16}]
)
def test_every_setting_of_the_recipe_matters(change):
    skewed = rows(150)
    keep = (skewed.classes > 0) | (np.arange(150) % 5 == 0)
    train = Rows(skewed.image[keep], skewed.text[keep], skewed.classes[keep])
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
    unit = train.image / np.linalg.norm(train.image, axis=1, keepdims=True)
    assert np.allclose(head.image_input.mean, unit.mean(axis=0), atol=1e-6)


def test_a_class_without_training_rows_and_a_loss_that_runs_away_are_errors():
    few = rows(60)
    with pytest.raises(MmcliError, match="class number 3 has no training row"):
        fit(replace(QUICK, epochs=1), 4, few, few)
    with pytest.raises(MmcliError, match=r"training diverged in epoch .*lower --lr"):
        fit(replace(QUICK, lr=1e30, epochs=5), 3, few, few)
    with pytest.raises(MmcliError, match="lr must be above 0, found nan"):
        replace(QUICK, lr=float("nan"))
