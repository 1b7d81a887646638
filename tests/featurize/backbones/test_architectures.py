"""Every dual encoder of transformers: its embeddings are those of its own forward, or it gets one line."""

import numpy as np
import pytest
import torch
from dual_encoders import KINDS, make
from mmcli.cache import BackboneError
from mmcli.featurize import open_backbone
from mmcli.featurize.backbones.towers import ARCHITECTURES
from PIL import Image
from tolerances import close_rows
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

REFUSED = {
    "Siglip2": r"gives a wide image the shape \(16, 768\)",  # as many patches as the image has
    "XCLIP": "is an? XCLIPModel, which has no image and text features",
}
ENCODED = [kind for kind in KINDS if kind not in REFUSED]
CUT = {  # which towers stage 2 can unfreeze
    "AltCLIP": ["image"],
    "Align": ["text"],
    "GroupViT": ["text"],
    "Flava": ["text"],
    "OwlViT": ["text"],
    "Owlv2": ["text"],
    "VisionTextDualEncoder": ["text"],
}
TEXTS = ["good", "a fine day , all in all", "x y " * 60]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function that makes the folder of a kind, once."""
    folders = {}

    def get(kind):
        if kind not in folders:
            folders[kind] = make(kind, tmp_path_factory.mktemp(kind))
        return folders[kind]

    return get


def theirs(kind, folder, pictures, max_tokens):
    """What transformers itself makes of pictures and texts: the vectors that the model compares."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    padding = "max_length" if kind == "Siglip" else "longest"
    given = tokenizer(TEXTS, truncation=True, max_length=max_tokens, return_tensors="pt", padding=padding)
    inputs = {name: each for name, each in given.items() if name == "input_ids" or kind != "Siglip"}
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        if kind == "Flava":  # which returns no compared vectors: as in FlavaForPreTraining's contrastive loss
            pixels = processor(pictures, return_tensors="pt")["pixel_values"]
            image = model.image_projection(model.image_model(pixel_values=pixels).last_hidden_state[:, 0])
            return image, model.text_projection(model.text_model(**inputs).last_hidden_state[:, 0])
        out = model(**inputs, pixel_values=processor(pictures, return_tensors="pt")["pixel_values"])
    return out.image_embeds, out.text_embeds


def unit(rows):
    rows = np.asarray(rows)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ENCODED)
def test_embeddings_point_where_the_models_own_forward_points(kind, folder_of):
    encoder = open_backbone(str(folder_of(kind))).load("cpu", "float32", None)
    noise = np.random.default_rng(0).integers(0, 256, (3, 70, 90, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in noise]
    image, text = theirs(kind, folder_of(kind), pictures, encoder.max_tokens)
    ids, truncated = encoder.tokenize(TEXTS)
    pixels = np.stack([encoder.prepare_image(each) for each in pictures])
    assert truncated == [False, kind in ("OwlViT", "Owlv2"), True]
    for tokens in (False, True):
        images, texts = encoder.encode_images(pixels, tokens), encoder.encode_texts(ids, tokens)
        close_rows(unit(images.pooled), unit(image))
        close_rows(unit(texts.pooled), unit(text))
    assert all(states.ndim == 2 for states in [*images.tokens, *texts.tokens])
    assert len({states.shape for states in images.tokens}) == 1


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_encoded_gets_one_line(kind, folder_of):
    with pytest.raises(BackboneError, match=REFUSED[kind]):
        open_backbone(str(folder_of(kind))).load("cpu", "float32", None)


@pytest.mark.parametrize("tower", ["text", "image"])
@pytest.mark.parametrize("kind", ENCODED)
def test_stage_2_goes_on_from_the_cut_or_gets_one_line(kind, tower, folder_of):
    encoder = open_backbone(str(folder_of(kind))).load("cpu", "float32", None)
    if tower not in CUT.get(kind, ["text", "image"]):
        with pytest.raises(BackboneError, match=f"does not know the layers of the {tower} tower of a"):
            encoder.text_top(1) if tower == "text" else encoder.image_top(1)
        return
    if tower == "text":
        ids, _ = encoder.tokenize(TEXTS[:1])
        top, expected = encoder.text_top(2), encoder.encode_texts(ids).pooled
        inputs = [np.stack(encoder.texts_below(ids, 2)), np.array(ids), np.ones_like(ids)]
        if kind == "Siglip":
            inputs[1:] = [np.zeros((1, 24), int), np.ones((1, 24), int)]
    else:
        pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)
        top, expected = encoder.image_top(2), encoder.encode_images(pixels).pooled
        inputs = [encoder.images_below(pixels, 2)]
    pooled = top.pooled(*map(torch.from_numpy, inputs))
    close_rows(pooled.detach(), expected)
    pooled.square().sum().backward()
    assert len(top.unfrozen()) >= 9
    norm = ARCHITECTURES[encoder.model.config.model_type].tower(tower).norm
    assert norm is None or any(f".{norm}." in name for name in top.unfrozen())
    assert all(each.grad is not None for each in top.unfrozen().values())


def test_a_model_that_is_not_in_the_table_is_encoded_and_not_cut(folder_of, monkeypatch):
    pixels = np.random.default_rng(0).standard_normal((2, 3, 64, 64)).astype(np.float32)

    def embeddings(encoder):
        return encoder.encode_images(pixels).pooled, encoder.encode_texts(encoder.tokenize(TEXTS)[0]).pooled

    expected = embeddings(open_backbone(str(folder_of("CLIP"))).load("cpu", "float32", None))
    monkeypatch.delitem(ARCHITECTURES, "clip")
    encoder = open_backbone(str(folder_of("CLIP"))).load("cpu", "float32", None)
    for found, wanted in zip(embeddings(encoder), expected, strict=True):
        close_rows(found, wanted)
    for top in (encoder.text_top, encoder.image_top):
        with pytest.raises(BackboneError, match=r"not know the layers of the .* tower of a CLIPModel.* stage 1 only"):
            top(1)


@pytest.mark.parametrize("kind", ENCODED)
def test_the_table_names_what_is_in_the_model(kind, folder_of):
    model = AutoModel.from_pretrained(folder_of(kind))
    architecture = ARCHITECTURES[model.config.model_type]
    for tower in (architecture.image, architecture.text):
        children = dict(model.named_children())
        assert {tower.module, tower.projection or tower.module} <= set(children)
        if tower.layers is not None:
            inner = dict(children[tower.module].named_children())
            assert {"embeddings", "encoder", *filter(None, (tower.norm, tower.norm_before))} <= set(inner)
            assert len(getattr(inner["encoder"], tower.layers)) == 3
