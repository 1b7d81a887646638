"""Inputs of a head: labelled rows, batches of rows as tensors, and their standardisation."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from ...cache.features import Features

_POOLED_ROWS, _TOKEN_ROWS, _STATE_ROWS = 1024, 256, 64  # per batch in evaluation

_SMALLEST_VARIANCE = 1e-20  # float32 is too coarse for smaller variances, and for those above its inverse
_SMALLEST_RATIO = 1e-2  # float32 is too coarse for a deviation that is smaller beside its mean
_NOISE = 4 * torch.finfo(torch.float32).eps  # a deviation of this share of the mean is a rounding error


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
    """The inputs of a head for b pairs: embeddings, (b, d) each, and where the head needs them token states.

    ``states`` enter the unfrozen layers, by tower. The head computes the embedding of these towers from them.
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


class Moments:
    """Mean and variance of the columns of rows that come in blocks, (d,) float64 each.

    As in Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self, width: int) -> None:
        self.count, self.dtype = 0, torch.float32
        self.mean, self.squares = torch.zeros(2, width, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Take account of rows, (n, d).

        Most columns of a block are computed in float32. Columns with a very small or very large variance, and columns
        that hardly vary beside their mean, are computed in float64.
        """
        if not len(rows):
            return
        mean, variance = (moment.cpu().double() for moment in (rows.mean(dim=0), rows.var(dim=0, correction=0)))
        common = _is_common(variance) & (variance.sqrt() > _SMALLEST_RATIO * mean.abs())
        if not bool(common.all()):
            exact = rows[:, (~common).to(rows.device)].cpu().double()
            mean[~common], variance[~common] = exact.mean(dim=0), exact.var(dim=0, correction=0)
        shift, total = mean - self.mean, self.count + len(rows)
        self.squares = self.squares + variance * len(rows) + shift.square() * (self.count * len(rows) / total)
        self.mean = self.mean + shift * (len(rows) / total)
        self.count, self.dtype = total, rows.dtype

    def mean_and_scale(self) -> tuple[Tensor, Tensor]:
        """Return mean and 1 / deviation; 0 for a constant column, which carries nothing and must not become noise.

        A column is constant where its deviation is a rounding error of its mean, whatever its scale. scikit-learn's
        ``StandardScaler`` has this rule for float64; these numbers were float32.
        """
        variance = self.squares / max(self.count, 1)
        deviation = torch.where(_is_common(variance), variance.to(self.dtype).sqrt().double(), variance.sqrt())
        return self.mean, torch.where(deviation > _NOISE * self.mean.abs(), 1 / deviation, torch.zeros_like(deviation))


def _is_common(variance: Tensor) -> Tensor:
    """Return which variances float32 can hold with room to spare."""
    return (variance > _SMALLEST_VARIANCE) & (variance < 1 / _SMALLEST_VARIANCE)


class Standardise(nn.Module):
    """L2-normalise each row (if ``normalize``), subtract the mean and divide by the deviation of the training rows."""

    mean: Tensor
    scale: Tensor

    def __init__(self, size: int, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def _unit(self, rows: Tensor) -> Tensor:
        rows = rows.to(self.mean.dtype)
        return functional.normalize(rows) if self.normalize else rows

    def learn(self, blocks: Iterable[Tensor]) -> None:
        """Take mean and deviation from the training rows, which come in blocks of (n, d)."""
        moments = Moments(len(self.mean))
        for block in blocks:
            moments.add(self._unit(block))
        mean, scale = moments.mean_and_scale()
        self.mean, self.scale = mean.to(self.mean), scale.to(self.scale)

    def forward(self, rows: Tensor) -> Tensor:
        """Return standardised rows, (n, d) float32."""
        return (self._unit(rows) - self.mean) * self.scale
