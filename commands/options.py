"""Options that several commands share. Their defaults and choices are those of the recipes in ``heads``."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ..heads.recipe import PRESETS, SETTINGS, ClassWeights, HeadKind, Loss, Modality, Preset, Recipe, parse_setting
from .command import DataOption, HeadOption, MachineOption, Options, RecipeOption, SplitOption

if TYPE_CHECKING:
    from ..heads.evaluation.splits import SplitOptions

CACHE = Path("artifacts/features.h5")
RUNS = Path("artifacts/runs")
BEST = RUNS / "latest" / "best.pt"
GO_ON = "interrupted: what was finished is kept; run the same command again to go on"
MAX_SEED = 2**32 - 1  # what scikit-learn takes
_LEAST_PROCESS = 700 * 10**6  # bytes
DEFAULTS: Any = Recipe  # Any, because a Recipe says str where an option lists its choices

CacheArgument = Annotated[Path, typer.Argument(help="The cache file.", rich_help_panel="Data")]
TrainedCache = Annotated[Path | None, DataOption(help="Feature cache; default: the cache that the head learned from.")]
TrainedLabels = Annotated[
    Path | None, DataOption(help="CSV with the header guid,tag; default: the labels that the head learned from.")
]
MovedData = Annotated[
    Path | None, DataOption(help="Folder or manifest of the raw pairs, if they were moved; only for stage 2.")
]
MovedBackbone = Annotated[str | None, DataOption(help="Hub id or folder of the backbone, if it was moved.")]
From = Annotated[Path, DataOption("--from", help="A best.pt or its run folder; default: the latest run.")]
HeadFusion = Annotated[str, HeadOption(help="Fusion of image and text; `mmcli fusions` lists them.")]
HeadModality = Annotated[Modality, HeadOption(help="What the head sees.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], MachineOption(help="Device to compute on.")]
MaxMemory = Annotated[
    str, MachineOption(help="Memory for all processes; features that do not fit are read as they are needed.")
]


@dataclass(frozen=True, kw_only=True)
class RecipeOptions(Options):
    """The settings of a head."""

    preset: Annotated[Preset, RecipeOption(help="Recipe to start from; report: that of the published report.")] = (
        "default"
    )
    head: Annotated[HeadKind, RecipeOption(help="Kind of head; linear: L2 logistic regression.")] = DEFAULTS.head
    hidden: Annotated[str, RecipeOption(help="Widths of the hidden layers of the MLP.")] = "x".join(
        map(str, Recipe.hidden)
    )
    dropout: Annotated[float, RecipeOption(min=0, max=0.99, help="Dropout after each hidden layer.")] = Recipe.dropout
    epochs: Annotated[int, RecipeOption(min=1, help="Largest number of epochs.")] = Recipe.epochs
    patience: Annotated[
        int, RecipeOption(min=1, help="Stop after this many epochs without a better validation macro-F1.")
    ] = Recipe.patience
    batch_size: Annotated[int, RecipeOption(min=2, help="Rows per step.")] = Recipe.batch_size
    lr: Annotated[float, RecipeOption(help="Learning rate of AdamW.")] = Recipe.lr
    lr_attn: Annotated[float, RecipeOption(help="Learning rate of the cross-attention.")] = Recipe.lr_attn
    weight_decay: Annotated[float, RecipeOption(min=0, help="Weight decay of AdamW.")] = Recipe.weight_decay
    class_weights: Annotated[ClassWeights, RecipeOption(help="Weights of the classes in the loss.")] = (
        DEFAULTS.class_weights
    )
    loss: Annotated[Loss, RecipeOption(help="Cross-entropy or focal loss.")] = DEFAULTS.loss
    focal_gamma: Annotated[
        float, RecipeOption(min=0, help="How much focal loss discounts rows that are already right.")
    ] = Recipe.focal_gamma
    label_smoothing: Annotated[
        float, RecipeOption(min=0, max=0.99, help="Share of the target that is spread over all classes.")
    ] = Recipe.label_smoothing
    logit_adjustment: Annotated[
        float, RecipeOption(min=0, help="Factor tau of the log class frequencies that the loss adds to the logits.")
    ] = Recipe.logit_adjustment
    offsets: Annotated[
        bool, RecipeOption("--offsets", help="Add a number per class to the logits, fitted on the validation rows.")
    ] = Recipe.offsets
    views: Annotated[
        bool, RecipeOption("--views", help="Train on a random view per image and epoch (featurize --views K).")
    ] = Recipe.views
    normalize: Annotated[bool, RecipeOption(help="Scale each embedding to length 1 first.")] = Recipe.normalize
    seed: Annotated[int, RecipeOption(min=0, max=MAX_SEED, help="Seed for initial weights, shuffling and dropout.")] = (
        Recipe.seed
    )

    def recipe(self) -> Recipe:
        """Return the recipe of the preset, changed by every setting that was typed."""
        settings = {name: getattr(self, name) for name in SETTINGS if self.typed(name)}
        if "hidden" in settings:
            settings["hidden"] = parse_setting("hidden", self.hidden)
        return Recipe().changed(**(PRESETS[self.preset] | settings))

    def check_used(self, recipes: Sequence[Recipe]) -> None:
        """Raise a usage error if a setting was typed on which none of ``recipes`` depends."""
        used = {name for recipe in recipes for name in recipe.that_matter()} | {"fusion", "modality"}
        self.refuse(set(SETTINGS) - used, "has no effect here: leave it out")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RecipeOptions):
    """What every command takes that trains heads: recipe, labels, split, and the size of the machine."""

    labels: Annotated[
        Path | None, DataOption(help="CSV with the header guid,tag; default: the file recorded in the cache.")
    ] = None
    split_dir: Annotated[
        Path | None,
        SplitOption(
            help="Folder with train_split.csv, val_split.csv and test_split.csv, such as the splits/ of another run. "
            "The test file may be missing or unlabelled."
        ),
    ] = None
    split_seed: Annotated[int, SplitOption(min=0, max=MAX_SEED, help="Seed for the 8:1:1 split.")] = 42
    group_duplicates: Annotated[
        bool,
        SplitOption(
            show_default=False,
            help="Keep copies (same image or same cleaned text) in one part of the split. Default: yes, but no with "
            "--preset report.",
        ),
    ] = True
    new: Annotated[
        Literal["train", "none"],
        SplitOption(help="Part for labelled rows that --split-dir does not name; none: leave them out."),
    ] = "train"
    rare: Annotated[
        Literal["train-only", "merge", "drop"],
        SplitOption(help="Train on classes that are too rare to be scored, merge them into `other`, or drop them."),
    ] = "train-only"
    jobs: Annotated[int | None, MachineOption(help="Number of processes; default: one per core.")] = None
    max_memory: MaxMemory = "4GB"

    def check_split(self) -> None:
        """Raise a usage error for --group-duplicates with --split-dir, or --new without it."""
        if self.split_dir is not None and self.group_duplicates:
            self.refuse(["group_duplicates"], "makes a split, --split-dir reuses one: give one of them")
        if self.split_dir is None:
            self.refuse(["new"], "is about rows that --split-dir does not name: add it, or leave this out")

    def split_options(self) -> "SplitOptions":
        """Return the split as typed; --group-duplicates is on by default, but off with --preset report."""
        from ..heads.evaluation.splits import SplitOptions

        together = self.group_duplicates if self.typed("group_duplicates") else self.preset != "report"
        return SplitOptions(self.split_dir, self.split_seed, together, self.new, self.rare)


def parse_bytes(text: str) -> int:
    """Read ``500MB``, ``2GB`` or a number of bytes.

    Raises
    ------
    typer.BadParameter
        It is none of these.
    """
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, "": 1}
    stripped = text.strip().upper()
    for unit, size in units.items():
        number = stripped.removesuffix(unit)
        if stripped.endswith(unit) and number.replace(".", "", 1).isdigit() and float(number) > 0:
            n_bytes = int(float(number) * size)
            if n_bytes < _LEAST_PROCESS:
                from ..report.terminal import note

                least = f"{_LEAST_PROCESS // 10**6} MB"
                note(f"--max-memory {text} cannot be kept: a process takes about {least} by itself")
            return n_bytes
    raise typer.BadParameter(f"--max-memory is a size such as 500MB or 2GB, found {text!r}")
