"""Devices: no room for a batch, numbers beyond float16, memory of the process."""

import numpy as np
import pytest
import torch
from conftest import write_pair
from mmcli.cache import FeatureCache, MmcliError, machine
from mmcli.featurize import FeaturizeOptions, featurize, open_backbone
from mmcli.featurize.backbones.opening import choose_dtype
from mmcli.featurize.backbones.tensors import to_half

NO_ROOM = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to"),
]


def raising(error):
    def run(*arguments, **options):
        raise error

    return run


@pytest.mark.parametrize("error", NO_ROOM)
def test_no_room_for_a_batch_is_one_line(tiny_clip, monkeypatch, error):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    monkeypatch.setattr(encoder.model, "get_image_features", raising(error))
    monkeypatch.setattr(encoder.model, "get_text_features", raising(error))
    said = "cpu has not enough memory for a batch of 5: give a smaller --batch-size"
    for run in (encoder.encode_images, lambda pixels: encoder.images_below(pixels, 1)):
        with pytest.raises(MmcliError, match=said):
            run(np.zeros((5, 3, 64, 64), np.float32))
    for run in (encoder.encode_texts, lambda ids: encoder.texts_below(ids, 1)):
        with pytest.raises(MmcliError, match=said):
            run([[512, 5, 513]] * 5)


def test_other_errors_keep_their_traceback(tiny_clip, monkeypatch):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    monkeypatch.setattr(encoder.model, "get_text_features", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        encoder.encode_texts([[512, 5, 513]])


def test_no_room_in_featurize_ends_the_command_with_one_line(cli, pairs, tiny_clip, monkeypatch):
    from mmcli.featurize.backbones import huggingface_encoder

    folder, _ = pairs(4)
    original = huggingface_encoder.HuggingFaceEncoder._run_images

    def run(self, pixels):
        return original(self, pixels) if len(pixels) < 3 else raising(NO_ROOM[0])()

    monkeypatch.setattr(huggingface_encoder.HuggingFaceEncoder, "_run_images", run)
    code, _, err = cli("featurize", folder, "--backbone", tiny_clip, "--out", "f.h5")
    assert code == 1
    assert "--batch-size" in err.strip().splitlines()[-1]
    assert cli("featurize", folder, "--backbone", tiny_clip, "--out", "f.h5", "--batch-size", "2")[0] == 0


def test_no_room_in_a_step_of_stage_2_is_one_line(tuned, monkeypatch):
    from mmcli.heads import Head

    monkeypatch.setattr(Head, "embedded", raising(NO_ROOM[0]))
    with pytest.raises(MmcliError, match=r"has not enough memory for a batch of .*--batch-size"):
        tuned()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_token_states_beyond_float16_are_kept_at_its_limit(tiny_clip, tmp_path, dtype):
    """One massive activation, which the norm after it takes back: the embeddings are sound, and so is the row."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights["vision_model.encoder.layers.2.mlp.fc2.bias"][3] = 1e6
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for guid in range(4):
        write_pair(tmp_path / "data", guid)
    options = FeaturizeOptions(backbone=str(folder), dtype=dtype, tokens=True, device="cpu")
    first, second = (featurize(tmp_path / "data", None, tmp_path / "f.h5", options) for _ in range(2))
    assert (first.computed, second.computed, second.unchanged) == (4, 0, 4)
    with FeatureCache.open(tmp_path / "f.h5") as cache:
        tokens = cache.features(list(cache.guids), tokens=True).tokens.load().padded().image
    assert np.isfinite(tokens).all()
    assert (tokens[..., 3] == np.finfo(np.float16).max).all()


def test_what_float16_cannot_hold_becomes_its_limit():
    limits = np.finfo(np.float16)
    found = to_half(torch.tensor([1e9, -1e9, 1.5, torch.nan, torch.inf]))
    np.testing.assert_array_equal(found, np.array([limits.max, limits.min, 1.5, np.nan, np.inf], np.float16))


@pytest.mark.parametrize("what", ["tokens", "zero"])
def test_what_would_be_computed_again_for_ever_is_a_reject(pairs, tmp_path, free, monkeypatch, what):
    original = type(free).load

    def load(self, *arguments):
        encoder = original(self, *arguments)
        encode = encoder.encode_images

        def spoilt(pixels, tokens=False):
            encoded = encode(pixels, tokens)
            if what == "zero":
                encoded.pooled[:] = 0
            else:
                encoded.tokens[0][:] = np.nan
            return encoded

        encoder.encode_images = spoilt
        return encoder

    monkeypatch.setattr(type(free), "load", load)
    folder, _ = pairs(3)
    options = FeaturizeOptions(batch_size=1, tokens=what == "tokens", max_reject_rate=1)
    with pytest.raises(MmcliError, match=r"no pair of .* could be read"):
        featurize(folder, None, tmp_path / "f.h5", options)
    assert (tmp_path / "f.h5.rejects.csv").read_text().count("not finite, or all zero") == 3


def test_only_the_command_line_sets_how_the_process_keeps_memory(cli, pairs, tiny_clip, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(machine, "_call", lambda name, *arguments: calls.append(name) or 1)
    folder, _ = pairs(4)
    featurize(folder, None, tmp_path / "f.h5", FeaturizeOptions(backbone=str(tiny_clip)))
    assert "mallopt" not in calls
    assert cli("featurize", folder, "--backbone", tiny_clip, "--out", "g.h5")[0] == 0
    assert "mallopt" in calls


def test_a_head_is_trained_on_the_cpu_unless_asked_otherwise(cli, learnable, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path, labels = learnable
    assert cli("train-head", "--cache", path, "--labels", labels, "--epochs", 1)[0] == 0


def test_a_pytorch_that_cannot_say_what_the_processor_does_gives_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert choose_dtype("auto", "cpu") == "float32"
