"""What the encoders share: tokens to tensors, precision, tensors to arrays. Importing this imports torch."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache.errors import BackboneError

LONGEST_TEXT = 10_000  # characters


def checked_resize(processor: Any, resize: int) -> int:
    """Return ``resize`` where the processor crops to no more than that after resizing the short side.

    Raises
    ------
    BackboneError
        It does not crop, or to more: the picture would get a black frame.
    """
    crop = processor.crop_size["height"] if getattr(processor, "do_center_crop", False) else None
    if crop is None:
        raise BackboneError("this model's processor does not crop, so --resize has no meaning for it: leave it out")
    if resize < crop:
        raise BackboneError(f"--resize {resize} is less than the {crop} pixels to which the model crops")
    return resize


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], list[bool]]:
    """Return token ids (at most ``max_tokens``, end token kept) and whether each text was truncated."""
    texts = [text[:LONGEST_TEXT] for text in texts]  # tokenizing megabytes for 77 tokens would take minutes
    ids = [list(row) for row in tokenizer(list(texts), verbose=False)["input_ids"]]
    truncated = [len(row) > max_tokens for row in ids]
    for index in np.flatnonzero(truncated).tolist():
        ids[index] = list(tokenizer(texts[index], truncation=True, max_length=max_tokens)["input_ids"])
    return ids, truncated


def pad(
    ids: Sequence[Sequence[int]], pad_id: int, device: str, full: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right to the longest row (or to ``full``); return ids and attention mask, each (B, L) int64."""
    length = full or max(len(row) for row in ids)
    padded = np.full((len(ids), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), length), dtype=np.int64)
    for index, row in enumerate(ids):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(padded).to(device), torch.from_numpy(mask).to(device)


def low_precision(model: Any, dtype: str) -> Any:
    """Store the weights of matrix products in bfloat16, once, instead of casting them in every call.

    Layer norms and embeddings keep float32, and so does the residual stream.
    """
    if dtype == "bfloat16":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(torch.bfloat16)
    return model


@contextlib.contextmanager
def computing(device: str, dtype: str) -> Iterator[None]:
    """No gradients, and bfloat16 autocast where asked for."""
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def to_float(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Return ``tensor`` as a float32 array in main memory."""
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def to_half(tensor: torch.Tensor) -> NDArray[np.float16]:
    """Return ``tensor`` as a float16 array in main memory."""
    array: NDArray[np.float16] = tensor.half().cpu().numpy()
    return array
