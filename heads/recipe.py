"""All settings of both stages, in two frozen dataclasses, and settings as text. This module does not import torch."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..cache.errors import MmcliError

OF_STAGE_2 = "finetune."  # prefix of a setting of stage 2 in a grid
ALL = -1  # layers; typed as `all`
TOWERS = {"text": "unfreeze_text_layers", "image": "unfreeze_vision_layers"}

Modality = Literal["both", "text", "image"]
HeadKind = Literal["mlp", "linear"]
ClassWeights = Literal["none", "inverse", "sqrt", "effective"]
Loss = Literal["ce", "focal"]
Preset = Literal["default", "report"]

_CHOICES: dict[str, Any] = {"modality": Modality, "head": HeadKind, "class_weights": ClassWeights, "loss": Loss}
# Bound, test, and the settings of both stages that it applies to. The tests are written so that NaN fails.
_BOUNDS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("above 0", lambda value: 0 < value < math.inf, ("lr", "lr_attn", "lr_backbone", "lr_head")),
    ("above 0", lambda value: 0 < value < math.inf, ("epochs", "patience")),
    ("above 1", lambda value: 1 < value < math.inf, ("batch_size",)),
    ("0 or more", lambda value: 0 <= value < math.inf, ("weight_decay", "focal_gamma", "logit_adjustment")),
    ("in [0, 1)", lambda value: 0 <= value < 1, ("dropout", "label_smoothing", "warmup")),
    ("in [0, 2**32)", lambda value: 0 <= value < 2**32, ("seed",)),
    ("0 or more, or all", lambda value: value >= ALL, tuple(TOWERS.values())),
)
_FUSIONS_WITH_LR_ATTN = ("cross_attn",)
_OF_LINEAR = ("fusion", "modality", "head", "class_weights", "offsets", "normalize", "seed")
# Stage 2 takes loss and optimizer from the recipe of the head, even if the head is linear.
_OF_HEAD_IN_STAGE_2 = ("class_weights", "focal_gamma", "label_smoothing", "logit_adjustment", "loss", "weight_decay")


def _check_bounds(recipe: "Recipe | FinetuneRecipe") -> None:
    for words, is_allowed, names in _BOUNDS:
        for name in names:
            if hasattr(recipe, name) and not is_allowed(getattr(recipe, name)):
                raise MmcliError(f"{name} must be {words}, found {getattr(recipe, name)}")


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
        _check_bounds(self)

    def layers(self) -> dict[str, int]:
        """Return the number of unfrozen layers by tower (``text``, ``image``); frozen towers are left out."""
        return {tower: getattr(self, name) for tower, name in TOWERS.items() if getattr(self, name)}

    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rates in step ``step``, numbered from 0, of ``steps``; 0 after these."""
        rising = math.ceil(self.warmup * steps)
        return (step + 1) / rising if step < rising else max(steps - step, 0) / max(steps - rising, 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)

    def changed(self, **settings: Any) -> "FinetuneRecipe":
        """Return a copy with other settings; raise an MmcliError for a setting that does not exist."""
        for name in settings:
            _check_name(name, FINETUNE_SETTINGS, "stage 2")
        return replace(self, **settings)


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
        _check_bounds(self)
        for name, literal in _CHOICES.items():
            value, choices = getattr(self, name), get_args(literal)
            if value not in choices:
                raise MmcliError(f"unknown {name.replace('_', ' ')} {value!r}: choose one of {', '.join(choices)}")
        if self.finetune is not None:
            layers = self.finetune.layers()
            for tower in layers:
                if self.modality not in ("both", tower):
                    raise MmcliError(f"{TOWERS[tower]} has no effect: this head sees {self.modality} only")
            if not layers:
                raise MmcliError("no layer is unfrozen: raise unfreeze_text_layers or unfreeze_vision_layers")
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
        return {name: value for name, value in plain.items() if value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with these settings, the inverse of ``to_dict``."""
        finetune = values.get("finetune")
        stage2 = None if finetune is None else FinetuneRecipe(**finetune)
        return cls(**{**values, "hidden": tuple(values["hidden"]), "finetune": stage2})

    def that_matter(self) -> dict[str, Any]:
        """Return the settings that a fit by this recipe depends on, as plain data.

        A single-modality head has no fusion, most fusions have no attention, and a linear head has no training loop.
        """
        matter = {*(_OF_LINEAR if self.head == "linear" else SETTINGS), "finetune"}
        if self.finetune is not None:
            matter |= set(_OF_HEAD_IN_STAGE_2)
        if self.modality != "both":
            matter.remove("fusion")
        if self.sees not in _FUSIONS_WITH_LR_ATTN:
            matter.discard("lr_attn")
        if self.loss != "focal":
            matter.discard("focal_gamma")
        return {name: value for name, value in self.to_dict().items() if name in matter}

    def changed(self, **settings: Any) -> "Recipe":
        """Return a copy with other settings; ``finetune.<name>`` is a setting of stage 2.

        Raises
        ------
        MmcliError
            A setting does not exist, or is a setting of stage 2 while the recipe has no stage 2.
        """
        in_stage2 = {name.removeprefix(OF_STAGE_2): settings.pop(name) for name in list(settings) if OF_STAGE_2 in name}
        for name in settings:
            _check_name(name, SETTINGS, "a head")
        if not in_stage2:
            return replace(self, **settings)
        if self.finetune is None:
            raise MmcliError(f"{OF_STAGE_2}{min(in_stage2)} is a setting of stage 2: add --with-finetune")
        return replace(self, **settings, finetune=self.finetune.changed(**in_stage2))

    def with_finetune(self, settings: Mapping[str, Any] | None = None) -> "Recipe":
        """Return a copy with a stage 2: the defaults (one image layer for images alone), changed by ``settings``.

        Raise an MmcliError where these unfreeze layers that the head does not see, or no layer at all.
        """
        defaults = {"unfreeze_text_layers": 0, "unfreeze_vision_layers": 1} if self.modality == "image" else {}
        return replace(self, finetune=FinetuneRecipe().changed(**(defaults | dict(settings or {}))))

    def without_finetune(self) -> "Recipe":
        """Return a copy without stage 2."""
        return replace(self, finetune=None)

    def reseeded(self, number: int) -> "Recipe":
        """Return a copy whose seed is larger by ``number``, modulo 2**32."""
        return replace(self, seed=(self.seed + number) % 2**32)


SETTINGS: dict[str, Any] = {field.name: field.default for field in fields(Recipe) if field.name != "finetune"}
FINETUNE_SETTINGS: dict[str, Any] = {field.name: field.default for field in fields(FinetuneRecipe)}

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


def parse_setting(name: str, text: str) -> Any:
    """Read the typed value of a setting of a head, or of stage 2 if the name is ``finetune.<name>``.

    Raise an MmcliError where no setting has this name, or the text is no value for it.
    """
    if name.startswith(OF_STAGE_2):
        return parse_finetune_setting(name.removeprefix(OF_STAGE_2), text)
    _check_name(name, SETTINGS, "a head")
    return _parse_as(name, text, SETTINGS[name])


def parse_finetune_setting(name: str, text: str) -> Any:
    """Read the typed value of a setting of stage 2; raise an MmcliError for a wrong value."""
    _check_name(name, FINETUNE_SETTINGS, "stage 2")
    if name in TOWERS.values() and text.strip() == "all":
        return ALL
    if name in TOWERS.values() and not text.strip().isdigit():
        raise MmcliError(f"{name} cannot be {text!r}: it is a number of layers, or all")
    return _parse_as(name, text, FINETUNE_SETTINGS[name])


def setting_text(value: Any) -> str:
    """Return the text that ``parse_setting`` reads as ``value``."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _check_name(name: str, settings: Mapping[str, Any], what: str) -> None:
    if name not in settings:
        raise MmcliError(f"no setting of {what} is called {name!r}: choose among {', '.join(settings)}")


def _parse_as(name: str, text: str, default: Any) -> Any:
    """Read the value of a setting with the type of ``default``; raise an MmcliError for a wrong value."""
    text = text.strip()
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            widths = tuple(int(part) for part in text.split("x"))
            if min(widths) < 1:
                raise ValueError
            return widths
        if isinstance(default, int | float):
            return type(default)(text)
    except (ValueError, KeyError) as error:
        shapes: dict[type, str] = {bool: "true or false", tuple: "widths such as 256x64", int: "a whole number"}
        raise MmcliError(f"{name} cannot be {text!r}: it is {shapes.get(type(default), 'a number')}") from error
    return text
