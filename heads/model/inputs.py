"""Labelled rows, and batches of rows as tensors."""

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
    """Token states: image (b, P, w_i), text (b, L, w_t) and mask (b, L) bool; text is 0 where mask is False."""

    image: Tensor
    text: Tensor
    mask: Tensor


class StateBatch(NamedTuple):
    """States of b rows, float32: texts are (b, L, w), with ids and mask (b, L) int64; images are (b, ...)."""

    states: Tensor
    ids: Tensor | None = None
    mask: Tensor | None = None


class Batch(NamedTuple):
    """The inputs of a head for b pairs.

    Attributes
    ----------
    image, text
        Embeddings, (b, d) each.
    tokens
        Token states, where the head needs them.
    states
        The states that enter the unfrozen layers, by tower. The head computes the embedding of these towers from them.
    """

    image: Tensor
    text: Tensor
    tokens: TokenBatch | None = None
    states: Mapping[str, StateBatch] = MappingProxyType({})


@dataclass(frozen=True)
class Rows:
    """Features and class numbers, (n,) int64, of n pairs."""

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
    """Yield the token states of each batch of ``order``, or None for each batch where they are not wanted.

    Token states left in the file are read in file order, as many batches at once as the memory budget allows. This does
    not change the batches.
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
    """Yield all rows in order, in batches of 1024, or of 256 with token states, or of 64 with states of a tower."""
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
    """Convert half precision to float32; float64 stays float64."""
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def shuffled_blocks(features: Features, generator: torch.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of rows left in a file, in blocks that fit in memory; each row comes once.

    A block consists of stretches of the file, drawn at random. Each stretch is read in one go, so an epoch reads the
    file once.
    """
    assert features.places is not None
    order = np.argsort(features.places, kind="stable")
    stretches = np.split(order, range(_STRETCH_ROWS, len(order), _STRETCH_ROWS))
    drawn = torch.randperm(len(stretches), generator=generator).numpy()
    per_block = stretches_per_block(features)
    for start in range(0, len(drawn), per_block):
        yield np.concatenate([stretches[number] for number in np.sort(drawn[start : start + per_block])])


def stretches_per_block(features: Features) -> int:
    """Return how many stretches of a file are in memory at once."""
    return max(1, features.at_once // _STRETCH_ROWS)
