"""The head: embeddings to logits. And several heads as one."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...cache.errors import MmcliError
from ...cache.features import Features
from ...featurize.backbones.towers import Top
from ..recipe import Recipe
from .attention import CrossAttention
from .fusions import FUSIONS, Sizes, fusion_class
from .inputs import Batch, TokenBatch, batches

_SMALL, _HARDLY = 1e-20, 1e-2  # of a variance, and of a deviation beside its mean, below which float32 is too coarse
_NOISE = 4 * torch.finfo(torch.float32).eps  # a deviation of this share of the mean is a rounding error


VIT_B32 = Sizes(512, 512, 768, 512)


def sizes_of(features: Features) -> Sizes:
    """Return the lengths of embeddings and the widths of token states."""
    image_tokens, text_tokens = (0, 0) if features.tokens is None else features.tokens.widths
    return Sizes(features.image.shape[1], features.text.shape[1], image_tokens, text_tokens)


def inverse_deviation(deviation: Tensor, mean: Tensor) -> Tensor:
    """Return 1 / deviation, and 0 for a constant column: it carries nothing, and must not become noise.

    A column is constant where its deviation is a rounding error of its mean, whatever its scale; scikit-learn's
    ``StandardScaler`` has the same rule for numbers in float64, and these were float32.

    Parameters
    ----------
    deviation, mean
        (d,) float64 each.
    """
    return torch.where(deviation > _NOISE * mean.abs(), 1 / deviation, torch.zeros_like(deviation))


def is_common(variance: Tensor) -> Tensor:
    """Return which variances float32 can hold with room to spare."""
    return (variance > _SMALL) & (variance < 1 / _SMALL)


def moments_of(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each column of rows (n, d), (d,) float64 each.

    float32 is exact enough for columns of common size that vary. Others are computed in float64: very small and very
    large ones, and those that hardly vary beside their mean.
    """
    mean, variance = (each.cpu().double() for each in (rows.mean(dim=0), rows.var(dim=0, correction=0)))
    common = is_common(variance) & (variance.sqrt() > _HARDLY * mean.abs())
    if not bool(common.all()):
        exact = rows[:, (~common).to(rows.device)].cpu().double()
        mean[~common], variance[~common] = exact.mean(dim=0), exact.var(dim=0, correction=0)
    return mean, variance


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

    def learn(self, rows: Iterable[Tensor]) -> None:
        """Take mean and deviation from the training rows, some of them, (n, d), at a time.

        As in Chan, Golub and LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
        """
        count, mean, squares = 0, *torch.zeros(2, len(self.mean), dtype=torch.float64)
        for some in rows:
            if not len(some):
                continue
            unit = self._unit(some)
            here, variance = moments_of(unit)
            apart, total = here - mean, count + len(unit)
            squares = squares + variance * len(unit) + apart.square() * (count * len(unit) / total)
            mean = mean + apart * (len(unit) / total)
            count = total
        self.mean = mean.to(self.mean)
        variance = squares / max(count, 1)
        deviation = torch.where(is_common(variance), variance.to(self.mean).sqrt().double(), variance.sqrt())
        self.scale = inverse_deviation(deviation, mean).to(self.mean)

    def forward(self, rows: Tensor) -> Tensor:
        """Return standardised rows, (n, d) float32."""
        return (self._unit(rows) - self.mean) * self.scale


class Dropout(nn.Module):
    """Dropout as in ``nn.Dropout``, from uniform numbers, which cost a quarter of PyTorch's Bernoulli on a CPU."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, rows: Tensor) -> Tensor:
        """Return rows with a share of the numbers set to 0 and the others scaled up, in training; else as they are."""
        if not self.training or self.share == 0:
            return rows
        return rows * (torch.rand_like(rows) >= self.share).to(rows.dtype).mul_(1 / (1 - self.share))


class Head(nn.Module):
    """Standardised embeddings, a fusion, and for each of its outputs an MLP [in, 256, 64, C].

    Hidden layers have BatchNorm, ReLU and dropout. The logits are the mean over the MLPs, of which only late fusion has
    more than one. A single-modality head sees its own embedding only, in training and in evaluation.

    Parameters
    ----------
    sizes
        Lengths of embeddings.
    n_classes
        C.
    recipe
        Its ``fusion``, ``modality``, ``head``, ``hidden``, ``dropout`` and ``normalize`` are looked at.

    Attributes
    ----------
    tops
        By tower (``text``, ``image``), the last layers of the backbone that are trained with the head in stage 2; none
        in stage 1. A tower with a top gives its embedding from ``Batch.states``.
    """

    def __init__(self, sizes: Sizes, n_classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.sizes, self.n_classes = sizes, n_classes
        self.fusion = fusion_class(recipe.fusion, recipe.modality)(sizes)
        self.image_input = None if recipe.modality == "text" else Standardise(sizes.image, recipe.normalize)
        self.text_input = None if recipe.modality == "image" else Standardise(sizes.text, recipe.normalize)
        hidden = recipe.hidden if recipe.head == "mlp" else ()
        self.mlps = nn.ModuleList(_mlp(width, hidden, n_classes, recipe.dropout) for width in self.fusion.out_sizes)
        self.tops = nn.ModuleDict()

    def top(self, tower: str) -> Top:
        """Return the last layers of a tower."""
        top = self.tops[tower]
        assert isinstance(top, Top)
        return top

    def attach(self, tops: Mapping[str, Top], changed: Mapping[str, Tensor] | None = None) -> None:
        """Go on from copies of the last layers of towers, with the weights in ``changed`` by their names.

        Raises
        ------
        KeyError, ValueError
            Names or shapes in ``changed`` are not those of the layers.
        """
        for tower, top in tops.items():
            self.tops[tower] = copy.deepcopy(top)
        if changed is not None:
            self.load_changed(changed)

    @property
    def is_small(self) -> bool:
        """Whether a step is so little work that one thread takes it faster than several."""
        return not self.tops or (not self.needs_tokens and all(self.top(tower).is_small for tower in self.tops))

    def unfrozen(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the backbone that are trained, by their names in the whole model."""
        return {name: weight for tower in self.tops for name, weight in self.top(tower).unfrozen().items()}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the head itself, by name."""
        return {name: weight for name, weight in self.named_parameters() if not name.startswith("tops.")}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return copies in main memory of what was learned: ``head``, and ``changed`` (layers of the backbone)."""
        return {
            "head": {name: tensor.clone() for name, tensor in tensors_of(self).items()},
            "changed": {name: weight.detach().cpu().clone() for name, weight in self.unfrozen().items()},
        }

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what ``weights`` returned.

        Raises
        ------
        KeyError, ValueError
            Names or shapes do not match.
        """
        self.load_changed(weights["changed"])
        mine = self.state_dict()
        if {name for name in mine if not name.startswith("tops.")} != weights["head"].keys():
            raise KeyError("the tensors of the head do not match")
        self.load_state_dict(weights["head"], strict=False)

    @torch.no_grad()
    def load_changed(self, changed: Mapping[str, Tensor]) -> None:
        """Take the weights of layers of the backbone that ``weights`` returned as ``changed``."""
        mine = self.unfrozen()
        if mine.keys() != changed.keys():
            raise KeyError(f"layers {', '.join(sorted(mine.keys() ^ changed.keys())[:3])} do not match")
        for name, weight in mine.items():
            if weight.shape != changed[name].shape:
                raise ValueError(f"{name} has the shape {tuple(changed[name].shape)}, not {tuple(weight.shape)}")
            weight.copy_(changed[name])

    @property
    def needs_tokens(self) -> bool:
        """Whether the head looks at token states."""
        return self.fusion.needs_tokens

    def learn_inputs(self, features: Features) -> None:
        """Take the standardisation from the training rows."""
        device = str(next(self.parameters()).device)
        ordered, _ = replace(features, states={}).in_fast_order()
        for module, side in ((self.image_input, "image"), (self.text_input, "text")):
            if module is not None:
                module.learn(getattr(batch, side) for batch in batches(ordered, False, device))
        if self.needs_tokens:
            attention = self.fusion.attention
            assert isinstance(attention, CrossAttention)
            attention.learn_inputs(*_token_moments(features))

    def embedded(self, batch: Batch) -> Batch:
        """Return ``batch`` with the embeddings and tokens that the tops compute in place of the frozen ones."""
        for tower in self.tops:
            top, (states, ids, mask) = self.top(tower), batch.states[tower]
            if ids is not None and mask is not None:
                ids = ids.masked_fill(mask == 0, top.pad_id)
            if batch.tokens is None:
                pooled, tokens = top.pooled(states, ids, mask), None
            else:
                pooled, hidden = top(states, ids, mask)
                tokens = _replaced(batch.tokens, tower, hidden, mask)
            image, text = (pooled, batch.text) if tower == "image" else (batch.image, pooled)
            batch = Batch(image, text, tokens, batch.states)
        return batch

    def standardised(self, batch: Batch) -> Batch:
        """Return what the fusion sees; an input that the head does not use is returned as it is."""
        batch = self.embedded(batch)
        return Batch(
            batch.image if self.image_input is None else self.image_input(batch.image),
            batch.text if self.text_input is None else self.text_input(batch.text),
            batch.tokens,
        )

    def each(self, batch: Batch) -> list[Tensor]:
        """Return the logits of each MLP, (n, C), of standardised inputs."""
        return [mlp(seen) for mlp, seen in zip(self.mlps, self.fusion(batch), strict=True)]

    def parts(self, batch: Batch) -> Tensor:
        """Return the logits of each MLP, (k, n, C), of standardised inputs."""
        return torch.stack(self.each(batch))

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (n, C), of raw embeddings."""
        return self.parts(self.standardised(batch)).mean(dim=0)

    def n_parameters(self) -> int:
        """Count the trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def _replaced(tokens: TokenBatch, tower: str, hidden: Tensor, mask: Tensor | None) -> TokenBatch:
    if tower == "image":
        return tokens._replace(image=hidden)
    assert mask is not None
    return tokens._replace(text=hidden, mask=mask.bool())


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a head, or of several, in main memory, without the layers of the backbone."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items() if "tops." not in name}


def _mlp(width: int, hidden: Sequence[int], n_classes: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU(), Dropout(dropout)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, n_classes))


def _token_moments(features: Features) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (mean, 1 / deviation) over all text tokens and over all image tokens, each (w,) float32."""
    sums: list[list[Tensor]] = [[], []]
    counts = [0, 0]
    for batch in batches(features, True, "cpu"):  # in float64, which not every device has
        tokens = batch.tokens
        assert isinstance(tokens, TokenBatch)
        for side, rows in enumerate((tokens.text[tokens.mask], tokens.image.flatten(0, 1))):
            exact = rows.double()
            found = [exact.sum(dim=0), exact.square().sum(dim=0)]
            sums[side] = [one + two for one, two in zip(sums[side], found, strict=True)] if sums[side] else found
            counts[side] += len(rows)
    moments = []
    for (total, squares), count in zip(sums, counts, strict=True):
        mean = total / max(count, 1)
        variance = (squares / max(count, 1) - mean.square()).clamp_min(0)
        moments.append((mean.float(), inverse_deviation(variance.sqrt(), mean).float()))
    return moments[0], moments[1]


class Ensemble(nn.Module):
    """One head, or several that differ in their seed and vote with the mean of their probabilities.

    Attributes
    ----------
    heads
        One or more.
    offsets
        (C,), added to the logits; zeros unless they were fitted on validation rows.
    """

    offsets: Tensor

    def __init__(self, heads: Sequence[Head], n_classes: int) -> None:
        super().__init__()
        if not heads:
            raise MmcliError("an ensemble needs at least one head")
        self.heads = nn.ModuleList(heads)
        self.register_buffer("offsets", torch.zeros(n_classes))

    @property
    def needs_tokens(self) -> bool:
        """Whether the heads look at token states."""
        return bool(self.heads[0].needs_tokens)

    @property
    def tops(self) -> nn.ModuleDict:
        """The last layers of the backbone that belong to the first head; every head has its own."""
        tops = self.heads[0].tops
        assert isinstance(tops, nn.ModuleDict)
        return tops

    @property
    def is_small(self) -> bool:
        """Whether one thread predicts faster than several."""
        return bool(self.heads[0].is_small)

    def forward(self, batch: Batch) -> Tensor:
        """Return logits, (n, C): of several heads, the log of their mean probabilities."""
        return self.combined([head(batch) for head in self.heads])

    def combined(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the logits of the whole, (n, C), of those of each head, (n, C)."""
        if len(logits) == 1:
            return logits[0] + self.offsets
        each = torch.stack([torch.log_softmax(one, dim=1) for one in logits])
        return torch.logsumexp(each, dim=0) - torch.log(torch.tensor(float(len(logits)))) + self.offsets

    def n_parameters(self) -> int:
        """Count the trainable parameters of all heads."""
        return sum(head.n_parameters() for head in self.heads if isinstance(head, Head))


def describe_fusions(sizes: Sizes, n_classes: int) -> list[dict[str, Any]]:
    """Return name, formula, source, whether token states are needed, and counted parameters of each fusion's head.

    Parameters are None where ``sizes`` has no token states for a fusion that needs them, and those of the linear head
    where the fusion has weights of its own.
    """
    listed = []
    for name, each in FUSIONS.items():
        can_be = bool(sizes.image_tokens) or not each.needs_tokens
        possible = {"mlp": can_be, "linear": can_be and not each.has_weights}
        counted = {
            kind: Head(sizes, n_classes, Recipe(fusion=name, head=kind)).n_parameters() if can else None
            for kind, can in possible.items()
        }
        about = {"name": name, "formula": each.formula, "source": each.source, "needs_tokens": each.needs_tokens}
        listed.append(about | {"parameters": counted["mlp"], "parameters_linear": counted["linear"]})
    return listed
