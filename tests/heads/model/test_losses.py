import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.heads import Recipe
from mmcli.heads.model import losses
from mmcli.heads.model.losses import _best_shift, fit_offsets, focal_loss, make_loss
from sklearn.metrics import f1_score
from torch.nn import functional

COUNTS = np.array([50, 10, 140])


def batch(n=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), torch.randint(3, (n,), generator=generator)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_loss_without_focus_is_cross_entropy(smoothing):
    logits, classes = batch()
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    expected = functional.cross_entropy(logits, classes, weight, label_smoothing=smoothing)
    assert float(focal_loss(logits, classes, weight, 0.0, smoothing)) == pytest.approx(float(expected), rel=1e-5)


def test_focal_loss_equals_its_formula_row_by_row():
    logits, classes = batch()
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    total = scale = 0.0
    for row, true in zip(logits.double(), classes.tolist(), strict=True):
        p = float(torch.softmax(row, dim=0)[true])
        total += -float(weight[true]) * (1 - p) ** 2 * np.log(p)
        scale += float(weight[true])
    assert float(focal_loss(logits, classes, weight, 2.0)) == pytest.approx(total / scale, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.99, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_gradient_of_focal_loss_is_finite_where_a_row_is_surely_right(gamma, smoothing):
    logits = torch.tensor([[200.0, 0.0, -30.0], [0.3, 0.2, -1.0]], requires_grad=True)
    loss = focal_loss(logits, torch.tensor([0, 1]), torch.ones(3), gamma, smoothing)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()
    if not smoothing:
        assert not logits.grad[0].any()


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_focal_loss_and_its_gradient_are_those_of_the_naive_formula(gamma, smoothing):
    logits, classes = batch()
    weight = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    ours, naive = (logits.double().requires_grad_() for _ in range(2))
    focal_loss(ours, classes, weight, gamma, smoothing).backward()
    probs = torch.softmax(naive, dim=1)
    target = functional.one_hot(classes, 3).double() * (1 - smoothing) + smoothing / 3
    loss = (target * weight * (1 - probs) ** gamma * -torch.log(probs)).sum() / weight[classes].sum()
    loss.backward()
    found = focal_loss(ours.detach(), classes, weight, gamma, smoothing)
    assert float(found) == pytest.approx(loss.item(), rel=1e-12)
    assert torch.allclose(ours.grad, naive.grad, rtol=1e-10, atol=1e-14)


def test_a_class_without_validation_rows_is_not_moved(monkeypatch):
    """No row says how often it should be predicted, and moving it far down would always look best."""
    random = np.random.default_rng(0)
    classes = random.choice(2, 200, p=[0.85, 0.15])
    logits = random.standard_normal((200, 3)) + np.eye(3)[classes]
    moved = []
    original = losses._best_shift

    def spy(scores, true, each, support):
        moved.append(each)
        return original(scores, true, each, support)

    monkeypatch.setattr(losses, "_best_shift", spy)
    assert losses.fit_offsets(logits, classes).any()
    assert set(moved) == {0, 1}


def test_logit_adjustment_adds_log_frequencies_in_the_loss_alone():
    logits, classes = batch()
    prior = torch.log(torch.from_numpy(COUNTS / COUNTS.sum())).float()
    plain = Recipe(class_weights="none", logit_adjustment=1.5)
    expected = functional.cross_entropy(logits + 1.5 * prior, classes)
    assert float(make_loss(plain, COUNTS, "cpu")(logits, classes)) == pytest.approx(float(expected), rel=1e-5)


def test_the_losses_are_those_that_the_recipe_names():
    logits, classes = batch()
    smoothed = Recipe(class_weights="none", label_smoothing=0.1)
    expected = functional.cross_entropy(logits, classes, label_smoothing=0.1)
    assert float(make_loss(smoothed, COUNTS, "cpu")(logits, classes)) == pytest.approx(float(expected))
    focal = Recipe(class_weights="none", loss="focal", focal_gamma=3.0)
    expected = focal_loss(logits, classes, torch.ones(3), 3.0)
    assert float(make_loss(focal, COUNTS, "cpu")(logits, classes)) == pytest.approx(float(expected))


def macro(logits, classes, offsets):
    return f1_score(classes, (logits + offsets).argmax(axis=1), average="macro", labels=np.unique(classes))


def test_offsets_of_two_classes_are_the_best_there_are():
    random = np.random.default_rng(0)
    classes = random.choice(2, 200, p=[0.85, 0.15])
    logits = random.standard_normal((200, 2)) + np.eye(2)[classes] - [0, 1.5]
    found = fit_offsets(logits, classes)
    grid = [macro(logits, classes, np.array([-shift, shift])) for shift in np.linspace(-5, 5, 4001)]
    assert macro(logits, classes, found) == pytest.approx(max(grid), abs=1e-9)
    assert macro(logits, classes, found) > macro(logits, classes, np.zeros(2)) + 0.04
    assert found.sum() == pytest.approx(0, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(10, 80))
def test_offsets_never_make_the_rows_they_were_fitted_on_worse(seed, n_classes, n):
    random = np.random.default_rng(seed)
    classes = np.concatenate([np.arange(n_classes), random.integers(0, n_classes, n)])
    logits = random.standard_normal((len(classes), n_classes)).astype(np.float32) + np.eye(n_classes)[classes]
    before, after = (macro(logits, classes, each) for each in (np.zeros(n_classes), fit_offsets(logits, classes)))
    assert after >= before - 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5), st.integers(5, 40))
def test_one_step_of_the_offsets_is_the_best_of_all_shifts(seed, n_classes, n):
    """Against a loop over every place where a prediction changes, scored by scikit-learn."""
    random = np.random.default_rng(seed)
    classes = np.concatenate([np.arange(n_classes), random.integers(0, n_classes, n)])
    logits = random.standard_normal((len(classes), n_classes)) + np.eye(n_classes)[classes]
    each = int(random.integers(n_classes))
    shift = _best_shift(logits, classes, each, np.bincount(classes))
    others = np.delete(logits, each, axis=1).max(axis=1) - logits[:, each]
    places = np.sort(np.concatenate([others - 1e-9, others + 1e-9, [0.0]]))
    best = max(macro(logits, classes, place * np.eye(n_classes)[each]) for place in places)
    assert macro(logits, classes, shift * np.eye(n_classes)[each]) == pytest.approx(best)
