"""compare, ablate, sweep: many heads on the same folds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import MAX_SEED, RECIPE, RUNS, SETUP, Group, Json, Settings, typed, with_options

if TYPE_CHECKING:
    from ..heads.experiments import Candidate, Protocol, Setup
    from ..heads.runs.fitting import OnFit

Folds = Annotated[int, typer.Option(help="Folds of cross-validation.")]
Repeats = Annotated[int, typer.Option(help="Times that the folds are dealt anew.")]
FoldSeed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed for the folds.")]


@dataclass(frozen=True)
class Scoring:
    """How candidates are scored: by a protocol, or on one split (``protocol`` None); and the class to look at."""

    protocol: "Protocol | None"
    focus_class: str | None


def _scoring_options(
    folds: Folds = 5,
    repeats: Repeats = 2,
    fold_seed: FoldSeed = 42,
    without_test: Annotated[
        bool, typer.Option("--without-test", help="Leave out the rows that train-head keeps for testing.")
    ] = False,
    single_split: Annotated[
        bool, typer.Option("--single-split", help="The published report's table, on one 8:1:1 split, not on folds.")
    ] = False,
    focus_class: Annotated[str | None, typer.Option(help="Class to look at closely; default: the rarest.")] = None,
) -> None:
    """List the options that say how candidates are scored. The defaults are those of ``Protocol``."""


def _scoring(context: typer.Context, values: dict[str, Any]) -> Scoring:
    folding = ("folds", "repeats", "fold_seed", "without_test")
    if values["single_split"]:
        for name in folding:
            if typed(context, name):
                raise typer.BadParameter(f"--{name.replace('_', '-')} has no meaning with --single-split")
        return Scoring(None, values["focus_class"])
    if not values["without_test"]:
        for name in ("split_dir", "split_seed", "group_duplicates", "new"):
            if name in context.params and typed(context, name):
                raise typer.BadParameter(
                    f"--{name.replace('_', '-')} needs --without-test or --single-split: folds are of all rows"
                )
    from ..heads.experiments import Protocol

    return Scoring(Protocol(*(values[name] for name in folding)), values["focus_class"])


SCORING = Group(_scoring_options, _scoring)


@dataclass(frozen=True)
class Finetuning:
    """Whether stage 2 is a candidate, and what was typed of it."""

    wanted: bool
    settings: dict[str, Any]
    data: Path | None
    backbone: str | None

    def check_used(self, candidates: "Sequence[Candidate]") -> None:
        """Raise a usage error where settings of stage 2 were typed, and no candidate goes on with it."""
        typed = {"finetune": self.settings, "data": self.data, "backbone": self.backbone}
        for name, value in typed.items():
            if value and all(each.recipe.finetune is None for each in candidates):
                raise typer.BadParameter(f"--{name} has no effect without --with-finetune: add it, or leave this out")

    def places(self, on_states: "OnFit") -> dict[str, Any]:
        """Return the fields of ``Setup`` that say where stage 2 finds its pairs and backbone."""
        return {"data": self.data, "backbone": self.backbone, "on_states": on_states}


def _finetuning_options(
    with_finetune: Annotated[
        bool,
        typer.Option("--with-finetune", help="Add stage 2 of the first fusion, each modality or each setting."),
    ] = False,
    finetune: Annotated[
        list[str] | None, typer.Option(help="A setting of stage 2, name=value, as of `mmcli finetune`; repeatable.")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Stage 2: where the raw pairs are now; default: as recorded.")] = (
        None
    ),
    backbone: Annotated[str | None, typer.Option(help="Stage 2: where the backbone is now, if it was moved.")] = None,
) -> None:
    """List the options of stage 2 as a candidate."""


def _finetuning(context: typer.Context, values: dict[str, Any]) -> Finetuning:
    from ..heads.finetune_recipe import parse_finetune_setting

    settings = {}
    for each in values["finetune"] or []:
        name, equals, text = each.partition("=")
        if not equals:
            raise typer.BadParameter(f"--finetune takes name=value, found {each!r}")
        name = name.strip().replace("-", "_")
        settings[name] = parse_finetune_setting(name, text)
    return Finetuning(values["with_finetune"], settings, values["data"], values["backbone"])


FINETUNING = Group(_finetuning_options, _finetuning)


@with_options(SCORING, FINETUNING, RECIPE, SETUP)
def compare(
    scoring: Scoring,
    finetuning: Finetuning,
    settings: Settings,
    setup: "Setup",
    context: typer.Context,
    fusions: Annotated[
        str | None,
        typer.Option(
            help="Names, with commas: fusions, `linear`, <fusion>:linear, any of them with :finetune for stage 2; "
            "default: all fusions that the cache allows."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare fusions on the same folds: scores with intervals, and which differences are real.

    Example: mmcli compare --fusions concat,gated,film,product,late,linear
    """
    from ..heads.experiments import all_fusions, candidates_of
    from ..heads.experiments.candidates import FINETUNE
    from ..report.progress import ProgressLine

    recipe = settings.recipe()
    names = all_fusions(setup.cache, recipe) if fusions is None else [name.strip() for name in fusions.split(",")]
    if finetuning.wanted and not any(name.endswith(FINETUNE) for name in names):
        names.append(names[0] + FINETUNE)
    with ProgressLine("frozen part") as on_states:
        setup = replace(setup, **finetuning.places(on_states))
        candidates = candidates_of(names, recipe, finetuning.settings)
        settings.check_used([candidate.recipe for candidate in candidates])
        finetuning.check_used(candidates)
        _score(context, setup, candidates, scoring, "best", "compare", as_json)


@with_options(SCORING, FINETUNING, RECIPE, SETUP)
def ablate(
    scoring: Scoring,
    finetuning: Finetuning,
    settings: Settings,
    setup: "Setup",
    context: typer.Context,
    fusion: Annotated[str, typer.Option(help="How image and text are joined where both are seen.")] = "concat",
    as_json: Json = False,
) -> None:
    """Compare both modalities with text alone and image alone, each trained and scored on what it sees.

    Example: mmcli ablate --focus-class neutral
    """
    from ..heads.experiments import modalities_of
    from ..report.progress import ProgressLine

    candidates = modalities_of(settings.recipe(fusion=fusion), finetuning.settings if finetuning.wanted else None)
    settings.check_used([candidate.recipe for candidate in candidates])
    finetuning.check_used(candidates)
    with ProgressLine("frozen part") as on_states:
        setup = replace(setup, **finetuning.places(on_states))
        _score(context, setup, candidates, scoring, "both", "ablate", as_json)


@with_options(FINETUNING, RECIPE, SETUP)
def sweep(
    finetuning: Finetuning,
    settings: Settings,
    setup: "Setup",
    context: typer.Context,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            help="name=a,b,c or, with --trials, name=low:high; repeatable. finetune.name: a setting of stage 2."
        ),
    ] = None,
    fusion: Annotated[str, typer.Option(help="How image and text are joined.")] = "concat",
    modality: Annotated[Literal["both", "text", "image"], typer.Option(help="What the head sees.")] = "both",
    trials: Annotated[int | None, typer.Option(help="Draw this many random settings; default: all combinations.")] = (
        None
    ),
    folds: Folds = 5,
    repeats: Repeats = 1,
    fold_seed: FoldSeed = 42,
    as_json: Json = False,
) -> None:
    """Try settings of a head on folds of the training and validation rows; the test rows are never looked at.

    The test rows are those of the latest run, if it is of the same cache and labels; else of a split drawn as
    train-head draws it. --split-dir, --split-seed and --group-duplicates choose another split.

    Example: mmcli sweep --fusion film --grid lr=1e-4,3e-4,1e-3 --grid dropout=0.3,0.5
    """
    from ..heads.experiments import Protocol, grid_of
    from ..heads.experiments import sweep as run
    from ..heads.recipe import OF_STAGE_2
    from ..heads.settings import setting_text
    from ..report.comparison_tables import comparison_tables
    from ..report.notes import note_about
    from ..report.progress import ProgressLine
    from ..report.terminal import note, print_json, print_parts

    recipe = settings.recipe(fusion=fusion, modality=modality)
    if not finetuning.wanted:
        finetuning.check_used([])
        if not grid:
            raise typer.BadParameter("--grid is needed: name=a,b,c")
    setup = _with_split(context, setup)
    with ProgressLine("frozen part") as on_states, ProgressLine("fit", "fits") as progress:
        if finetuning.wanted:
            recipe = recipe.with_finetune(finetuning.settings)
        setup = replace(setup, on_fit=progress, **finetuning.places(on_states))
        result = run(setup, recipe, grid_of(grid or []), trials, Protocol(folds, repeats, fold_seed))
    note_about(result)
    if as_json:
        print_json(result)
        return
    print_parts(*comparison_tables(result, by_class=False))
    typed_again: dict[bool, list[str]] = {False: [], True: []}  # by whether it is a setting of stage 2
    for name, value in result["best"].items():
        option = name.removeprefix(OF_STAGE_2).replace("_", "-")
        typed_again[name.startswith(OF_STAGE_2)].append(f"--{option} {setting_text(value)}")
    highest, how = " ".join(typed_again[False]) or "the settings as they are", "train-head"
    if result["best_goes_on"]:
        highest, how = " ".join([highest + ", then mmcli finetune", *typed_again[True]]), "train-head and finetune"
    note(
        f"highest: {highest}. The highest of many is partly luck: where its interval is not clear of 0, keep what is "
        f"simpler, and score it once, with {how}, on the test rows"
    )


def _with_split(context: typer.Context, setup: "Setup") -> "Setup":
    """Return ``setup`` with the split of the latest run, unless an option chooses a split."""
    from ..heads.experiments.setup import with_split_of_latest

    if any(typed(context, name) for name in ("split_dir", "split_seed", "group_duplicates")):
        return setup
    return with_split_of_latest(setup, RUNS, [name for name in ("new", "rare") if typed(context, name)])


def _score(
    context: typer.Context,
    setup: "Setup",
    candidates: "list[Candidate]",
    scoring: Scoring,
    against: str,
    what: str,
    as_json: bool,
) -> None:
    from ..heads.experiments import compare as by_folds
    from ..heads.experiments import single_split
    from ..report.comparison_tables import comparison_tables, focus_table, single_split_tables
    from ..report.notes import note_about
    from ..report.progress import ProgressLine
    from ..report.tables import shown_path
    from ..report.terminal import print_json, print_parts

    with ProgressLine("fit", "fits") as progress:
        setup = replace(setup, on_fit=progress)
        if scoring.protocol is None:
            result = single_split(setup, candidates, scoring.focus_class)
        else:
            if scoring.protocol.without_test:
                setup = _with_split(context, setup)
            result = by_folds(setup, candidates, scoring.protocol, against, scoring.focus_class, what)
    note_about(result)
    if as_json:
        print_json(result)
    elif scoring.protocol is None:
        print_parts(*single_split_tables(result, what), f"{shown_path(result['folder'])}: results.json")
    else:
        focus = [focus_table(result)] if what == "ablate" or scoring.focus_class is not None else []
        written = f"{shown_path(result['folder'])}: results.csv, results.json, results.png, out_of_fold.csv"
        print_parts(*comparison_tables(result), *focus, written)
