"""How a head is trained: every setting in one frozen dataclass. Importing this imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..cache.errors import MmcliError

Modality = Literal["both", "text", "image"]
HeadKind = Literal["mlp", "linear"]
ClassWeights = Literal["none", "inverse", "sqrt", "effective"]
Loss = Literal["ce", "focal"]
Preset = Literal["default", "report"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a head is trained. The defaults: docs/decisions.md.

    Attributes
    ----------
    fusion, modality
        What the head sees.
    head
        ``mlp``, or ``linear``: L2 logistic regression, C chosen by inner cross-validation (the linear probe of the CLIP
        paper), to which only ``fusion``, ``modality``, ``class_weights``, ``offsets``, ``normalize`` and ``seed``
        apply.
    hidden, dropout
        The MLP.
    lr, lr_attn, weight_decay, batch_size
        Of AdamW; ``lr_attn`` is that of the attention of cross_attn.
    epochs
        At most this many.
    patience
        Stop after this many epochs without a better validation macro-F1.
    lr_factor, lr_patience
        ReduceLROnPlateau on validation macro-F1.
    class_weights
        ``none``, ``inverse``, ``sqrt`` or ``effective``.
    loss, focal_gamma
        ``ce`` (cross-entropy) or ``focal``, and how much focal loss discounts what is already right.
    label_smoothing
        Share of the target that is spread over all classes.
    logit_adjustment
        tau of Menon et al.: how much of the log class frequencies is added to the logits in training; 0 is off.
    offsets
        Whether a number per class is added to the logits, fitted on the validation rows for macro-F1.
    views
        Whether training sees a random augmented view of each image per epoch; evaluation sees the image.
    normalize
        Whether each embedding is scaled to length 1 before it is standardised.
    seed
        Of initial weights, order of rows and dropout.
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

    def __post_init__(self) -> None:
        for name, least in (("lr", 0), ("lr_attn", 0), ("batch_size", 1), ("epochs", 0), ("patience", 0)):
            if not least < getattr(self, name) < math.inf:  # so that NaN is refused, too
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
                what = {"class_weights": "class weights"}.get(name, name)
                raise MmcliError(
                    f"unknown {what} {getattr(self, name)!r}: choose one of {', '.join(get_args(choices))}"
                )
        if self.head == "linear" and self.views:
            raise MmcliError(
                "the linear head sees each row once, so views have no meaning for it: leave one of them out"
            )

    @property
    def sees(self) -> str:
        """The name of what the head sees: its fusion, or its only modality."""
        return self.fusion if self.modality == "both" else self.modality

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain data."""
        return asdict(self) | {"hidden": list(self.hidden)}

    def that_matter(self) -> dict[str, Any]:
        """Return, as plain data, the settings that a fit by this recipe depends on.

        A single-modality head has no fusion, a pooled fusion no attention, a linear head no training loop.
        """
        without: set[str] = set() if self.head == "mlp" else set(SETTINGS) - set(_OF_LINEAR)
        if self.modality != "both":
            without.add("fusion")
        if self.sees != "cross_attn":
            without.add("lr_attn")
        if self.loss != "focal":
            without.add("focal_gamma")
        return {name: value for name, value in self.to_dict().items() if name not in without}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Recipe":
        """Return the recipe that ``to_dict`` described."""
        return cls(**{**values, "hidden": tuple(values["hidden"])})

    def changed(self, **settings: Any) -> "Recipe":
        """Return a copy with other settings.

        Raises
        ------
        MmcliError
            Naming a setting that does not exist, and those that do.
        """
        for name in settings:
            check_name(name)
        return replace(self, **settings)

    def reseeded(self, number: int) -> "Recipe":
        """Return a copy with the ``number``-th seed after this one's, beginning anew beyond the largest."""
        return replace(self, seed=(self.seed + number) % 2**32)


_OF_LINEAR = ("fusion", "modality", "head", "class_weights", "offsets", "normalize", "seed")
SETTINGS: dict[str, Any] = {field.name: field.default for field in fields(Recipe)}


def check_name(name: str, settings: Mapping[str, Any] = SETTINGS, of: str = "a head") -> None:
    """Raise an MmcliError where no setting is called ``name``."""
    if name not in settings:
        raise MmcliError(f"no setting of {of} is called {name!r}: choose among {', '.join(settings)}")


def parse_setting(name: str, text: str) -> Any:
    """Read a setting as it is typed: a number, a name, true or false, or widths such as ``256x64``.

    Raises
    ------
    MmcliError
        No such setting, or it cannot be that.
    """
    check_name(name)
    return parse_as(name, text, SETTINGS[name])


def parse_as(name: str, text: str, default: Any) -> Any:
    """Read the value of a setting as the type of ``default``; an MmcliError says what it must be."""
    text = text.strip()
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[text.lower()]
        if isinstance(default, tuple):
            widths = tuple(int(part) for part in text.split("x"))
            if min(widths) < 1:
                raise ValueError
            return widths
        if isinstance(default, int):
            return int(text)
        if isinstance(default, float):
            return float(text)
    except (ValueError, KeyError) as error:
        shapes: dict[type, str] = {bool: "true or false", tuple: "widths such as 256x64", int: "a whole number"}
        raise MmcliError(f"{name} cannot be {text!r}: it is {shapes.get(type(default), 'a number')}") from error
    return text


def setting_text(value: Any) -> str:
    """Return a setting as it is typed."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


# The recipe of the published report (docs/results.md): twelve epochs in batches of 16, all of them, no class weights.
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
