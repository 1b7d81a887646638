"""Where the parts of each dual encoder are, and cutting a tower below its unfrozen layers. Imports torch.

Every model of transformers with ``get_image_features`` and ``get_text_features`` can be featurized. Stage 2 also cuts a
tower below its last layers, so it needs a model that is listed here. The states that enter the first unfrozen layer are
constant for each text or image. ``entering`` computes them once; a ``Top`` continues from them with the model's own
code.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.errors import BackboneError

PooledToken = Literal["end", "highest", "highest if the end token is 2"]


@dataclass(frozen=True)
class Tower:
    """The names of a tower's parts. A tower without ``layers`` is built differently and cannot be cut."""

    module: str  # in the model; it has the children ``embeddings`` and ``encoder``
    layers: str | None = None  # in the encoder
    norm: str | None = None  # the tower's last norm, which stage 2 trains together with the layers
    norm_before: str | None = None  # between embeddings and layers
    projection: str | None = None  # in the model
    pools_one_position: bool = False  # whether ``at_position`` (huggingface_encoder.py) computes the last layer


@dataclass(frozen=True)
class Architecture:
    """The towers of a model, and how it treats texts.

    If the text tower pools at a token, ``pooled_token`` says which: the end token, or the highest id in the text.
    (CLIP's old configurations call the end token 2; CLIP then takes the highest id.)
    """

    image: Tower
    text: Tower
    pads_texts: bool = False  # to the full length without a mask, as in SigLIP's training
    pooled_token: PooledToken | None = None
    projects_each_position: bool = False  # the first is the embedding

    def tower(self, side: str) -> Tower:
        """Return the ``image`` or the ``text`` tower."""
        return self.image if side == "image" else self.text


_IMAGE = Tower("vision_model", "layers", "post_layernorm", projection="visual_projection")
_CLIP_IMAGE = replace(_IMAGE, norm_before="pre_layrnorm")
_CLIP_TEXT = Tower("text_model", "layers", "final_layer_norm", projection="text_projection")
_BERT_TEXT = Tower("text_model", "layer", projection="text_projection")  # BERT's norms are inside its layers
_UNCUT_IMAGE = Tower("vision_model", projection="visual_projection")
_SIGLIP = Architecture(
    replace(_IMAGE, projection=None), Tower("text_model", "layers", "final_layer_norm"), pads_texts=True
)
_OWL = Architecture(_UNCUT_IMAGE, _CLIP_TEXT, pooled_token="highest")
_UNKNOWN = Architecture(Tower("vision_model"), Tower("text_model"))

# By model_type in config.json.
ARCHITECTURES = {
    "aimv2": Architecture(replace(_IMAGE, norm="rms_norm"), replace(_CLIP_TEXT, norm="rms_norm"), pooled_token="end"),
    "align": Architecture(Tower("vision_model"), _BERT_TEXT),
    "altclip": Architecture(_CLIP_IMAGE, Tower("text_model", projection="text_projection")),
    "blip": Architecture(_IMAGE, _BERT_TEXT),
    "chinese_clip": Architecture(replace(_CLIP_IMAGE, pools_one_position=True), _BERT_TEXT),
    "clip": Architecture(
        replace(_CLIP_IMAGE, pools_one_position=True),
        replace(_CLIP_TEXT, pools_one_position=True),
        pooled_token="highest if the end token is 2",
    ),
    "clipseg": Architecture(_CLIP_IMAGE, _CLIP_TEXT, pooled_token="highest if the end token is 2"),
    "flava": Architecture(
        Tower("image_model", projection="image_projection"),
        Tower("text_model", "layer", "layernorm", projection="text_projection"),
        projects_each_position=True,
    ),
    "groupvit": Architecture(_UNCUT_IMAGE, _CLIP_TEXT, pooled_token="highest if the end token is 2"),
    "metaclip_2": Architecture(_CLIP_IMAGE, _CLIP_TEXT, pooled_token="end"),
    "owlv2": _OWL,
    "owlvit": _OWL,
    "siglip": _SIGLIP,
    "siglip2": _SIGLIP,
    "tipsv2": Architecture(
        Tower("vision_model", "layer", "layernorm"), Tower("text_model", "layers", "final_layer_norm")
    ),
    "vision-text-dual-encoder": Architecture(_UNCUT_IMAGE, _BERT_TEXT),
}


def architecture_of(model: Any) -> Architecture:
    """Return the architecture of a transformers model; one without layers if the model is not listed."""
    return ARCHITECTURES.get(model.config.model_type, _UNKNOWN)


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass early
    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states


_HOOKING = threading.Lock()
_stopping = threading.local()  # .at is the layer before which this thread stops


def _stop(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if getattr(_stopping, "at", None) is layer:
        raise _Reached(args[0] if args else kwargs["hidden_states"])


def entering(layer: nn.Module, run: Callable[[], object]) -> Tensor:
    """Return the hidden states that enter ``layer`` when ``run`` runs the model. Later layers are not computed.

    Several threads may call this at once: the hook stays on the layer, but it stops only threads that asked for it.
    Raise a BackboneError if the model does not run ``layer``.
    """
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
    raise BackboneError("this model does not run its layers one after another, so it cannot be cut: unfreeze no layers")


class StubModule(nn.Module):
    """Replaces everything below the cut. It returns ``states``, whatever its arguments."""

    states: Tensor | None = None

    def forward(self, *_: Any, **__: Any) -> Tensor | None:
        """Return the states."""
        return self.states


class Top(nn.Module, ABC):
    """The unfrozen layers of a tower and everything above them, in evaluation mode: no dropout, fixed statistics.

    ``tower`` is the model without the modules below the cut; its parameters have the same names as in the whole model.
    ``unfrozen`` are its modules to train: the layers and the last norm. ``pad_id`` pads the token ids of texts.
    """

    is_small = False  # whether ``pooled`` is too little work for a second thread to help

    def __init__(self, tower: nn.Module, unfrozen: Sequence[nn.Module], pad_id: int = 0) -> None:
        super().__init__()
        self.tower = tower.eval().requires_grad_(False)
        self.pad_id = pad_id
        for module in unfrozen:
            module.requires_grad_(True)

    def train(self, mode: bool = True) -> Top:
        """Stay in evaluation mode: the states that enter the layers were computed without dropout."""
        return super().train(False)

    def unfrozen(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters, by their names in the whole model."""
        return {name: parameter for name, parameter in self.tower.named_parameters() if parameter.requires_grad}

    def run_from(self, states: Tensor, run: Callable[[], Any]) -> Any:
        """Return the result of ``run`` when the tower continues from ``states``."""
        stubs = [module for module in self.tower.modules() if isinstance(module, StubModule)]
        for stub in stubs:
            stub.states = states
        try:
            return run()
        finally:
            for stub in stubs:
                stub.states = None

    @abstractmethod
    def forward(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return pooled, projected embeddings, (b, d), and last hidden states, (b, L, w) or (b, P, w), float32.

        ``states`` enter the first unfrozen layer: (b, L, w) for texts, padded on the right; (b, ...) for images. Texts
        have token ids and an attention mask, (b, L) int64.
        """

    def pooled(self, states: Tensor, ids: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Return only the embeddings, (b, d) float32. This may be cheaper than ``forward``."""
        return self.forward(states, ids, mask)[0]


def check_layers(layers: Sequence[nn.Module], asked: int, tower: str) -> None:
    """Raise a BackboneError if ``asked`` is not between 1 and the number of ``layers``."""
    if not 1 <= asked <= len(layers):
        raise BackboneError(
            f"cannot unfreeze {asked} layers: the {tower} tower of this backbone has {len(layers)} layers, so ask for "
            f"1 to {len(layers)}"
        )


def freeze_unused(top: Top, entered: NDArray[np.float32], expected: NDArray[np.float32], *text: Tensor) -> Top:
    """Run ``top`` forward and backward on one sample, and freeze the parameters that get no gradient.

    ``entered`` is the input of the first layer for the sample, and ``expected`` its embedding, (1, d), from the whole
    tower. A text has token ids and a mask, (1, L). Raise a BackboneError if ``top`` does not run or gives another
    embedding: the table of architectures does not fit this model.
    """
    device = next(top.parameters()).device
    cannot = (
        f"a tower of this {type(top.tower).__name__} cannot be cut, so none of its layers can be unfrozen: unfreeze "
        "layers of the other tower, or use stage 1 only"
    )
    try:
        pooled, states = top(torch.from_numpy(entered).to(device), *text)
        (pooled.sum() + states.sum()).backward()
    except Exception as error:  # the model uses a module below the cut, and any exception may come of that
        raise BackboneError(f"{cannot} ({error})") from error
    for parameter in top.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
    difference = np.abs(pooled.detach().cpu().numpy() - expected).max()
    if not difference <= 1e-2 * np.abs(expected).max():
        raise BackboneError(f"{cannot} (its embeddings would change)")
    return top


def upper(layers: Sequence[nn.Module], count: int) -> nn.ModuleList:
    """Return the last ``count`` layers, with the same numbers as in the whole tower."""
    kept = nn.ModuleList()
    for number in range(len(layers) - count, len(layers)):
        kept.add_module(str(number), layers[number])
    return kept


def with_children(module: nn.Module, **children: nn.Module | None) -> nn.Module:
    """Return a shallow copy of ``module`` with some children replaced. It shares the parameters of ``module``."""
    copied = copy.copy(module)
    copied._modules = {**module._modules, **children}
    return copied


def layers_of(model: Any, side: str) -> list[nn.Module]:
    """Return the layers of the ``image`` or the ``text`` tower of a transformers model, first to last.

    Raise a BackboneError if the table of architectures does not say where they are.
    """
    tower = architecture_of(model).tower(side)
    try:
        if tower.layers is not None:
            return list(getattr(model, tower.module).encoder.get_submodule(tower.layers))
    except AttributeError:  # the towers of a VisionTextDualEncoder may be of any kind
        pass
    raise BackboneError(
        f"mmcli does not know the layers of the {side} tower of a {type(model).__name__}, so none can be unfrozen: "
        "unfreeze layers of the other tower, or use stage 1 only"
    )


def cut(module: nn.Module, tower: Tower, count: int) -> tuple[nn.Module, list[nn.Module]]:
    """Return a tower without the modules below its last ``count`` layers, and the modules to train."""
    encoder, name = module.get_submodule("encoder"), str(tower.layers)
    kept = upper(list(encoder.get_submodule(name)), count)  # type: ignore[call-overload]
    children = {"encoder": with_children(encoder, **{name: kept}), "embeddings": StubModule()}
    if tower.norm_before is not None:
        children[tower.norm_before] = nn.Identity()
    norms = [] if tower.norm is None else [module.get_submodule(tower.norm)]
    return with_children(module, **children), [*kept, *norms]


def without_other_tower(model: Any, side: str, cut_tower: nn.Module) -> nn.Module:
    """Return a shallow copy of ``model`` with a cut tower, and without the other tower."""
    architecture = architecture_of(model)
    own, other = architecture.tower(side), architecture.tower("text" if side == "image" else "image")
    removed = {name: None for name in (other.module, other.projection) if name is not None}
    return with_children(model, **{own.module: cut_tower}, **removed)
