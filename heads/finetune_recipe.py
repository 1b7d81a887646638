"""All settings of stage 2, in one frozen dataclass. This module does not import torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..cache.errors import MmcliError
from .settings import check_name, parse_as

ALL = -1  # layers; typed as `all`
TOWERS = {"text": "unfreeze_text_layers", "image": "unfreeze_vision_layers"}


@dataclass(frozen=True)
class FinetuneRecipe:
    """All settings of stage 2. docs/decisions.md explains the defaults.

    Loss, weight decay, dropout and class weights come from the head that stage 2 starts from.

    Attributes
    ----------
    unfreeze_text_layers, unfreeze_vision_layers
        Number of layers to train at the top of each tower, together with its last norm; ``ALL`` trains every layer. A
        tower that the head does not see cannot be trained.
    lr_backbone, lr_head
        Learning rates of AdamW at the end of the warm-up, for the layers and for the head.
    epochs
        Maximum number of epochs.
    patience
        Stop after this many epochs without a better validation macro-F1.
    batch_size
        Rows per step.
    warmup
        Share of all steps in which the rates rise linearly from 0. Afterwards they fall linearly to 0.
    """

    unfreeze_text_layers: int = 1
    unfreeze_vision_layers: int = 0
    lr_backbone: float = 5e-6
    lr_head: float = 1e-4
    epochs: int = 5
    patience: int = 2
    batch_size: int = 16
    warmup: float = 0.1

    def __post_init__(self) -> None:
        for name in (*TOWERS.values(), "epochs", "patience", "batch_size"):
            if not isinstance(getattr(self, name), int):
                raise MmcliError(f"{name} must be a whole number, found {getattr(self, name)!r}")
        for name in TOWERS.values():
            if getattr(self, name) < ALL:
                raise MmcliError(f"{name} must be 0 or more, or all, found {getattr(self, name)}")
        for name, least in (("lr_backbone", 0), ("lr_head", 0), ("batch_size", 1), ("epochs", 0), ("patience", 0)):
            if not least < getattr(self, name) < math.inf:
                raise MmcliError(f"{name} must be above {least}, found {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise MmcliError(f"warmup must be in [0, 1), found {self.warmup}")

    def layers(self) -> dict[str, int]:
        """Return the number of unfrozen layers by tower (``text``, ``image``); frozen towers are left out."""
        return {tower: getattr(self, name) for tower, name in TOWERS.items() if getattr(self, name)}

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rates in step ``step``, numbered from 0, of ``steps``."""
        rising = math.ceil(self.warmup * steps)
        return (step + 1) / rising if step < rising else (steps - step) / (steps - rising)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)

    def changed(self, **settings: Any) -> "FinetuneRecipe":
        """Return a copy with other settings; raise an MmcliError for a setting that does not exist."""
        for name in settings:
            check_name(name, SETTINGS, "stage 2")
        return replace(self, **settings)


SETTINGS: dict[str, Any] = {field.name: field.default for field in fields(FinetuneRecipe)}


def recipe_for(modality: str, settings: Mapping[str, Any]) -> FinetuneRecipe:
    """Return the defaults for a head of ``modality`` (one image layer for images alone), changed by ``settings``.

    Raises
    ------
    MmcliError
        The settings unfreeze layers that the head does not see, or no layer at all.
    """
    defaults = {"unfreeze_text_layers": 0, "unfreeze_vision_layers": 1} if modality == "image" else {}
    recipe = FinetuneRecipe().changed(**(defaults | dict(settings)))
    for tower, name in TOWERS.items():
        if tower in recipe.layers() and modality not in ("both", tower):
            raise MmcliError(f"{name} has no effect: this head sees {modality} only")
    if not recipe.layers():
        raise MmcliError("no layer is unfrozen: give --unfreeze-text-layers or --unfreeze-vision-layers")
    return recipe


def parse_finetune_setting(name: str, text: str) -> Any:
    """Read the typed value of a setting of stage 2; raise an MmcliError for a wrong value."""
    check_name(name, SETTINGS, "stage 2")
    if name in TOWERS.values() and text.strip() == "all":
        return ALL
    if name in TOWERS.values() and not text.strip().isdigit():
        raise MmcliError(f"{name} cannot be {text!r}: it is a number of layers, or all")
    return parse_as(name, text, SETTINGS[name])
