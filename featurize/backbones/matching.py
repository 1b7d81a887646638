"""Whether weights, tokenizer and image processor belong to one model. Importing this module imports torch.

transformers replaces missing files silently (random weights, an empty tokenizer), and the embeddings still look normal.
Each check raises a BackboneError that says what does not fit.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...cache.errors import BackboneError, MmcliError

if TYPE_CHECKING:
    from .huggingface_encoder import HuggingFaceEncoder

_SPARE_IDS = 128  # models round the number of token ids up
_TEXTS = ("a red car", "7 green dogs on a boat")


def check_weights(model: Any, loaded: dict[str, Any], folder: Path) -> None:
    """Check that the files in ``folder`` hold all weights of ``model``, and no further weights for its layers.

    ``model`` and ``loaded`` come from ``from_pretrained`` with ``output_loading_info``. The BackboneError counts the
    missing, wrongly shaped and foreign weights, and names one of each kind.
    """
    own = model.state_dict()
    # A single number outside the towers scales similarities; it does not change an embedding.
    missing = sorted(name for name in loaded["missing_keys"] if "." in name or own[name].numel() > 1)
    reshaped = sorted(loaded["mismatched_keys"])
    foreign = sorted(loaded["unexpected_keys"])
    if not missing and not reshaped:  # the files may hold heads that no tower uses
        foreign = _weights_for_layers(model, foreign)
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(own)} weights are missing, such as {missing[0]}")
    if reshaped:
        name, *shapes = reshaped[0]
        in_file, wanted = map(tuple, shapes)
        faults.append(
            f"{len(reshaped)} have the wrong shape, such as {name}: {in_file} in the file, {wanted} in config.json"
        )
    if foreign:
        faults.append(f"{len(foreign)} in the file do not belong to this model, such as {foreign[0]}")
    if faults:
        raise BackboneError(
            f"the weights in {folder} do not fit its config.json, which describes a {type(model).__name__}: "
            f"{'; '.join(faults)}. Download the folder again, or write it with the model's save_pretrained"
        )


def _weights_for_layers(model: Any, names: list[str]) -> list[str]:
    """Return the ``names`` that would change the layers of ``model``: additional layers, or additions to a layer."""
    kinds = {re.sub(r"\d+", "0", name) for name in model.state_dict()}
    layers = {
        name
        for name, module in model.named_modules()
        if next(module.children(), None) is None and next(module.parameters(), None) is not None
    }

    def is_inside(name: str) -> bool:
        return any(name[: dot.start()] in layers for dot in re.finditer(r"\.", name))

    return [name for name in names if re.sub(r"\d+", "0", name) in kinds or is_inside(name)]


def check_tokenizer(tokenizer: Any, model: Any, folder: Path) -> None:
    """Check that ``tokenizer`` has the token ids that ``model`` has embeddings for, and a padding token."""
    ids = set(tokenizer.get_vocab().values())
    size = model.config.text_config.vocab_size
    if not ids or max(ids) >= size or size - len(ids) > max(_SPARE_IDS, size // 50):
        raise BackboneError(
            f"the tokenizer in {folder} does not belong to the model: it has {len(ids)} tokens (highest id "
            f"{max(ids, default='none')}), but the model takes {size}. Put the model's own tokenizer files there "
            "(tokenizer.json, or vocab.json and merges.txt), as the tokenizer's save_pretrained writes them"
        )
    if tokenizer.pad_token_id is None:
        raise BackboneError(f"the tokenizer in {folder} has no padding token: name one in tokenizer_config.json")


def check_encoder(encoder: HuggingFaceEncoder, folder: Path) -> None:
    """Encode two images and two texts, to check that processor, tokenizer and model fit together."""
    kind = type(encoder.model).__name__
    try:
        pixels = _prepared(encoder, folder)
        ids, _ = encoder.tokenize(_TEXTS)
        _check_ids(encoder, ids, folder)
        towers = {"image": encoder.encode_images(pixels).pooled, "text": encoder.encode_texts(ids).pooled}
    except MmcliError:
        raise
    except Exception as error:  # models raise any exception for inputs that do not fit
        raise BackboneError(
            f"the {kind} in {folder} cannot encode the output of its own processor or tokenizer: {error}. Download the "
            "folder again"
        ) from error
    for tower, pooled in towers.items():
        if pooled.ndim != 2 or not np.isfinite(pooled).all():
            raise BackboneError(
                f"the {tower} embeddings of the {kind} in {folder} are not finite vectors: its weights are damaged, or "
                "it is not a dual encoder. Give a dual encoder such as CLIP, SigLIP or Chinese-CLIP"
            )
    if towers["image"].shape[1] != towers["text"].shape[1]:
        raise BackboneError(
            f"the {kind} in {folder} gives images and texts embeddings of different lengths: give a dual encoder such "
            "as CLIP"
        )
    if np.array_equal(*towers["text"]):
        raise BackboneError(
            f"the {kind} in {folder} gives different texts the same embedding, so its tokenizer belongs to another "
            "model: put the model's own tokenizer files there"
        )


def _prepared(encoder: HuggingFaceEncoder, folder: Path) -> Any:
    """Return the pixels of a wide and a tall image, (2, 3, H, W)."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    pixels = [encoder.prepare_image(Image.fromarray(image)) for image in (noise[:60], noise[:, :60])]
    shapes = [image.shape for image in pixels]
    if shapes[0] != shapes[1] or len(shapes[0]) != 3:
        raise BackboneError(
            f"the image processor in {folder} gives a wide image the shape {shapes[0]} and a tall image {shapes[1]}: "
            "mmcli needs one shape (3, height, width), so give a model that resizes or crops to a fixed size"
        )
    config = encoder.model.config
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if _has_fixed_positions(encoder.model) and size is not None and shapes[0][1:] != wanted:
        raise BackboneError(
            f"the image processor in {folder} does not belong to the model: it gives images of "
            f"{shapes[0][1]} x {shapes[0][2]} pixels, but the model takes {wanted[0]} x {wanted[1]}. Put the model's "
            "own preprocessor_config.json there"
        )
    return np.stack(pixels)


def _has_fixed_positions(model: Any) -> bool:
    """Whether the model refuses images of another size or gives them wrong position embeddings."""
    interpolates = inspect.signature(model.get_image_features).parameters.get("interpolate_pos_encoding")
    return interpolates is not None and interpolates.default is False


def _check_ids(encoder: HuggingFaceEncoder, ids: list[list[int]], folder: Path) -> None:
    """Check that texts get different tokens, and that each ends with the token at which the model pools."""
    pooled_token = encoder.architecture.pooled_token
    end = None if pooled_token in (None, "highest") else encoder.model.text_model.eos_token_id
    takes_highest = pooled_token == "highest" or (pooled_token == "highest if the end token is 2" and end == 2)
    for row in ids if pooled_token is not None else ():
        pooled = max(row) if takes_highest else end
        if pooled not in row or row.index(pooled) != len(row) - 1:
            raise BackboneError(
                f"the tokenizer in {folder} does not belong to the model: the model pools at "
                f"{'the highest token id' if takes_highest else f'token {end}'}, which must be the last token of a "
                f"text and occur once, but a text has the tokens {row}. Put the model's own tokenizer files there"
            )
    if len({tuple(row) for row in ids}) < len(ids):
        raise BackboneError(
            f"the tokenizer in {folder} gives different texts the same tokens: its files are incomplete, so download "
            "them again"
        )
