"""The top of a tower, cut off so that it can be trained. Importing this imports torch.

A tower is cut below its first unfrozen layer. What enters that layer is a constant of each text or image: it is
computed once (``entering``), and a ``Top`` goes on from there, by the model's own code.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.errors import BackboneError


class _Reached(Exception):  # noqa: N818 - not an error: the way out of a forward pass
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


_HOOKING = threading.Lock()
_stopping = threading.local()  # at: the layer before which this thread stops


def _stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if getattr(_stopping, "at", None) is layer:
        raise _Reached(args[0] if args else kwargs["hidden_states"])


def entering(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return the hidden states that enter ``layer`` when ``run`` runs the model; what is above is not computed.

    Several threads may do so at once: the hook stays on the layer, and stops the thread that asked for it.
    """
    if not getattr(layer, "_can_stop", False):
        with _HOOKING:
            if not getattr(layer, "_can_stop", False):
                layer.register_forward_pre_hook(_stop, with_kwargs=True)
                layer._can_stop = True  # type: ignore[assignment]
    _stopping.at = layer
    try:
        run()
    except _Reached as reached:
        return reached.states
    finally:
        _stopping.at = None
    raise BackboneError("this model does not run its layers one after the other, so it cannot be cut between them")


class Given(nn.Module):
    """Stands for all that is below the cut: returns the states that it was given, whatever it is called with."""

    states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        """Return the states."""
        return self.states


class Top(nn.Module, ABC):
    """The unfrozen layers of a tower and all that follows them, in evaluation mode: no dropout, fixed statistics.

    Parameters
    ----------
    tower
        The model without what is below the cut. Its parameters have the names that they have in the whole model.
    unfrozen
        The modules of it that are trained: the layers, and the tower's last normalisation.
    pad_id
        Of a text tower, the token with which texts are padded.
    """

    def __init__(self, tower: nn.Module, unfrozen: Sequence[nn.Module], pad_id: int = 0) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.pad_id = pad_id
        for module in unfrozen:
            module.requires_grad_(True)

    @property
    def is_small(self) -> bool:
        """Whether ``pooled`` is so little work that a second thread would wait more than it would help."""
        return False

    def train(self, mode: bool = True) -> Top:
        """Stay in evaluation mode: what enters the layers was computed without dropout, too."""
        return super().train(False)

    def unfrozen(self) -> dict[str, nn.Parameter]:
        """Return the parameters that are trained, by their names in the whole model."""
        return {name: each for name, each in self.tower.named_parameters() if each.requires_grad}

    def run_from(self, states: Tensor, run: Callable[[], Any]) -> Any:
        """Return what ``run`` returns when the tower goes on from ``states``."""
        standing = [module for module in self.tower.modules() if isinstance(module, Given)]
        for module in standing:
            module.states = states
        try:
            return run()
        finally:
            for module in standing:
                module.states = None

    @abstractmethod
    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return pooled, projected embeddings, (b, d), and last hidden states, (b, L, w) or (b, P, w), float32.

        Parameters
        ----------
        states
            What enters the first unfrozen layer: (b, L, w) of texts, padded on the right; (b, ...) of images.
        ids, mask
            Token ids and attention mask of texts, (b, L) int64.
        """

    def pooled(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return the embeddings alone, which may cost less."""
        return self.forward(states, ids, mask)[0]


def check_layers(layers: Sequence[nn.Module], asked: int, tower: str) -> None:
    """Raise a BackboneError where more layers are asked for than ``tower`` has."""
    if not 1 <= asked <= len(layers):
        raise BackboneError(
            f"the {tower} tower of this backbone has {len(layers)} layers, {asked} are to be unfrozen: ask for at most "
            f"{len(layers)}"
        )


def freeze_unused(top: Top, entered: NDArray[np.float32], expected: NDArray[np.float32], *text: Tensor) -> Top:
    """Return ``top`` with what it does not use frozen, after a step forward and back on one sample.

    Parameters
    ----------
    top
        In float32.
    entered, expected
        What enters its first layer, and the embedding, (1, d), that the whole tower gives.
    text
        Token ids and mask, (1, L), of a text.

    Raises
    ------
    BackboneError
        ``top`` does not run, or gives another embedding: the tower is not built as ``cut`` takes it to be.
    """
    device = next(top.parameters()).device
    cannot = f"a tower of this {type(top.tower).__name__} cannot be cut, so none of its layers can be unfrozen"
    try:
        pooled, states = top(torch.from_numpy(entered).to(device), *text)
        (pooled.sum() + states.sum()).backward()
    except Exception as error:  # whatever a model raises that looks for what is below the cut
        raise BackboneError(f"{cannot} ({error})") from error
    for each in top.parameters():
        each.requires_grad_(each.grad is not None)
        each.grad = None
    difference = np.abs(pooled.detach().cpu().numpy() - expected).max()
    if not difference <= 1e-2 * np.abs(expected).max():
        raise BackboneError(f"{cannot} (it would give other embeddings)")
    return top


def upper(layers: Sequence[nn.Module], count: int) -> nn.ModuleList:
    """Return the last ``count`` layers under the numbers that they have in the whole tower."""
    kept = nn.ModuleList()
    for number in range(len(layers) - count, len(layers)):
        kept.add_module(str(number), layers[number])
    return kept


def with_children(module: nn.Module, **children: nn.Module | None) -> nn.Module:
    """Return a shallow copy of ``module`` with other children; the parameters are those of ``module``."""
    made = copy.copy(module)
    made._modules = {**module._modules, **children}
    return made


def layers_of(model: Any, tower: str) -> list[nn.Module]:
    """Return the layers of a transformers tower, first to last.

    Raises
    ------
    BackboneError
        It has none that are known.
    """
    encoder = getattr(getattr(model, tower, None), "encoder", None)
    for name in ("layers", "layer"):  # layer: the BERT of Chinese-CLIP
        if hasattr(encoder, name):
            return list(getattr(encoder, name))
    raise BackboneError(
        f"the {tower} of this {type(model).__name__} has no list of layers that mmcli knows: none can be unfrozen"
    )


def cut(tower: nn.Module, count: int) -> tuple[nn.Module, list[nn.Module]]:
    """Return a transformers tower without what is below its last ``count`` layers, and what of it is to be trained.

    ``tower`` has ``embeddings``, an ``encoder`` with ``layers`` (or ``layer``), and maybe a norm before and after it.
    """
    encoder: Any = tower.encoder
    name = "layers" if hasattr(encoder, "layers") else "layer"
    kept = upper(getattr(encoder, name), count)
    below = {each: nn.Identity() for each in ("pre_layrnorm", "pre_layernorm") if hasattr(tower, each)}
    names = ("final_layer_norm", "post_layernorm", "layernorm")
    norms = [getattr(tower, each) for each in names if hasattr(tower, each)]
    return with_children(tower, encoder=with_children(encoder, **{name: kept}), embeddings=Given(), **below), [
        *kept,
        *norms,
    ]
