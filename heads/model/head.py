"""The head, which turns embeddings into logits, the ensemble of several heads, and their logits for many rows."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.errors import MmcliError
from ...cache.features import Features
from ...featurize.backbones.towers import Top
from ..recipe import Recipe
from .fusions import FUSIONS, Fusion, Sizes, fusion_class
from .inputs import Batch, Rows, Standardise, batches

VIT_B32 = Sizes(512, 512, 768, 512)


def sizes_of(features: Features) -> Sizes:
    """Return the lengths of embeddings and the widths of token states."""
    image_tokens, text_tokens = (0, 0) if features.tokens is None else features.tokens.widths
    return Sizes(features.image.shape[1], features.text.shape[1], image_tokens, text_tokens)


class Dropout(nn.Module):
    """Dropout as in ``nn.Dropout``, from uniform numbers, which cost a quarter of PyTorch's Bernoulli on a CPU."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, rows: Tensor) -> Tensor:
        """Set a share of the numbers to 0 and scale up the others in training; return rows unchanged in evaluation."""
        if not self.training or self.share == 0:
            return rows
        return rows * (torch.rand_like(rows) >= self.share).to(rows.dtype).mul_(1 / (1 - self.share))


class Head(nn.Module):
    """Standardise embeddings, fuse them, and map each output of the fusion to logits with an MLP [in, 256, 64, C].

    Hidden layers have BatchNorm, ReLU and dropout. The logits are the mean over the MLPs; only late fusion has more
    than one MLP. A single-modality head sees only its own embedding, in training and in evaluation.

    Parameters
    ----------
    sizes
        Lengths of embeddings.
    n_classes
        C.
    recipe
        The head takes ``fusion``, ``modality``, ``head``, ``hidden``, ``dropout`` and ``normalize`` from it.

    Attributes
    ----------
    tops
        By tower (``text``, ``image``), the last layers of the backbone, which stage 2 trains with the head; empty in
        stage 1. The embedding of a tower with a top is computed from ``Batch.states``.
    """

    def __init__(self, sizes: Sizes, n_classes: int, recipe: Recipe) -> None:
        super().__init__()
        self.sizes, self.n_classes = sizes, n_classes
        self.fusion: Fusion = fusion_class(recipe.fusion, recipe.modality)(sizes)
        self.image_input = Standardise(sizes.image, recipe.normalize) if recipe.modality != "text" else nn.Identity()
        self.text_input = Standardise(sizes.text, recipe.normalize) if recipe.modality != "image" else nn.Identity()
        hidden = recipe.hidden if recipe.head == "mlp" else ()
        self.mlps = nn.ModuleList(_mlp(width, hidden, n_classes, recipe.dropout) for width in self.fusion.out_sizes)
        self.tops = nn.ModuleDict()

    def top(self, tower: str) -> Top:
        """Return the last layers of a tower."""
        return cast(Top, self.tops[tower])

    def attach(self, tops: Mapping[str, Top], changed: Mapping[str, Tensor] | None = None) -> None:
        """Attach copies of the last layers of towers, and load ``changed`` into them (see ``load_changed``)."""
        self.tops.update({tower: copy.deepcopy(top) for tower, top in tops.items()})
        if changed is not None:
            self.load_changed(changed)

    @property
    def is_small(self) -> bool:
        """Whether a step is so little work that one thread is faster than several."""
        return not self.tops or (not self.needs_tokens and all(self.top(tower).is_small for tower in self.tops))

    def unfrozen(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the backbone that are trained, by their names in the whole model."""
        return {name: weight for tower in self.tops for name, weight in self.top(tower).unfrozen().items()}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return copies of the learned weights in main memory: ``head``, and ``changed`` (layers of the backbone)."""
        return {
            "head": {name: tensor.clone() for name, tensor in tensors_of(self).items()},
            "changed": {name: weight.detach().cpu().clone() for name, weight in self.unfrozen().items()},
        }

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Load what ``weights`` returned; raise a KeyError or ValueError where names or shapes do not match."""
        self.load_changed(weights["changed"])
        if {name for name in self.state_dict() if not name.startswith("tops.")} != weights["head"].keys():
            raise KeyError("the tensors of the head do not match")
        self.load_state_dict(weights["head"], strict=False)

    @torch.no_grad()
    def load_changed(self, changed: Mapping[str, Tensor]) -> None:
        """Load the layers of the backbone that ``weights`` returned as ``changed``, with its errors."""
        unfrozen = self.unfrozen()
        if unfrozen.keys() != changed.keys():
            raise KeyError(f"layers {', '.join(sorted(unfrozen.keys() ^ changed.keys())[:3])} do not match")
        for name, weight in unfrozen.items():
            if weight.shape != changed[name].shape:
                raise ValueError(f"{name} has the shape {tuple(changed[name].shape)}, not {tuple(weight.shape)}")
            weight.copy_(changed[name])

    @property
    def needs_tokens(self) -> bool:
        """Whether the head reads token states."""
        return self.fusion.needs_tokens

    def learn_inputs(self, features: Features) -> None:
        """Learn the standardisation from the training rows."""
        device = str(next(self.parameters()).device)
        ordered, _ = replace(features, states={}).in_fast_order()
        for module, side in ((self.image_input, "image"), (self.text_input, "text")):
            if isinstance(module, Standardise):
                module.learn(getattr(batch, side) for batch in batches(ordered, False, device))
        self.fusion.learn_inputs(features)

    def embedded(self, batch: Batch) -> Batch:
        """Replace the frozen embeddings and tokens in ``batch`` by those that the tops compute."""
        for tower in self.tops:
            top, (states, ids, mask) = self.top(tower), batch.states[tower]
            if ids is not None and mask is not None:
                ids = ids.masked_fill(mask == 0, top.pad_id)
            if batch.tokens is None:
                pooled, tokens = top.pooled(states, ids, mask), None
            else:
                pooled, hidden = top(states, ids, mask)
                if tower == "image":
                    tokens = batch.tokens._replace(image=hidden)
                else:
                    assert mask is not None
                    tokens = batch.tokens._replace(text=hidden, mask=mask.bool())
            image, text = (pooled, batch.text) if tower == "image" else (batch.image, pooled)
            batch = Batch(image, text, tokens, batch.states)
        return batch

    def standardised(self, batch: Batch) -> Batch:
        """Return what the fusion sees; inputs that the head does not use are returned unchanged."""
        batch = self.embedded(batch)
        return Batch(self.image_input(batch.image), self.text_input(batch.text), batch.tokens)

    def parts(self, batch: Batch) -> Tensor:
        """Return the logits of all k MLPs for standardised inputs, (k, n, C)."""
        return torch.stack([mlp(fused) for mlp, fused in zip(self.mlps, self.fusion(batch), strict=True)])

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits for raw embeddings, (n, C)."""
        return self.parts(self.standardised(batch)).mean(dim=0)

    def n_parameters(self) -> int:
        """Count the trainable parameters."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a head or an ensemble in main memory, without the layers of the backbone."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items() if "tops." not in name}


def _mlp(width: int, hidden: Sequence[int], n_classes: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(width, size), nn.BatchNorm1d(size), nn.ReLU(), Dropout(dropout)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, n_classes))


class Ensemble(nn.Module):
    """Average the probabilities of one or more heads, which differ in their seed.

    ``offsets``, (C,), are added to the logits; they are zeros unless fitted on validation rows.
    """

    offsets: Tensor

    def __init__(self, heads: Sequence[Head], n_classes: int) -> None:
        super().__init__()
        if not heads:
            raise MmcliError("an ensemble needs at least one head")
        self.heads = nn.ModuleList(heads)
        self.register_buffer("offsets", torch.zeros(n_classes, device=next(heads[0].parameters()).device))

    @property
    def needs_tokens(self) -> bool:
        """Whether the heads read token states."""
        return bool(self.heads[0].needs_tokens)

    @property
    def tops(self) -> nn.ModuleDict:
        """The last layers of the backbone in the first head; every head has its own copy."""
        return cast(nn.ModuleDict, self.heads[0].tops)

    @property
    def is_small(self) -> bool:
        """Whether one thread predicts faster than several."""
        return bool(self.heads[0].is_small)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits, (n, C): several heads give the log of their mean probabilities."""
        logits = [head(batch) for head in self.heads]
        if len(logits) == 1:
            return logits[0] + self.offsets
        log_probs = torch.stack([torch.log_softmax(head_logits, dim=1) for head_logits in logits])
        return torch.logsumexp(log_probs, dim=0) - torch.log(torch.tensor(float(len(logits)))) + self.offsets

    def n_parameters(self) -> int:
        """Count the trainable parameters of all heads."""
        return sum(head.n_parameters() for head in self.heads if isinstance(head, Head))


@contextlib.contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Compute on one thread: small matrices gain nothing from several, and waiting for a busy core costs ten times.

    This also makes a head the same to the bit in a process of its own as among others.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def predict_logits(head: Head | Ensemble, features: Features) -> NDArray[np.float32]:
    """Return the logits of n pairs, (n, C) float32; a head without ``tops`` ignores the states of towers."""
    with one_thread(head.is_small), torch.inference_mode():
        logits: NDArray[np.float32] = _by_batch(head, features, head).float().cpu().numpy()
    return logits


def predicted_classes(head: Head | Ensemble, rows: Rows) -> NDArray[np.int64]:
    """Return the number of the predicted class of each row, (n,)."""
    return predict_logits(head, rows.features).argmax(axis=1)


def predict_parts(head: Head, features: Features) -> Tensor:
    """Return the logits of each of the k MLPs of a head, (k, n, C), for n pairs."""
    with torch.inference_mode():
        parts = _by_batch(head, features, lambda batch: head.parts(head.standardised(batch)).transpose(0, 1))
        return parts.transpose(0, 1)


def _by_batch(head: Head | Ensemble, features: Features, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Return the results of ``compute`` for all rows, (n, ...), in the order of ``features``."""
    device = str(next(head.parameters()).device)
    if not head.tops:
        features = replace(features, states={})
    ordered, back = features.in_fast_order()
    results, start = torch.empty(0), 0
    for batch in batches(ordered, head.needs_tokens, device):
        computed = compute(batch)
        if start == 0:  # one allocation, because small results between large ones would fragment the memory
            results = computed.new_empty((len(features), *computed.shape[1:]))
        results[start : start + len(computed)] = computed
        start += len(computed)
    return results if back is None else results[torch.from_numpy(back).to(device)]


def describe_fusions(sizes: Sizes, n_classes: int) -> list[dict[str, Any]]:
    """Return name, formula, source, need of token states, and numbers of parameters for each fusion.

    ``parameters`` is None where the fusion needs token states and ``sizes`` has none; ``parameters_linear`` is None
    also where the fusion has weights of its own, which a linear head cannot learn.
    """

    def count(name: str, kind: str) -> int | None:
        if FUSIONS[name].needs_tokens and not sizes.image_tokens:
            return None
        return Head(sizes, n_classes, Recipe(fusion=name, head=kind)).n_parameters()

    return [
        {
            "name": name,
            "formula": fusion.formula,
            "source": fusion.source,
            "needs_tokens": fusion.needs_tokens,
            "parameters": count(name, "mlp"),
            "parameters_linear": None if fusion.has_weights else count(name, "linear"),
        }
        for name, fusion in FUSIONS.items()
    ]
