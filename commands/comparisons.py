"""compare, ablate, sweep: many heads on the same folds."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ..heads.recipe import Recipe, parse_finetune_setting
from .options import (
    CACHE,
    MAX_SEED,
    RUNS,
    CandidateOption,
    DataOption,
    HeadFusion,
    HeadModality,
    OutputOption,
    ScoringOption,
    Stage2Option,
    TrainingOptions,
    parse_bytes,
)

if TYPE_CHECKING:
    from ..heads.experiments import Candidate, Protocol, Setup
    from ..heads.experiments.results import Comparison

Repeats = Annotated[int, ScoringOption(help="Number of repeats, each with other folds.")]


@dataclass(frozen=True, kw_only=True)
class ExperimentOptions(TrainingOptions):
    """What compare, ablate and sweep take: how heads are trained, the folds, stage 2, and where results go."""

    goes_on = True
    cache: Annotated[Path, DataOption(help="Feature cache.")] = CACHE
    out: Annotated[Path, OutputOption(help="Folder for the folder of results; it also keeps finished fits.")] = Path(
        "artifacts/experiments"
    )
    folds: Annotated[int, ScoringOption(help="Number of folds.")] = 5
    repeats: Repeats = 2
    fold_seed: Annotated[int, ScoringOption(min=0, max=MAX_SEED, help="Seed for the folds.")] = 42

    with_finetune: Annotated[
        bool,
        Stage2Option(
            "--with-finetune",
            help="Add stage 2: of the first fusion (compare), of each modality (ablate), of each setting (sweep).",
        ),
    ] = False
    finetune: Annotated[
        list[str] | None, Stage2Option(help="Setting of stage 2, name=value, as in `mmcli finetune`; repeatable.")
    ] = None
    data: Annotated[
        Path | None, Stage2Option(help="Folder or manifest of the raw pairs; default: as recorded in the cache.")
    ] = None
    backbone: Annotated[str | None, Stage2Option(help="Hub id or folder of the backbone, if it was moved.")] = None

    def setup(self) -> "Setup":
        """Check the paths that were typed, and return where the experiment reads and writes."""
        # The default cache is not checked here, so that usage errors come first.
        self.check_paths(cache=self.cache if self.typed("cache") else None, out=self.out)
        from ..heads.experiments import Setup

        self.check_split()
        return Setup(
            cache=self.cache,
            labels=self.labels,
            split=self.split_options(),
            out=self.out,
            jobs=self.jobs,
            max_bytes=parse_bytes(self.max_memory),
            data=self.data,
            backbone=self.backbone,
        )

    def finetune_settings(self) -> dict[str, Any]:
        """Return what --finetune sets, by name."""
        settings = {}
        for setting in self.finetune or []:
            name, equals, text = setting.partition("=")
            if not equals:
                raise typer.BadParameter(f"--finetune takes name=value, found {setting!r}")
            name = name.strip().replace("-", "_")
            settings[name] = parse_finetune_setting(name, text)
        return settings

    def check_stage2_used(self, recipes: Sequence[Recipe]) -> None:
        """Raise a usage error if an option of stage 2 was typed, and no recipe has a stage 2."""
        if all(recipe.finetune is None for recipe in recipes):
            why = "has no effect without --with-finetune: add it, or leave this out"
            self.refuse(["finetune", "data", "backbone"], why)

    def with_split(self, setup: "Setup") -> "Setup":
        """Return ``setup`` with the split of the latest run, unless an option chooses a split."""
        from ..heads.experiments.setup import with_split_of_latest

        if any(self.typed(name) for name in ("split_dir", "split_seed", "group_duplicates")):
            return setup
        return with_split_of_latest(setup, RUNS, [name for name in ("new", "rare") if self.typed(name)])


@dataclass(frozen=True, kw_only=True)
class ScoredOptions(ExperimentOptions):
    """How compare and ablate score their candidates."""

    what: ClassVar[str]  # name of the command
    against: ClassVar[str]  # candidate that the others are compared with, or `best`
    without_test: Annotated[
        bool, ScoringOption("--without-test", help="Leave out the rows that train-head keeps for testing.")
    ] = False
    single_split: Annotated[
        bool, ScoringOption("--single-split", help="Score on one 8:1:1 split: the published report's table.")
    ] = False
    focus_class: Annotated[
        str | None, ScoringOption(help="Class to look at closely; default: the class with the fewest rows.")
    ] = None

    def protocol(self) -> "Protocol | None":
        """Return the folds, or None for --single-split; refuse options that then mean nothing."""
        if self.single_split:
            self.refuse(["folds", "repeats", "fold_seed", "without_test"], "has no meaning with --single-split")
            return None
        if not self.without_test:
            self.refuse(
                ["split_dir", "split_seed", "group_duplicates", "new"],
                "needs --without-test or --single-split: folds are made of all rows",
            )
        from ..heads.experiments import Protocol

        return Protocol(folds=self.folds, repeats=self.repeats, seed=self.fold_seed, without_test=self.without_test)

    @abstractmethod
    def candidates(self) -> "Sequence[Candidate]":
        """Return what to compare."""

    def run(self) -> None:
        """Score the candidates, and show the scores."""
        protocol, setup = self.protocol(), self.setup()
        from ..heads.experiments import compare, single_split
        from ..report.comparison_tables import comparison_tables, focus_table, single_split_tables
        from ..report.notes import note_about_folds, note_about_split
        from ..report.progress import ProgressLine
        from ..report.tables import shown_path

        candidates = self.candidates()
        recipes = [candidate.recipe for candidate in candidates]
        self.check_used(recipes)
        self.check_stage2_used(recipes)
        with ProgressLine("frozen part") as on_states, ProgressLine("fit", "fits") as on_fit:
            setup = replace(setup, on_fit=on_fit, on_states=on_states)
            if protocol is None:
                split = single_split(setup, candidates, self.focus_class)
            else:
                setup = self.with_split(setup) if protocol.without_test else setup
                result = compare(setup, candidates, protocol, self.against, self.focus_class, self.what)
        if protocol is None:
            note_about_split(split)
            written = f"{shown_path(split.folder)}: results.json"
            self.show(split.to_dict(), *single_split_tables(split, self.what), written)
        else:
            note_about_folds(result)
            focus = [focus_table(result)] if self.what == "ablate" or self.focus_class is not None else []
            written = f"{shown_path(result.folder)}: results.csv, results.json, results.png, out_of_fold.csv"
            self.show(result.to_dict(), *comparison_tables(result), *focus, written)


@dataclass(frozen=True, kw_only=True)
class Compare(ScoredOptions):
    """Compare fusions on the same folds: scores with intervals, and which differences are real.

    Example: mmcli compare --fusions concat,gated,film,product,late,linear
    """

    what, against = "compare", "best"
    fusions: Annotated[
        str | None,
        CandidateOption(
            help="Names, separated by commas: fusions, `linear`, or <fusion>:linear; append :finetune for stage 2. "
            "Default: all fusions that the cache allows."
        ),
    ] = None

    def candidates(self) -> "Sequence[Candidate]":
        """Return the fusions that were typed, or all."""
        from ..heads.experiments import all_fusions, candidates_of
        from ..heads.experiments.candidates import FINETUNE

        recipe, settings = self.recipe(), self.finetune_settings()
        typed = None if self.fusions is None else [name.strip() for name in self.fusions.split(",")]
        names = all_fusions(self.cache, recipe) if typed is None else typed
        if self.with_finetune and not any(name.endswith(FINETUNE) for name in names):
            names.append(names[0] + FINETUNE)
        return candidates_of(names, recipe, settings)


@dataclass(frozen=True, kw_only=True)
class Ablate(ScoredOptions):
    """Compare both modalities with text alone and image alone, each trained and scored on what it sees.

    Example: mmcli ablate --focus-class neutral
    """

    what, against = "ablate", "both"
    fusion: HeadFusion = Recipe.fusion

    def candidates(self) -> "Sequence[Candidate]":
        """Return the modalities."""
        from ..heads.experiments import modalities_of

        settings = self.finetune_settings()
        return modalities_of(self.recipe(), settings if self.with_finetune else None)


@dataclass(frozen=True, kw_only=True)
class Sweep(ExperimentOptions):
    """Try settings of a head on folds of the training and validation rows; the test rows are never looked at.

    The test rows are those of the latest run, if it has the same cache and labels; else those of a split drawn as
    train-head draws it. --split-dir, --split-seed and --group-duplicates choose another split.

    Example: mmcli sweep --fusion film --grid lr=1e-4,3e-4,1e-3 --grid dropout=0.3,0.5
    """

    grid: Annotated[
        list[str] | None,
        CandidateOption(
            help="Values to try: name=a,b,c or, with --trials, name=low:high; repeatable. Settings of stage 2 are "
            "called finetune.NAME."
        ),
    ] = None
    trials: Annotated[
        int | None, CandidateOption(help="Number of random settings to draw; default: try all combinations.")
    ] = None
    fusion: HeadFusion = Recipe.fusion
    modality: HeadModality = "both"
    repeats: Repeats = 1

    def run(self) -> None:
        """Try the settings, and show the scores and what to type to use the best."""
        settings = self.finetune_settings()
        setup = self.setup()
        from ..heads.experiments import Protocol, grid_of, sweep
        from ..report.comparison_tables import comparison_tables
        from ..report.notes import note_about_folds
        from ..report.progress import ProgressLine
        from ..report.terminal import note

        recipe = self.recipe()
        if self.with_finetune:
            recipe = recipe.with_finetune(settings)
        self.check_stage2_used([recipe])
        if not self.with_finetune and not self.grid:
            raise typer.BadParameter("--grid is needed: name=a,b,c")
        setup = self.with_split(setup)
        with ProgressLine("frozen part") as on_states, ProgressLine("fit", "fits") as on_fit:
            result = sweep(
                replace(setup, on_fit=on_fit, on_states=on_states),
                recipe,
                grid_of(self.grid or []),
                trials=self.trials,
                protocol=Protocol(folds=self.folds, repeats=self.repeats, seed=self.fold_seed),
            )
        note_about_folds(result)
        self.show(result.to_dict(), *comparison_tables(result, by_class=False))
        if not self.as_json:
            note(_advice(result))


def _advice(result: "Comparison") -> str:
    """Return what to type to use the best settings of a sweep, and how much to trust them."""
    from ..heads.recipe import OF_STAGE_2, setting_text

    options: dict[bool, list[str]] = {False: [], True: []}  # by whether they are options of stage 2
    for name, value in (result.best or {}).items():
        option = name.removeprefix(OF_STAGE_2).replace("_", "-")
        options[name.startswith(OF_STAGE_2)].append(f"--{option} {setting_text(value)}")
    best, commands = " ".join(options[False]) or "the current settings", "train-head"
    if result.best_goes_on:
        best, commands = " ".join([f"{best}, then mmcli finetune", *options[True]]), "train-head and finetune"
    return (
        f"highest: {best}. The highest of many scores is partly luck: if the interval of its difference includes 0, "
        f"keep the simpler settings. Score your choice on the test rows once, with {commands}"
    )
