"""Standardising with the mean and deviation of the training rows: of embeddings, and of token states."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...cache.features import Features
from .inputs import batches

_SMALLEST_VARIANCE = 1e-20  # float32 is too coarse for smaller variances, and for those above its inverse
_SMALLEST_RATIO = 1e-2  # float32 is too coarse for a deviation that is smaller beside its mean
_NOISE = 4 * torch.finfo(torch.float32).eps  # a deviation of this share of the mean is a rounding error


class Standardise(nn.Module):
    """L2-normalise each row, then subtract the mean and divide by the deviation of the training rows.

    Parameters
    ----------
    size
        Length of a row.
    normalize
        Whether rows are L2-normalised first.
    """

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
        """Take mean and deviation from the training rows, which come in blocks of (n, d).

        As in Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
        """
        count, mean, squares = 0, *torch.zeros(2, len(self.mean), dtype=torch.float64)
        for block in blocks:
            if not len(block):
                continue
            unit = self._unit(block)
            block_mean, block_variance = _moments(unit)
            shift, total = block_mean - mean, count + len(unit)
            squares = squares + block_variance * len(unit) + shift.square() * (count * len(unit) / total)
            mean = mean + shift * (len(unit) / total)
            count = total
        self.mean = mean.to(self.mean)
        variance = squares / max(count, 1)
        deviation = torch.where(_is_common(variance), variance.to(self.mean).sqrt().double(), variance.sqrt())
        self.scale = _inverse_deviation(deviation, mean).to(self.mean)

    def forward(self, rows: Tensor) -> Tensor:
        """Return standardised rows, (n, d) float32."""
        return (self._unit(rows) - self.mean) * self.scale


def token_moments(features: Features) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (mean, 1 / deviation) over all text tokens, then over all image tokens, each (w,) float32."""
    image_width, text_width = (0, 0) if features.tokens is None else features.tokens.widths
    # On the CPU in float64, which some devices lack: a row for the sum and a row for the sum of squares.
    sums = [torch.zeros(2, width, dtype=torch.float64) for width in (text_width, image_width)]
    counts = [0, 0]
    for batch in batches(features, True, "cpu"):
        assert batch.tokens is not None
        for side, rows in enumerate((batch.tokens.text[batch.tokens.mask], batch.tokens.image.flatten(0, 1))):
            exact = rows.double()
            sums[side] += torch.stack([exact.sum(dim=0), exact.square().sum(dim=0)])
            counts[side] += len(rows)
    moments = []
    for (total, squares), count in zip(sums, counts, strict=True):
        mean = total / max(count, 1)
        variance = (squares / max(count, 1) - mean.square()).clamp_min(0)
        moments.append((mean.float(), _inverse_deviation(variance.sqrt(), mean).float()))
    return moments[0], moments[1]


def _inverse_deviation(deviation: Tensor, mean: Tensor) -> Tensor:
    """Return 1 / deviation, (d,) float64; 0 for a constant column, which carries nothing and must not become noise.

    A column is constant where its deviation is a rounding error of its mean, whatever its scale. scikit-learn's
    ``StandardScaler`` has this rule for float64; these numbers were float32.
    """
    return torch.where(deviation > _NOISE * mean.abs(), 1 / deviation, torch.zeros_like(deviation))


def _is_common(variance: Tensor) -> Tensor:
    """Return which variances float32 can hold with room to spare."""
    return (variance > _SMALLEST_VARIANCE) & (variance < 1 / _SMALLEST_VARIANCE)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each column of rows (n, d), (d,) float64 each.

    Most columns are computed in float32. Columns with a very small or very large variance, and columns that hardly
    vary beside their mean, are computed in float64.
    """
    mean, variance = (moment.cpu().double() for moment in (rows.mean(dim=0), rows.var(dim=0, correction=0)))
    common = _is_common(variance) & (variance.sqrt() > _SMALLEST_RATIO * mean.abs())
    if not bool(common.all()):
        exact = rows[:, (~common).to(rows.device)].cpu().double()
        mean[~common], variance[~common] = exact.mean(dim=0), exact.var(dim=0, correction=0)
    return mean, variance
