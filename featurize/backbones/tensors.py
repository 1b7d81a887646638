"""What the encoders share: tokens to tensors, precision, tensors to arrays. Importing this imports torch."""

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
from .base import Encoder

LONGEST_TEXT = 10_000  # characters
_MOST_THREADS = 8  # that prepare batches for an accelerator
_TURN = threading.Lock()

P = ParamSpec("P")
Result = TypeVar("Result")


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


def ready(model: Any, device: str, dtype: str) -> Any:
    """Return ``model`` on the device, in evaluation mode, with the weights of matrix products as they are computed in.

    In bfloat16 they are cast once, not in every call. Layer norms and embeddings keep float32, and so does the residual
    stream.
    """
    if dtype == "bfloat16":
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                module.to(torch.bfloat16)
    with enough_memory(device, None):
        return model.eval().to(device)


@contextlib.contextmanager
def computing(device: str, dtype: str) -> Iterator[None]:
    """No gradients, and bfloat16 autocast where asked for."""
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        yield


def in_turn(method: "Callable[Concatenate[Any, P], Result]") -> "Callable[Concatenate[Any, P], Result]":
    """Let one thread at a time use an accelerator: for all of a method of a ``TorchEncoder`` that takes a batch."""

    @functools.wraps(method)
    def run(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        batch: Any = next(iter((*args, *kwargs.values())))
        turn = contextlib.nullcontext() if self.device == "cpu" else _TURN
        with turn, enough_memory(self.device, len(batch)):
            return method(self, *args, **kwargs)

    return run


@contextlib.contextmanager
def enough_memory(device: str, batch_size: int | None) -> Iterator[None]:
    """Turn PyTorch's errors of a device without room, for a batch or (None) for the model, into one line of advice."""
    try:
        yield
    except RuntimeError as error:  # CUDA has a class of its own; MPS and the CPU say it in words
        if not re.search("out of memory|can't allocate memory", str(error), re.IGNORECASE):
            raise
        smaller = f"a batch of {batch_size}: give a smaller --batch-size (featurize, finetune), or"
        wanted = "the model: give a smaller one, or" if batch_size is None else smaller
        raise MmcliError(f"{device} has no room for {wanted} --device cpu") from error


class TorchEncoder(Encoder):
    """What encoders that compute with torch share: where, in which precision, and by how many threads."""

    def __init__(self, device: str, dtype: str) -> None:
        self.device = device
        self.dtype = dtype
        if device != "cpu":
            self.batch_size = 128
            self.cores = min(self.cores, _MOST_THREADS)  # each holds a batch of pictures

    @contextlib.contextmanager
    def workers(self) -> Iterator[Executor]:
        """Give one thread to each core: on the CPU each computes by itself, before an accelerator they queue."""
        threads = torch.get_num_threads()
        try:
            count = 1 if self.device == "cpu" else threads
            with ThreadPoolExecutor(self.cores, initializer=_compute_with, initargs=(count,)) as pool:
                yield pool
        finally:
            torch.set_num_threads(threads)  # of a thread that begins after this one


def _compute_with(threads: int) -> None:
    """Compute in the thread that calls with ``threads`` cores."""
    torch.get_num_threads()  # the first call in a thread takes the number from the thread that has set it last
    torch.set_num_threads(threads)


def to_device(array: NDArray[np.float32], device: str) -> torch.Tensor:
    """Return ``array`` on the device."""
    return torch.from_numpy(array).to(device)


def to_float(tensor: torch.Tensor) -> NDArray[np.float32]:
    """Return ``tensor`` as a float32 array in main memory."""
    array: NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def to_half(tensor: torch.Tensor) -> NDArray[np.float16]:
    """Return ``tensor`` as a float16 array in main memory; finite numbers beyond its range become its limit."""
    limits = torch.finfo(torch.float16)
    within = torch.where(tensor.isinf(), tensor, tensor.clamp(limits.min, limits.max))
    array: NDArray[np.float16] = within.half().cpu().numpy()
    return array
