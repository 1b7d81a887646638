"""Whether what was loaded is one model: weights, tokenizer and image processor. Importing this imports torch.

transformers makes up what a folder lacks (random weights, an empty tokenizer), and the embeddings look like any others.
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
# Models that pool at the highest id, the last of CLIP's vocabulary: always, or where an old config.json calls it 2.
_HIGHEST, _HIGHEST_FOR_2 = ("owlvit", "owlv2"), ("clip", "clipseg", "groupvit")
_TEXTS = ("a red car", "7 green dogs on a boat")


def check_weights(model: Any, loaded: dict[str, Any], folder: Path) -> None:
    """Check that the files have all weights of ``model``, in their shapes, and no further weights of its layers.

    Parameters
    ----------
    model, loaded
        What ``from_pretrained`` returned with ``output_loading_info``.
    folder
        Where the files are.

    Raises
    ------
    BackboneError
        They do not; it says how many weights are concerned, and names one of each kind.
    """
    own = model.state_dict()
    # A lone number outside the towers scales the similarity of two embeddings, and changes neither.
    missing = sorted(name for name in loaded["missing_keys"] if "." in name or own[name].numel() > 1)
    reshaped = sorted(loaded["mismatched_keys"])
    foreign = sorted(loaded["unexpected_keys"])
    if not missing and not reshaped:  # heads that no tower uses may be there
        foreign = _of_its_layers(model, foreign)
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(own)} weights are missing, such as {missing[0]}")
    if reshaped:
        name, *shapes = reshaped[0]
        in_file, wanted = map(tuple, shapes)
        faults.append(
            f"{len(reshaped)} have another shape, such as {name}: {in_file} in the file, {wanted} by config.json"
        )
    if foreign:
        faults.append(f"{len(foreign)} in the file are not of this model, such as {foreign[0]}")
    if faults:
        raise BackboneError(
            f"the weights in {folder} do not fit its config.json, a {type(model).__name__}: {'; '.join(faults)}. "
            "Get the folder again, or write it with the model's save_pretrained"
        )


def _of_its_layers(model: Any, names: list[str]) -> list[str]:
    """Return those of ``names`` that would change what the layers of ``model`` compute: more layers, or more in one."""
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
    """Check that the token ids of ``tokenizer`` are those that ``model`` has embeddings for.

    Raises
    ------
    BackboneError
        It has more, or far fewer; or none for padding.
    """
    ids = set(tokenizer.get_vocab().values())
    size = model.config.text_config.vocab_size
    if not ids or max(ids) >= size or size - len(ids) > max(_SPARE_IDS, size // 50):
        raise BackboneError(
            f"the tokenizer in {folder} is not that of its model: it has {len(ids)} tokens (highest id "
            f"{max(ids, default='none')}), the model takes {size}: put the model's own tokenizer files there "
            "(tokenizer.json, or vocab.json and merges.txt), as the tokenizer's save_pretrained writes them"
        )
    if tokenizer.pad_token_id is None:
        raise BackboneError(f"the tokenizer in {folder} has no token for padding: name one in tokenizer_config.json")


def check_encoder(encoder: HuggingFaceEncoder, folder: Path) -> None:
    """Check on two pictures and two texts that the model takes what its processor and its tokenizer make.

    Raises
    ------
    BackboneError
        It does not, or what comes out cannot be right.
    """
    kind = type(encoder.model).__name__
    try:
        pixels = _prepared(encoder, folder)
        ids, _ = encoder.tokenize(_TEXTS)
        _check_ids(encoder, ids, folder)
        towers = {"image": encoder.encode_images(pixels).pooled, "text": encoder.encode_texts(ids).pooled}
    except MmcliError:
        raise
    except Exception as error:  # models raise as they like where they do not fit what they are given
        raise BackboneError(
            f"the {kind} in {folder} cannot encode what its own processor or tokenizer makes: {error}"
        ) from error
    for tower, pooled in towers.items():
        if pooled.ndim != 2 or not np.isfinite(pooled).all():
            raise BackboneError(
                f"the {tower} embeddings of the {kind} in {folder} are not finite vectors: its weights are damaged, or "
                "it is no dual encoder such as CLIP, SigLIP or Chinese-CLIP"
            )
    if towers["image"].shape[1] != towers["text"].shape[1]:
        raise BackboneError(f"the {kind} in {folder} has embeddings of two lengths: it is no dual encoder such as CLIP")
    if np.array_equal(*towers["text"]):
        raise BackboneError(
            f"the {kind} in {folder} gives different texts the same embedding: its tokenizer is not that of the model"
        )


def _prepared(encoder: HuggingFaceEncoder, folder: Path) -> Any:
    """Return a wide and a high picture as the processor makes them, (2, 3, H, W)."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    pixels = [encoder.prepare_image(Image.fromarray(each)) for each in (noise[:60], noise[:, :60])]
    shapes = [each.shape for each in pixels]
    if shapes[0] != shapes[1] or len(shapes[0]) != 3:
        raise BackboneError(
            f"the image processor in {folder} makes {shapes[0]} numbers of a wide picture, {shapes[1]} of a high one: "
            "mmcli needs pictures of one size (3, height, width), so give a model that resizes or crops to a fixed one"
        )
    config = encoder.model.config
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    wanted = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if _has_fixed_positions(encoder.model) and size is not None and shapes[0][1:] != wanted:
        raise BackboneError(
            f"the image processor in {folder} is not that of its model: it makes pictures of "
            f"{shapes[0][1]} x {shapes[0][2]}, the model takes {wanted[0]} x {wanted[1]}: get preprocessor_config.json "
            "of this very model"
        )
    return np.stack(pixels)


def _has_fixed_positions(model: Any) -> bool:
    """Whether pictures of another size would be refused, or get the positions of other places."""
    interpolates = inspect.signature(model.get_image_features).parameters.get("interpolate_pos_encoding")
    return interpolates is not None and interpolates.default is False


def _check_ids(encoder: HuggingFaceEncoder, ids: list[list[int]], folder: Path) -> None:
    """Check that texts differ, and end with the token at which the model pools, if it has one."""
    model = encoder.model
    end = getattr(getattr(model, "text_model", None), "eos_token_id", None)
    takes_highest = model.config.model_type in _HIGHEST or (end == 2 and model.config.model_type in _HIGHEST_FOR_2)
    for row in ids if takes_highest or end is not None else ():
        pooled = max(row) if takes_highest else end
        if pooled not in row or row.index(pooled) != len(row) - 1:
            raise BackboneError(
                f"the tokenizer in {folder} is not that of its model: texts end with the token {row[-1]}, the model "
                f"looks for {'the highest' if takes_highest else end}"
            )
    if len({tuple(row) for row in ids}) < len(ids):
        raise BackboneError(f"the tokenizer in {folder} gives different texts the same tokens: its files are not whole")
