"""From images and texts to tensors: what the encoders share. Importing this module imports torch."""

from __future__ import annotations

import contextlib
import re
import threading
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ...cache.errors import BackboneError, MmcliError
from .base import MAX_TOKENS, Encoder
from .towers import entering

LONGEST_TEXT = 10_000  # characters
_MOST_THREADS = 8  # to prepare batches for an accelerator
_TURN = threading.Lock()


@contextlib.contextmanager
def enough_memory(device: str, batch_size: int | None) -> Iterator[None]:
    """Turn out-of-memory errors into a line of advice. ``batch_size`` None: the model itself does not fit."""
    try:
        yield
    except RuntimeError as error:  # only CUDA has a class of its own for this
        if not re.search("out of memory|can't allocate memory", str(error), re.IGNORECASE):
            raise
        advice = "the model: give a smaller model, or"
        if batch_size is not None:
            advice = f"a batch of {batch_size}: give a smaller --batch-size (featurize, finetune), or"
        raise MmcliError(f"{device} has not enough memory for {advice} --device cpu") from error


class TorchEncoder(Encoder):
    """An encoder that computes with torch on ``device`` in ``dtype``.

    ``prepare`` converts an RGB image to pixels, (3, H, W) float32. If ``pads_texts``, texts are padded to
    ``max_tokens``, and their states include the padding, because the model attends to it.
    """

    pads_texts = False
    max_tokens = MAX_TOKENS

    def __init__(self, tokenizer: Any, prepare: Any, device: str, dtype: str) -> None:
        self.tokenizer, self.prepare, self.device, self.dtype = tokenizer, prepare, device, dtype
        if device != "cpu":
            self.batch_size = 128
            self.cores = min(self.cores, _MOST_THREADS)  # each holds a batch of images

    @contextlib.contextmanager
    def workers(self) -> Iterator[Executor]:
        """Give a pool with one thread per core. On the CPU each computes alone; an accelerator serves them in turn."""
        threads = torch.get_num_threads()
        try:
            count = 1 if self.device == "cpu" else threads
            with ThreadPoolExecutor(self.cores, initializer=_compute_with, initargs=(count,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)  # for threads that start later

    def prepare_image(self, image: Image.Image) -> NDArray[np.float32]:
        """Prepare one RGB image exactly as the model's own processor does."""
        return self.prepare(image)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokenize with the model's own tokenizer; keep the end token of truncated texts."""
        texts = [text[:LONGEST_TEXT] for text in texts]  # tokenizing megabytes takes minutes, for 77 tokens
        ids = [list(row) for row in self.tokenizer(texts, verbose=False)["input_ids"]]
        truncated = [len(row) > self.max_tokens for row in ids]
        for index in np.flatnonzero(truncated).tolist():
            ids[index] = list(self.tokenizer(texts[index], truncation=True, max_length=self.max_tokens)["input_ids"])
        return ids, truncated

    def images_below(self, pixels: NDArray[np.float32], layers: int) -> NDArray[Any]:
        """Return the states that enter the last ``layers`` layers, (B, P, w), or feature maps, (B, channels, H, W)."""
        with self._turn(len(pixels)):
            states = entering(self.vision_layers()[-layers], lambda: self._run_images(pixels))
            return to_half(states) if self.dtype == "bfloat16" else to_float(states)

    def texts_below(self, ids: Sequence[Sequence[int]], layers: int) -> list[NDArray[Any]]:
        """Return the states that enter the last ``layers`` layers for B token lists, (L, w) each."""
        with self._turn(len(ids)):
            padded = self._pad(ids)
            states = entering(self.text_layers()[-layers], lambda: self._run_texts(*padded))
            return self._own(to_half(states) if self.dtype == "bfloat16" else to_float(states), ids)

    @abstractmethod
    def _run_images(self, pixels: NDArray[np.float32]) -> Any:
        """Return the output of the image tower for prepared images, (B, 3, H, W)."""

    @abstractmethod
    def _run_texts(self, padded: Tensor, mask: Tensor) -> Any:
        """Return the output of the text tower for padded token ids and their mask, each (B, L)."""

    @contextlib.contextmanager
    def _turn(self, batch_size: int) -> Iterator[None]:
        """Let one thread at a time use an accelerator."""
        with contextlib.nullcontext() if self.device == "cpu" else _TURN, enough_memory(self.device, batch_size):
            yield

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute without gradients, with autocast for bfloat16."""
        is_half = self.dtype == "bfloat16"
        with torch.inference_mode(), torch.autocast(self.device, torch.bfloat16, enabled=is_half):
            yield

    def _ready(self, model: Any) -> Any:
        """Return ``model`` on the device, in evaluation mode.

        For bfloat16, the weights of linear and convolution layers are cast once instead of in every call. Norms,
        embeddings and the residual stream stay in float32.
        """
        if self.dtype == "bfloat16":
            for module in model.modules():
                if isinstance(module, nn.Linear | nn.Conv2d):
                    module.to(torch.bfloat16)
        with enough_memory(self.device, None):
            return model.eval().to(self.device)

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Pad on the right to the longest row. Return ids and attention mask, each (B, L) int64."""
        length = self.max_tokens if self.pads_texts else max(len(row) for row in ids)
        padded = np.full((len(ids), length), self.tokenizer.pad_token_id, dtype=np.int64)
        mask = np.zeros((len(ids), length), dtype=np.int64)
        for index, row in enumerate(ids):
            padded[index, : len(row)] = row
            mask[index, : len(row)] = 1
        return torch.from_numpy(padded).to(self.device), torch.from_numpy(mask).to(self.device)

    def _own(self, states: NDArray[Any], ids: Sequence[Sequence[int]]) -> list[NDArray[Any]]:
        """Return the states of each text without its padding, unless the model attends to it."""
        if self.pads_texts:
            return list(states)
        return [state[: len(row)] for state, row in zip(states, ids, strict=True)]


def _compute_with(threads: int) -> None:
    """Make the calling thread compute with ``threads`` cores."""
    torch.get_num_threads()  # the first call in a thread copies the last number that any thread set
    torch.set_num_threads(threads)


def to_float(tensor: Tensor) -> NDArray[np.float32]:
    """Return ``tensor`` as a float32 array in main memory."""
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def to_half(tensor: Tensor) -> NDArray[np.float16]:
    """Return ``tensor`` as a float16 array in main memory. Finite numbers out of range become its limits."""
    limits = torch.finfo(torch.float16)
    clamped = torch.where(tensor.isinf(), tensor, tensor.clamp(limits.min, limits.max))
    array: NDArray[np.float16] = clamped.half().cpu().numpy()
    return array


@dataclass(frozen=True)
class Preparer:
    """Prepares one RGB image, bit for bit as an image processor of transformers (Pillow backend) does, in fewer steps.

    The processors resize with Pillow, crop, rescale and normalise, and copy the image to floats several times.
    Rescaling and normalising depend only on a pixel's value and channel, so a table of 256 values per channel, made by
    the processor itself, gives the same result in one step. Without a ``table``, (3, 256), because the processor does
    something else too, it is called for each image.
    """

    processor: Any
    settings: dict[str, Any]  # for each call of the processor
    size: dict[str, int]  # before cropping
    crop: dict[str, int] | None
    table: NDArray[np.float32] | None = None

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the model's input, (3, H, W) float32."""
        return self.processed(image) if self.table is None else self._looked_up(image, self.table)

    def processed(self, image: Image.Image, **settings: Any) -> NDArray[np.float32]:
        """Return the output of the processor itself, (3, H, W) float32."""
        # For an image three pixels high, the processor would mistake rows for channels.
        prepared = self.processor(
            image, return_tensors="np", input_data_format="channels_last", **self.settings, **settings
        )
        return np.asarray(prepared["pixel_values"][0], dtype=np.float32)

    def _looked_up(self, image: Image.Image, table: NDArray[np.float32]) -> NDArray[np.float32]:
        width, height = image.size
        if self.size.get("shortest_edge"):
            short = self.size["shortest_edge"]
            long = int(short * max(width, height) / min(width, height))
            width, height = (short, long) if width <= height else (long, short)
        else:
            width, height = self.size["width"], self.size["height"]
        image = image.resize((width, height), resample=self.processor.resample)
        if self.crop is not None:
            left, top = (width - self.crop["width"]) // 2, (height - self.crop["height"]) // 2
            image = image.crop((left, top, left + self.crop["width"], top + self.crop["height"]))
        values = np.asarray(image)
        pixels = np.empty((3, *values.shape[:2]), np.float32)
        for channel in range(3):
            np.take(table[channel], values[:, :, channel], out=pixels[channel], mode="clip")
        return pixels


def make_preparer(processor: Any, resize: int | None) -> Preparer:
    """Return a preparer, with a table if that gives the same bits as the processor on a few samples.

    ``resize`` is the short side in pixels before the centre crop; None: the processor's own.
    """
    size = dict(processor.size or {})
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    if resize is not None:
        if crop is None:
            raise BackboneError("this model's processor does not crop, so --resize has no effect: leave it out")
        if resize < crop["height"]:  # the processor would add a black frame
            raise BackboneError(
                f"--resize {resize} is less than the model's crop of {crop['height']} pixels: give {crop['height']} "
                "or more"
            )
        size = {"shortest_edge": resize}
    plain = Preparer(processor, {} if resize is None else {"size": size}, size, crop)
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    try:
        table = plain.processed(Image.fromarray(grey), do_resize=False, do_center_crop=False)
        if table.shape != (3, 1, 256):
            return plain
        quick = replace(plain, table=np.ascontiguousarray(table[:, 0]))
        is_same = all(np.array_equal(quick(sample), plain(sample)) for sample in _samples())
    except Exception:  # other processors raise any exception; they are then called for each image
        return plain
    return quick if is_same else plain


def _samples() -> list[Image.Image]:
    """Return a wide, a tall, a small and a square image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (301, 301, 3), dtype=np.uint8)
    return [Image.fromarray(noise[:height, :width]) for height, width in ((150, 301), (301, 131), (3, 5), (256, 256))]
