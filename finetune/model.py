"""A head together with the tops of the towers that are trained with it, and the rows that they look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..cache.features import Features
from ..featurize.backbones.towers import Top
from ..heads.model.head import Head
from ..heads.model.inputs import Batch, TokenBatch, token_batches
from ..heads.runs.checkpoint import tensors_of
from .states import StateBatch, States

_AT_ONCE = 64  # rows per batch in evaluation


@dataclass(frozen=True)
class StateRows:
    """What stage 2 looks at, n rows: features of the towers that stay frozen, and states of the others by tower."""

    features: Features
    states: dict[str, States]

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: NDArray[np.int64]) -> StateRows:
        """Return the rows numbered ``rows``, in that order."""
        return StateRows(self.features.take(rows), {tower: each.take(rows) for tower, each in self.states.items()})


class Finetuned(nn.Module):
    """A head on towers whose tops are trained with it, all in one precision: float32, or float64 in tests.

    Parameters
    ----------
    tops
        By tower (``text``, ``image``).
    head
        It sees the embeddings that the tops make, and those of the features for a tower without a top.
    """

    def __init__(self, tops: Mapping[str, Top], head: Head) -> None:
        super().__init__()
        self.tops = nn.ModuleDict(dict(tops))
        self.head = head

    def top(self, tower: str) -> Top:
        """Return the top of a tower."""
        found = self.tops[tower]
        assert isinstance(found, Top)
        return found

    @property
    def is_small(self) -> bool:
        """Whether steps are so little work that they are taken faster on one thread."""
        return not self.head.needs_tokens and all(self.top(tower).is_small for tower in self.tops)

    def unfrozen(self) -> list[nn.Parameter]:
        """Return the parameters of the backbone that are trained."""
        return [each for tower in self.tops for each in self.top(tower).unfrozen().values()]

    def changed(self) -> dict[str, Tensor]:
        """Return the weights of the backbone that are trained, in main memory, by their names in the whole model."""
        return {
            name: each.detach().cpu().clone()
            for tower in self.tops
            for name, each in self.top(tower).unfrozen().items()
        }

    @torch.no_grad()
    def load_changed(self, weights: Mapping[str, Tensor]) -> None:
        """Take what ``changed`` returned.

        Raises
        ------
        KeyError, ValueError
            The names, or the shape of one, are others.
        """
        mine = {name: each for tower in self.tops for name, each in self.top(tower).unfrozen().items()}
        if mine.keys() != weights.keys():
            raise KeyError(f"layers {', '.join(sorted(mine.keys() ^ weights.keys())[:3])} do not match")
        for name, each in mine.items():
            if each.shape != weights[name].shape:
                raise ValueError(f"{name} has the shape {tuple(weights[name].shape)}, not {tuple(each.shape)}")
            each.copy_(weights[name])

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return what is trained, in main memory: ``changed`` of the backbone, and ``head``."""
        head = {name: tensor.clone() for name, tensor in tensors_of(self.head).items()}
        return {"changed": self.changed(), "head": head}

    def load_weights(self, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take what ``weights`` returned."""
        self.load_changed(weights["changed"])
        self.head.load_state_dict(weights["head"])

    def n_parameters(self) -> int:
        """Count what is trained: the head and the unfrozen layers."""
        return self.head.n_parameters() + sum(each.numel() for each in self.unfrozen())

    def embedded(self, batch: Batch, states: Mapping[str, StateBatch]) -> Batch:
        """Return ``batch`` with what the tops make of ``states`` in the place of frozen embeddings and tokens."""
        for tower, each in states.items():
            if batch.tokens is None:
                pooled, tokens = self.top(tower).pooled(*each), None
            else:
                pooled, found = self.top(tower)(*each)
                tokens = _replaced(batch.tokens, tower, found, each.mask)
            image, text = (pooled, batch.text) if tower == "image" else (batch.image, pooled)
            batch = Batch(image, text, tokens)
        return batch

    def parts(self, batch: Batch, states: Mapping[str, StateBatch]) -> Tensor:
        """Return the logits of each MLP of the head, (k, b, C)."""
        return self.head.parts(self.head.standardised(self.embedded(batch, states)))

    def forward(self, batch: Batch, states: Mapping[str, StateBatch]) -> Tensor:
        """Return logits, (b, C)."""
        return self.parts(batch, states).mean(dim=0)


def _replaced(tokens: TokenBatch, tower: str, found: Tensor, mask: Tensor | None) -> TokenBatch:
    if tower == "image":
        return tokens._replace(image=found)
    assert mask is not None
    return tokens._replace(text=found, mask=mask.bool())


def state_batches(
    rows: StateRows, model: Finetuned, order: NDArray[np.int64], size: int, device: str
) -> Iterator[tuple[Batch, dict[str, StateBatch]]]:
    """Yield the rows numbered ``order``, ``size`` at a time."""
    features, dtype = rows.features, next(model.head.parameters()).dtype
    starts = range(0, len(order), size)
    tokens = token_batches(features, model.head.needs_tokens, order, size, device)
    for start, of_batch in zip(starts, tokens, strict=True):
        picked = order[start : start + size]
        image, text = (
            torch.from_numpy(array[picked]).to(device).to(dtype) for array in (features.image, features.text)
        )
        states = {tower: each.take(picked).load(model.top(tower).pad_id, device) for tower, each in rows.states.items()}
        yield Batch(image, text, of_batch), states


def predict_parts(model: Finetuned, rows: StateRows, device: str) -> Tensor:
    """Return the logits of each MLP, (k, n, C), of n rows; texts of like length are looked at together."""
    order = np.arange(len(rows))
    if "text" in rows.states:
        order = np.argsort(rows.states["text"].lengths(), kind="stable")
    model.eval()
    with torch.inference_mode():
        found = [model.parts(*each) for each in state_batches(rows, model, order, _AT_ONCE, device)]
    return torch.cat(found, dim=1)[:, torch.from_numpy(np.argsort(order)).to(device)]


def predict_logits(model: Finetuned, rows: StateRows, device: str) -> NDArray[np.float32]:
    """Return the logits, (n, C) float32, of n rows."""
    logits: NDArray[np.float32] = predict_parts(model, rows, device).mean(dim=0).float().cpu().numpy()
    return logits
