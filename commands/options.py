"""What a command is, and the options that several commands share.

A command is a dataclass: each field is an option, and ``run`` does the work. ``typer`` reads the fields as it reads the
parameters of a function. Commands that share options inherit them. Defaults and choices are those of the recipes in
``heads``.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from ..heads.recipe import PRESETS, SETTINGS, ClassWeights, HeadKind, Loss, Modality, Preset, Recipe, parse_setting

if TYPE_CHECKING:
    from ..heads.evaluation.splits import SplitOptions

CACHE = Path("artifacts/features.h5")
RUNS = Path("artifacts/runs")
GO_ON = "interrupted: what was finished is kept; run the same command again to go on"
MAX_SEED = 2**32 - 1  # what scikit-learn takes
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1, None: 1}
_LEAST_PROCESS = 700 * 10**6  # bytes

# The panels of every --help, in order.
PANELS = ("Data", "Encoder", "Head", "Candidates", "Recipe", "Stage 2", "Scoring", "Split", "Output", "Machine", "Help")
DataOption = partial(typer.Option, rich_help_panel="Data")
EncoderOption = partial(typer.Option, rich_help_panel="Encoder")
HeadOption = partial(typer.Option, rich_help_panel="Head")
CandidateOption = partial(typer.Option, rich_help_panel="Candidates")
RecipeOption = partial(typer.Option, rich_help_panel="Recipe")
Stage2Option = partial(typer.Option, rich_help_panel="Stage 2")
ScoringOption = partial(typer.Option, rich_help_panel="Scoring")
SplitOption = partial(typer.Option, rich_help_panel="Split")
OutputOption = partial(typer.Option, rich_help_panel="Output")
MachineOption = partial(typer.Option, rich_help_panel="Machine")

CacheArgument = Annotated[Path, typer.Argument(help="The cache file.", rich_help_panel="Data")]
RecordedData = Annotated[
    Path | None, DataOption(help="Folder or manifest of the raw pairs; default: as recorded in the cache.")
]
Runs = Annotated[Path, OutputOption(help="Folder for the run folder.")]
HeadFusion = Annotated[str, HeadOption(help="Fusion of image and text; `mmcli fusions` lists them.")]
HeadModality = Annotated[Modality, HeadOption(help="What the head sees.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], MachineOption(help="Device to compute on.")]
MaxMemory = Annotated[
    str, MachineOption(help="Memory for all processes; features that do not fit are read as they are needed.")
]


@dataclass(frozen=True, kw_only=True)
class Options(ABC):
    """Base of every command: what was typed, and whether it was."""

    goes_on: ClassVar[bool] = False  # whether the same command goes on after an interruption
    context: typer.Context
    as_json: Annotated[bool, OutputOption("--json", help="Print one JSON object instead of tables.")] = False

    @abstractmethod
    def run(self) -> None:
        """Do what the command is for, and print the answer."""

    def show(self, result: Any, *parts: Any) -> None:
        """Print the answer: ``result`` as JSON with --json, else ``parts``, which are text and tables."""
        from ..report.terminal import print_json, print_parts

        if self.as_json:
            print_json(result)
        else:
            print_parts(*parts)

    def interrupted(self) -> str:
        """Return what to say after Ctrl-C."""
        return GO_ON if self.goes_on else "interrupted"

    def typed(self, name: str) -> bool:
        """Whether the option of this field was given on the command line."""
        source = self.context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    def refuse(self, names: Iterable[str], why: str) -> None:
        """Raise a usage error that names the first of these options that was typed, and says ``why``."""
        for parameter in self.context.command.params:
            if parameter.name in set(names) and self.typed(parameter.name):
                raise typer.BadParameter(f"{parameter.opts[0]} {why}")

    def check_paths(self, *, best_pt: Path | None = None, cache: Path | None = None, out: Path | None = None) -> None:
        """Raise a MmcliError if a path does not exist, or is a file instead of a folder, or the reverse.

        A mistake is answered before anything heavy is imported. Besides the arguments (``out`` is a folder to write
        into), the options ``labels``, ``ids``, ``image``, ``data`` and ``split_dir`` of the command are checked.
        """
        from ..cache import DataError, FeatureCache, MmcliError
        from ..heads.runs.folders import find_best_pt

        for option, what in (
            ("labels", "a CSV with the header guid,tag"),
            ("ids", "a CSV with the column guid"),
            ("image", "an image file"),
        ):
            path: Path | None = getattr(self, option, None)
            if path is not None and path.is_dir():
                raise DataError(f"--{option} {path} is a folder: give {what}")
            if path is not None and not path.exists():
                raise DataError(f"no such file: {path}; --{option} takes {what}")
        data: Path | None = getattr(self, "data", None)
        if data is not None and not data.exists():
            raise DataError(f"no such folder or manifest: {data}; --data takes a folder of pairs, or a manifest")
        split_dir: Path | None = getattr(self, "split_dir", None)
        if split_dir is not None and split_dir.is_file():
            raise DataError(f"--split-dir {split_dir} is a file: give a folder with train_split.csv and the others")
        if out is not None and out.exists() and not out.is_dir():
            raise MmcliError(f"{out} is a file: give a folder for the results")
        if best_pt is not None:
            find_best_pt(best_pt)
        if cache is not None:
            FeatureCache.open(cache).close()


class Command(TyperCommand):
    """Makes the options of what was typed, and runs them. Prints help that fits a narrow screen."""

    def invoke(self, context: Any) -> None:
        """Run the command; Ctrl-C exits with 130."""
        options: Options = super().invoke(context)
        try:
            context.invoke(options.run)  # through the context, so that a usage error names the command
        except KeyboardInterrupt:
            from ..report.terminal import note

            note(options.interrupted())
            raise typer.Exit(130) from None

    def format_options(self, context: Any, formatter: Any) -> None:
        """Write the options by panel, as text that wraps: the tables of ``rich`` cut long names."""
        panels: dict[str, list[tuple[str, str]]] = {name: [] for name in PANELS}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                panels[getattr(parameter, "rich_help_panel", None) or "Help"].append(record)
        for name, records in panels.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


class CommandGroup(TyperGroup):
    """Lists its commands with the whole first paragraph of their help, which ``click`` would cut."""

    def format_commands(self, context: Any, formatter: Any) -> None:
        """Write the name and the first paragraph of each command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, (each.help or "").split("\n\n")[0]) for name, each in self.commands.items()])


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """What every command takes that trains heads: recipe, labels, split, and the size of the machine."""

    preset: Annotated[Preset, RecipeOption(help="Recipe to start from; report: that of the published report.")] = (
        "default"
    )
    head: Annotated[HeadKind, RecipeOption(help="Kind of head; linear: L2 logistic regression.")] = "mlp"
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
    class_weights: Annotated[ClassWeights, RecipeOption(help="Weights of the classes in the loss.")] = "sqrt"
    loss: Annotated[Loss, RecipeOption(help="Cross-entropy or focal loss.")] = "ce"
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

    def recipe(self) -> Recipe:
        """Return the recipe of the preset, changed by every setting that was typed."""
        settings = {name: parse_setting(name, str(getattr(self, name))) for name in SETTINGS if self.typed(name)}
        return Recipe().changed(**(PRESETS[self.preset] | settings))

    def check_used(self, recipes: Sequence[Recipe]) -> None:
        """Raise a usage error if a setting was typed on which none of ``recipes`` depends."""
        used = {name for recipe in recipes for name in recipe.that_matter()} | {"fusion", "modality"}
        self.refuse(set(SETTINGS) - used, "has no effect here: leave it out")

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


@dataclass(frozen=True, kw_only=True)
class TrainedOptions(Options):
    """What every command takes that begins with a best.pt."""

    source: Annotated[Path, DataOption("--from", help="A best.pt or its run folder; default: the latest run.")] = (
        RUNS / "latest" / "best.pt"
    )
    cache: Annotated[Path | None, DataOption(help="Feature cache; default: the cache that the head learned from.")] = (
        None
    )
    backbone: Annotated[str | None, DataOption(help="Hub id or folder of the backbone, if it was moved.")] = None
    device: Device = "auto"


@dataclass(frozen=True, kw_only=True)
class LabelledOptions(TrainedOptions):
    """What evaluate and finetune take."""

    labels: Annotated[
        Path | None, DataOption(help="CSV with the header guid,tag; default: the labels that the head learned from.")
    ] = None
    max_memory: MaxMemory = "4GB"


def parse_bytes(text: str) -> int:
    """Read ``500MB``, ``2GB`` or a number of bytes; raise a usage error for anything else."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([KMGT]?B)?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise typer.BadParameter(f"--max-memory is a size such as 500MB or 2GB, found {text!r}")
    n_bytes = int(float(match[1]) * _UNITS[match[2]])
    if n_bytes < _LEAST_PROCESS:
        from ..report.terminal import note

        note(f"--max-memory {text} cannot be kept: a process takes about {_LEAST_PROCESS // 10**6} MB by itself")
    return n_bytes
