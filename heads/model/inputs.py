"""Rows to learn from, and batches of them as tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.features import Features

_POOLED_ROWS, _TOKEN_ROWS, _STATE_ROWS = 1024, 256, 64  # per batch in evaluation
_STRETCH_ROWS = 1024


class TokenBatch(NamedTuple):
    """Token states: image (b, P, w_i), text (b, L, w_t), mask (b, L) bool, all zeros beyond a text's end."""

    image: Tensor
    text: Tensor
    mask: Tensor


class StateBatch(NamedTuple):
    """States of b rows, float32: (b, L, w) of texts, with token ids and mask, (b, L) int64; (b, ...) of images."""

    states: Tensor
    ids: Tensor | None = None
    mask: Tensor | None = None


class Batch(NamedTuple):
    """What a head sees of b pairs.

    Attributes
    ----------
    image, text
        Embeddings, (b, d) each.
    tokens
        Token states, where the head needs them.
    states
        By tower, what enters its unfrozen layers: the head computes the embedding of this tower from them.
    """

    image: Tensor
    text: Tensor
    tokens: TokenBatch | None = None
    states: Mapping[str, StateBatch] = MappingProxyType({})


@dataclass(frozen=True)
class Rows:
    """Features and class numbers, (n,) int64, of some pairs."""

    features: Features
    classes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, rows: NDArray[np.int64]) -> "Rows":
        """Return the rows numbered ``rows``, in that order."""
        return Rows(self.features.take(rows), self.classes[rows])


def token_batches(
    features: Features, wanted: bool, order: NDArray[np.int64], size: int, device: str
) -> Iterator[TokenBatch | None]:
    """Yield the token states of each batch of ``order``; None for each where they are not wanted.

    Where they are left in the file, as many batches as its memory budget allows are read at once, in file order. What
    is yielded is the same.
    """
    tokens = features.tokens if wanted else None
    if tokens is None:
        for _ in range(0, max(len(order), 1), size):
            yield None
        return
    block = max(1, tokens.at_once // size) * size
    for start in range(0, len(order), block):
        loaded = tokens.take(order[start : start + block]).load()
        for first in range(0, len(loaded), size):
            padded = loaded.take(np.arange(first, min(first + size, len(loaded)))).padded()
            yield TokenBatch(*(torch.from_numpy(array).to(device) for array in padded))


def state_batch(features: Features, rows: NDArray[np.int64], device: str) -> dict[str, StateBatch]:
    """Return the states of the rows numbered ``rows``, by tower."""
    batch = {}
    for tower, states in features.states.items():
        padded = states.take(rows).padded()
        text = (None if array is None else torch.from_numpy(array).to(device) for array in (padded.ids, padded.mask))
        batch[tower] = StateBatch(torch.from_numpy(padded.states).to(device), *text)
    return batch


def batches(features: Features, with_tokens: bool, device: str) -> Iterator[Batch]:
    """Yield all rows in order: thousands at a time, or hundreds with token states, or tens with states of a tower."""
    order = np.arange(len(features))
    size = _STATE_ROWS if features.states else _TOKEN_ROWS if with_tokens else _POOLED_ROWS
    starts = range(0, max(len(order), 1), size)
    for start, tokens in zip(starts, token_batches(features, with_tokens, order, size, device), strict=True):
        image, text = (
            at_least_float32(torch.from_numpy(array[start : start + size]).to(device))
            for array in (features.image, features.text)
        )
        yield Batch(image, text, tokens, state_batch(features, order[start : start + size], device))


def at_least_float32(rows: Tensor) -> Tensor:
    """Return numbers stored in half precision as float32; float64 stays."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def shuffled_blocks(features: Features, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of rows that are left in a file in blocks that fit in memory, each row once.

    A block is made of stretches of the file, drawn at random: each is read in one go, and an epoch reads the file once.
    """
    assert features.places is not None
    order = np.argsort(features.places, kind="stable")
    stretches = np.split(order, range(_STRETCH_ROWS, len(order), _STRETCH_ROWS))
    drawn = torch.randperm(len(stretches), generator=generator).numpy()
    per_block = stretches_per_block(features)
    for start in range(0, len(drawn), per_block):
        yield np.concatenate([stretches[each] for each in np.sort(drawn[start : start + per_block])])


def stretches_per_block(features: Features) -> int:
    """Return how many stretches of rows that are left in a file are in memory together."""
    return max(1, features.at_once // _STRETCH_ROWS)
