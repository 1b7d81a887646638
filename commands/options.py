"""Options that several commands share. The settings of a head are listed once, here, for all that train heads."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .paths import look_at_inputs

if TYPE_CHECKING:
    from ..heads.experiments import Setup
    from ..heads.recipe import Recipe

CACHE = Path("artifacts/features.h5")
RUNS = Path("artifacts/runs")
BEST = RUNS / "latest" / "best.pt"
EXPERIMENTS = Path("artifacts/experiments")
INTERRUPTED = "interrupted: what was finished is kept; run the same command again to go on"
_LEAST_PROCESS = 700 * 10**6
MAX_SEED = 2**32 - 1  # what scikit-learn takes

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
CacheArgument = Annotated[Path, typer.Argument(help="The cache file.")]
Labels = Annotated[Path | None, typer.Option(help="CSV guid,tag; default: the one recorded in the cache.")]
From = Annotated[Path, typer.Option("--from", help="A best.pt, or its run folder; default: the latest run.")]
SplitDir = Annotated[
    Path | None,
    typer.Option(
        help="The splits/ folder of another run, or CSVs like it; test_split.csv may be missing or unlabelled."
    ),
]
NewRows = Annotated[
    Literal["train", "none"],
    typer.Option("--new", help="Put labelled rows that --split-dir does not name into the training part, or nowhere."),
]
RareClasses = Annotated[
    Literal["train-only", "merge", "drop"],
    typer.Option("--rare", help="Train on classes too rare to be scored, merge them into `other`, or drop them."),
]
SplitSeed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed for the 8:1:1 split.")]
GroupDuplicates = Annotated[
    bool,
    typer.Option(
        "--group-duplicates/--no-group-duplicates",
        help="Keep copies in one part of that split; default: on, off with --preset report.",
    ),
]
Jobs = Annotated[int | None, typer.Option(help="Processes at once; default: one per core.")]
MaxMemory = Annotated[str, typer.Option(help="Features that do not fit in it are read as they are needed.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed for weights, order and dropout.")]


def _recipe_options(
    preset: Annotated[
        Literal["default", "report"], typer.Option(help="report: the recipe of the published report.")
    ] = "default",
    head: Annotated[Literal["mlp", "linear"], typer.Option(help="linear: L2 logistic regression.")] = "mlp",
    hidden: Annotated[str, typer.Option(help="Widths of the hidden layers of the MLP.")] = "256x64",
    epochs: Annotated[int, typer.Option(min=1, help="At most this many.")] = 60,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better validation macro-F1.")] = 8,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 3e-4,
    lr_attn: Annotated[float, typer.Option(help="Learning rate of the cross-attention.")] = 1e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="Weight decay of AdamW.")] = 0.05,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="After each hidden layer.")] = 0.5,
    class_weights: Annotated[
        Literal["none", "inverse", "sqrt", "effective"], typer.Option(help="Against imbalance.")
    ] = "sqrt",
    loss: Annotated[Literal["ce", "focal"], typer.Option(help="Cross-entropy, or focal loss.")] = "ce",
    focal_gamma: Annotated[float, typer.Option(min=0, help="How much focal loss discounts what is right.")] = 2.0,
    label_smoothing: Annotated[float, typer.Option(min=0, max=0.99, help="Share spread over all classes.")] = 0.0,
    logit_adjustment: Annotated[float, typer.Option(min=0, help="tau: log class frequencies in the loss.")] = 0.0,
    offsets: Annotated[
        bool, typer.Option("--offsets", help="Add a number per class to the logits, fitted on validation rows.")
    ] = False,
    views: Annotated[
        bool, typer.Option("--views", help="Train on a random augmented view per pair and epoch (featurize --views K).")
    ] = False,
    normalize: Annotated[bool, typer.Option(help="Scale each embedding to length 1 first.")] = True,
    seed: Seed = 42,
) -> None:
    """List the options that make a recipe, beside fusion and modality. The defaults are those of ``heads.Recipe``."""


def _setup_options(
    cache: Annotated[Path, typer.Option(help="What featurize wrote.")] = CACHE,
    labels: Labels = None,
    split_dir: SplitDir = None,
    split_seed: SplitSeed = 42,
    group_duplicates: GroupDuplicates = True,
    new: NewRows = "train",
    rare: RareClasses = "train-only",
    out: Annotated[
        Path, typer.Option(help="Where the result folder goes; finished fits are kept in it.")
    ] = EXPERIMENTS,
    jobs: Jobs = None,
    max_memory: MaxMemory = "4GB",
) -> None:
    """List the options that say where an experiment reads and writes. The defaults are those of ``Setup``."""


@dataclass(frozen=True)
class Settings:
    """What was typed of the settings of a head.

    Attributes
    ----------
    preset
        Where settings that were not typed come from.
    typed
        Settings by name.
    """

    preset: str
    typed: dict[str, Any]

    def recipe(self, **more: Any) -> "Recipe":
        """Return the preset's recipe with what was typed, and with ``more``."""
        from ..heads.recipe import PRESETS, Recipe, parse_setting

        typed = self.typed | more
        if "hidden" in typed:
            typed["hidden"] = parse_setting("hidden", typed["hidden"])
        return Recipe().changed(**(PRESETS[self.preset] | typed))

    def check_used(self, recipes: "Sequence[Recipe]") -> None:
        """Raise a usage error where a setting was typed on which none of ``recipes`` depends."""
        used = {name for recipe in recipes for name in recipe.that_matter()}
        for name in self.typed:
            if name not in used:
                raise typer.BadParameter(f"--{name.replace('_', '-')} has no effect here: leave it out")

    def refuse(self, why: str) -> None:
        """Raise a usage error where any setting was typed."""
        for name in [*self.typed, *(["preset"] if self.preset != "default" else [])]:
            raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")


def typed(context: typer.Context, name: str) -> bool:
    """Whether an option was given on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _settings(context: typer.Context, values: dict[str, Any]) -> Settings:
    chosen = {name: value for name, value in values.items() if name != "preset" and typed(context, name)}
    return Settings(values["preset"], chosen)


def keep_copies_together(context: typer.Context) -> bool:
    """Return what --group-duplicates is: as typed, else on, but off with --preset report.

    Raises
    ------
    typer.BadParameter
        Options of a split that is drawn beside --split-dir, or --new without it.
    """
    values = context.params
    if values["split_dir"] is not None and values["group_duplicates"] and typed(context, "group_duplicates"):
        raise typer.BadParameter("--group-duplicates makes a split, --split-dir reuses one: give one of them")
    if values["split_dir"] is None and typed(context, "new"):
        raise typer.BadParameter("--new is about rows that --split-dir does not name: add it, or leave this out")
    if typed(context, "group_duplicates"):
        return bool(values["group_duplicates"])
    return bool(values["preset"] != "report")


def _setup(context: typer.Context, values: dict[str, Any]) -> "Setup":
    cache = (
        values["cache"] if typed(context, "cache") else None
    )  # without the default one, a usage error may come first
    look_at_inputs(cache=cache, labels=values["labels"], split_dir=values["split_dir"], result_folder=values["out"])
    from ..heads.experiments import Setup

    values["group_duplicates"] = keep_copies_together(context)
    return Setup(max_bytes=parse_bytes(values.pop("max_memory")), **values)


@dataclass(frozen=True)
class Group:
    """Options that go together: a function whose signature lists them, and what is made of their values."""

    listed: Callable[..., None]
    made: Callable[[typer.Context, dict[str, Any]], Any]

    @property
    def options(self) -> list[inspect.Parameter]:
        """The options, in order."""
        return list(inspect.signature(self.listed).parameters.values())


RECIPE = Group(_recipe_options, _settings)  # makes a Settings
SETUP = Group(_setup_options, _setup)  # makes a Setup


def with_options(
    *groups: Group, interrupted: str = INTERRUPTED
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of ``groups``; it takes what they make as its first parameters, one for each.

    The command also takes ``context``, and its last parameter stays last. Ctrl-C says ``interrupted`` and
    exits with 130.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        *own, last = list(inspect.signature(command).parameters.values())[len(groups) :]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = []
            for group in groups:
                of_group = {option.name: values.pop(option.name) for option in group.options}
                made.append(group.made(values["context"], of_group))
            try:
                command(*made, **values)
            except KeyboardInterrupt:
                from ..report.terminal import note

                note(interrupted)
                raise typer.Exit(130) from None

        shared = [option for group in groups for option in group.options]
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared, last)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


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
            found = int(float(number) * size)
            if found < _LEAST_PROCESS:
                from ..report.terminal import note

                note(
                    f"--max-memory {text} cannot be kept: a process takes about {_LEAST_PROCESS // 10**6} MB by itself"
                )
            return found
    raise typer.BadParameter(f"--max-memory is a size such as 500MB or 2GB, found {text!r}")
