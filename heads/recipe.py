"""All settings of the training of a head, in one frozen dataclass. This module does not import torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..cache.errors import MmcliError
from .finetune_recipe import FinetuneRecipe, parse_finetune_setting, recipe_for
from .settings import check_name, parse_as

OF_STAGE_2 = "finetune."  # prefix of a setting of stage 2 in a grid

Modality = Literal["both", "text", "image"]
HeadKind = Literal["mlp", "linear"]
ClassWeights = Literal["none", "inverse", "sqrt", "effective"]
Loss = Literal["ce", "focal"]
Preset = Literal["default", "report"]


@dataclass(frozen=True)
class Recipe:
    """All settings of the training of a head. docs/decisions.md explains the defaults.

    Attributes
    ----------
    fusion, modality
        The inputs of the head.
    head
        ``mlp``, or ``linear``: an L2 logistic regression whose C is chosen by inner cross-validation (the linear probe
        of the CLIP paper). Only ``fusion``, ``modality``, ``class_weights``, ``offsets``, ``normalize`` and ``seed``
        apply to it.
    hidden, dropout
        Widths of the hidden layers of the MLP, and its dropout.
    lr, lr_attn, weight_decay, batch_size
        Settings of AdamW; ``lr_attn`` is the learning rate of the cross-attention.
    epochs
        Maximum number of epochs.
    patience
        Stop after this many epochs without a better validation macro-F1.
    lr_factor, lr_patience
        Factor and patience of ReduceLROnPlateau on validation macro-F1.
    class_weights
        ``none``, ``inverse``, ``sqrt`` or ``effective``.
    loss, focal_gamma
        ``ce`` (cross-entropy) or ``focal``, and how much focal loss discounts rows that are already right.
    label_smoothing
        Share of the target that is spread over all classes.
    logit_adjustment
        tau of Menon et al., the factor of the log class frequencies that training adds to the logits; 0 is off.
    offsets
        Whether to add a number per class to the logits, fitted on the validation rows for macro-F1.
    views
        Whether training sees a random augmented view of each image in each epoch; evaluation sees the image itself.
    normalize
        Whether to scale each embedding to length 1 before it is standardised.
    seed
        Seed for initial weights, the order of rows and dropout.
    finetune
        The settings of stage 2, which goes on with the trained head; None for stage 1 only.
    """

    fusion: str = "concat"
    modality: str = "both"
    head: str = "mlp"
    hidden: tuple[int, ...] = (256, 64)
    dropout: float = 0.5
    lr: float = 3e-4
    lr_attn: float = 1e-4
    weight_decay: float = 0.05
    batch_size: int = 64
    epochs: int = 60
    patience: int = 8
    lr_factor: float = 0.5
    lr_patience: int = 4
    class_weights: str = "sqrt"
    loss: str = "ce"
    focal_gamma: float = 2.0
    label_smoothing: float = 0.0
    logit_adjustment: float = 0.0
    offsets: bool = False
    views: bool = False
    normalize: bool = True
    seed: int = 42
    finetune: FinetuneRecipe | None = None

    def __post_init__(self) -> None:
        for name, least in (("lr", 0), ("lr_attn", 0), ("batch_size", 1), ("epochs", 0), ("patience", 0)):
            if not least < getattr(self, name) < math.inf:  # this form refuses NaN too
                raise MmcliError(f"{name} must be above {least}, found {getattr(self, name)}")
        for name in ("weight_decay", "focal_gamma", "logit_adjustment"):
            if not 0 <= getattr(self, name) < math.inf:
                raise MmcliError(f"{name} must be 0 or more, found {getattr(self, name)}")
        for name in ("dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise MmcliError(f"{name} must be in [0, 1), found {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise MmcliError(f"seed must be in [0, 2**32), found {self.seed}")
        for name, choices in (
            ("modality", Modality),
            ("head", HeadKind),
            ("class_weights", ClassWeights),
            ("loss", Loss),
        ):
            if getattr(self, name) not in get_args(choices):
                raise MmcliError(
                    f"unknown {name.replace('_', ' ')} {getattr(self, name)!r}: choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        if self.finetune is not None:
            recipe_for(self.modality, self.finetune.to_dict())  # refuses layers of an unseen tower
        if self.head == "linear" and self.views:
            raise MmcliError(
                "the linear head sees each row once, so views have no meaning for it: leave them out, or use --head mlp"
            )

    @property
    def sees(self) -> str:
        """The name of the inputs of the head: its fusion, or its only modality."""
        return self.fusion if self.modality == "both" else self.modality

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        plain = asdict(self) | {"hidden": list(self.hidden)}
        if self.finetune is None:
            del plain["finetune"]
        return plain

    def that_matter(self) -> dict[str, Any]:
        """Return the settings that a fit by this recipe depends on, as plain data.

        A single-modality head has no fusion, most fusions have no attention, and a linear head has no training loop.
        """
        without: set[str] = set() if self.head == "mlp" else set(SETTINGS) - set(_OF_LINEAR)
        if self.modality != "both":
            without.add("fusion")
        if self.sees != "cross_attn":
            without.add("lr_attn")
        if self.finetune is not None:
            without -= set(_OF_STAGE_2)
        if self.loss != "focal":
            without.add("focal_gamma")
        return {name: value for name, value in self.to_dict().items() if name not in without}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with these settings, the inverse of ``to_dict``."""
        finetune = values.get("finetune")
        return cls(
            **{
                **values,
                "hidden": tuple(values["hidden"]),
                "finetune": None if finetune is None else FinetuneRecipe(**finetune),
            }
        )

    def changed(self, **settings: Any) -> "Recipe":
        """Return a copy with other settings; ``finetune.<name>`` is a setting of stage 2.

        Raises
        ------
        MmcliError
            A setting does not exist, or is a setting of stage 2 while the recipe has no stage 2.
        """
        in_stage2 = {name.removeprefix(OF_STAGE_2): settings.pop(name) for name in list(settings) if OF_STAGE_2 in name}
        for name in settings:
            check_name(name, SETTINGS, "a head")
        changed = replace(self, **settings)
        if not in_stage2:
            return changed
        if self.finetune is None:
            raise MmcliError(f"{OF_STAGE_2}{min(in_stage2)} is a setting of stage 2: add --with-finetune")
        return replace(changed, finetune=recipe_for(self.modality, self.finetune.to_dict() | in_stage2))

    def with_finetune(self, settings: Mapping[str, Any] | None = None) -> "Recipe":
        """Return a copy with a stage 2: the defaults for this modality, changed by ``settings``."""
        return replace(self, finetune=recipe_for(self.modality, settings or {}))

    def without_finetune(self) -> "Recipe":
        """Return a copy without stage 2."""
        return replace(self, finetune=None)

    def reseeded(self, number: int) -> "Recipe":
        """Return a copy whose seed is larger by ``number``, modulo 2**32."""
        return replace(self, seed=(self.seed + number) % 2**32)


_OF_LINEAR = ("fusion", "modality", "head", "class_weights", "offsets", "normalize", "seed")
# Stage 2 takes loss and optimizer from the recipe of the head, even if the head is linear.
_OF_STAGE_2 = ("class_weights", "focal_gamma", "label_smoothing", "logit_adjustment", "loss", "weight_decay")
SETTINGS: dict[str, Any] = {field.name: field.default for field in fields(Recipe) if field.name != "finetune"}


def parse_setting(name: str, text: str) -> Any:
    """Read the typed value of a setting of a head, or of stage 2 if the name is ``finetune.<name>``.

    Raises
    ------
    MmcliError
        No setting has this name, or the text is no value for it.
    """
    if name.startswith(OF_STAGE_2):
        return parse_finetune_setting(name.removeprefix(OF_STAGE_2), text)
    check_name(name, SETTINGS, "a head")
    return parse_as(name, text, SETTINGS[name])


# ``report`` is the recipe of the published report (docs/results.md), which always trains all twelve epochs.
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "report": {
        "hidden": (256, 64),
        "dropout": 0.5,
        "lr": 3e-4,
        "lr_attn": 3e-4,
        "weight_decay": 0.05,
        "batch_size": 16,
        "epochs": 12,
        "patience": 12,
        "class_weights": "none",
        "seed": 42,
    },
}
