"""Conversions and precision that the encoders share. Importing this module imports torch."""

import contextlib
import functools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ...cache.errors import MmcliError
from .base import Encoder, clip_to_range

LONGEST_TEXT = 10_000  # characters
_MOST_THREADS = 8  # to prepare batches for an accelerator
_TURN = threading.Lock()

P = ParamSpec("P")
Result = TypeVar("Result")


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[list[list[int]], list[bool]]:
    """Return token ids (at most ``max_tokens``, end token kept) and whether each text was truncated."""
    texts = [text[:LONGEST_TEXT] for text in texts]  # tokenizing megabytes takes minutes, for 77 tokens
    ids = [list(row) for row in tokenizer(list(texts), verbose=False)["input_ids"]]
    truncated = [len(row) > max_tokens for row in ids]
    for index in np.flatnonzero(truncated).tolist():
        ids[index] = list(tokenizer(texts[index], truncation=True, max_length=max_tokens)["input_ids"])
    return ids, truncated


def pad(
    ids: Sequence[Sequence[int]], pad_id: int, device: str, full: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad on the right to the longest row, or to ``full``. Return ids and attention mask, each (B, L) int64."""
    length = full or max(len(row) for row in ids)
    padded = np.full((len(ids), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(ids), length), dtype=np.int64)
    for index, row in enumerate(ids):
        padded[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return torch.from_numpy(padded).to(device), torch.from_numpy(mask).to(device)


def ready(model: Any, device: str, dtype: str) -> Any:
    """Return ``model`` on the device, in evaluation mode.

    For bfloat16, the weights of linear and convolution layers are cast once instead of in every call. Norms, embeddings
    and the residual stream stay in float32.
    """
    if dtype == "bfloat16":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(torch.bfloat16)
    with enough_memory(device, None):
        return model.eval().to(device)


@contextlib.contextmanager
def computing(device: str, dtype: str) -> Iterator[None]:
    """Compute without gradients, with autocast if ``dtype`` is bfloat16."""
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def in_turn(method: "Callable[Concatenate[Any, P], Result]") -> "Callable[Concatenate[Any, P], Result]":
    """Let one thread at a time use an accelerator. Decorates methods of ``TorchEncoder`` that take a batch first."""

    @functools.wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        batch: Any = next(iter((*args, *kwargs.values())))
        turn = contextlib.nullcontext() if self.device == "cpu" else _TURN
        with turn, enough_memory(self.device, len(batch)):
            return method(self, *args, **kwargs)

    return run


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
    """An encoder that computes with torch on ``device`` in ``dtype``."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device = device
        self.dtype = dtype
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


def _compute_with(threads: int) -> None:
    """Make the calling thread compute with ``threads`` cores."""
    torch.get_num_threads()  # the first call in a thread copies the last number that any thread set
    torch.set_num_threads(threads)


def to_device(array: NDArray[np.float32], device: str) -> torch.Tensor:
    """Return ``array`` on the device."""
    return torch.from_numpy(array).to(device)


def to_float(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Return ``tensor`` as a float32 array in main memory."""
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def to_half(tensor: torch.Tensor) -> NDArray[np.float16]:
    """Return ``tensor`` as a float16 array in main memory. Finite numbers out of range become its limits."""
    return clip_to_range(to_float(tensor), np.float16)
