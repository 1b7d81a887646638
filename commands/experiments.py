"""compare, ablate, sweep: many heads on the same folds."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .options import MAX_SEED, RECIPE, SETUP, Json, Settings, typed, with_options

if TYPE_CHECKING:
    from ..heads.experiments import Candidate, Setup

Folds = Annotated[int, typer.Option(help="Folds of cross-validation.")]
Repeats = Annotated[int, typer.Option(help="Times that the folds are dealt anew.")]
FoldSeed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the folds.")]
SingleSplit = Annotated[
    bool, typer.Option("--single-split", help="The published report's table, on one 8:1:1 split instead of folds.")
]
WithoutTest = Annotated[
    bool, typer.Option("--without-test", help="Leave out the rows that train-head keeps for testing.")
]
FocusClass = Annotated[str | None, typer.Option(help="Class to look at closely; default: the rarest.")]


@with_options(RECIPE, SETUP)
def compare(
    settings: Settings,
    setup: "Setup",
    context: typer.Context,
    fusions: Annotated[
        str | None,
        typer.Option(
            help="Names, with commas: fusions, `linear`, <fusion>:linear; default: all that the cache allows."
        ),
    ] = None,
    folds: Folds = 5,
    repeats: Repeats = 2,
    fold_seed: FoldSeed = 42,
    without_test: WithoutTest = False,
    single_split: SingleSplit = False,
    focus_class: FocusClass = None,
    as_json: Json = False,
) -> None:
    """Compare fusions on the same folds: scores with intervals, and which differences are real.

    Example: mmcli compare --fusions concat,gated,film,product,late,linear
    """
    _refuse_folds(context, single_split)
    from ..heads.experiments import Protocol, all_fusions, candidates_of

    recipe = settings.recipe()
    names = all_fusions(setup.cache) if fusions is None else [name.strip() for name in fusions.split(",")]
    candidates = candidates_of(names, recipe)
    if single_split:
        _single_split(setup, candidates, focus_class, "compare", as_json)
    else:
        protocol = Protocol(folds, repeats, fold_seed, without_test)
        _compare(setup, candidates, protocol, "best", focus_class, "compare", as_json)


@with_options(RECIPE, SETUP)
def ablate(
    settings: Settings,
    setup: "Setup",
    context: typer.Context,
    fusion: Annotated[str, typer.Option(help="How image and text are joined where both are seen.")] = "concat",
    folds: Folds = 5,
    repeats: Repeats = 2,
    fold_seed: FoldSeed = 42,
    without_test: WithoutTest = False,
    single_split: SingleSplit = False,
    focus_class: FocusClass = None,
    as_json: Json = False,
) -> None:
    """Compare both modalities with text alone and image alone, each trained and scored on what it sees.

    Example: mmcli ablate --focus-class neutral
    """
    _refuse_folds(context, single_split)
    from ..heads.experiments import Protocol, modalities_of

    candidates = modalities_of(settings.recipe(fusion=fusion))
    if single_split:
        _single_split(setup, candidates, focus_class, "ablate", as_json)
    else:
        protocol = Protocol(folds, repeats, fold_seed, without_test)
        _compare(setup, candidates, protocol, "both", focus_class, "ablate", as_json)


@with_options(RECIPE, SETUP)
def sweep(
    settings: Settings,
    setup: "Setup",
    context: typer.Context,
    grid: Annotated[
        list[str], typer.Option(help="name=a,b,c or, with --trials, name=low:high; may be given several times.")
    ],
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

    Example: mmcli sweep --fusion film --grid lr=1e-4,3e-4,1e-3 --grid dropout=0.3,0.5
    """
    from ..heads.experiments import Protocol, grid_of
    from ..heads.experiments import sweep as run
    from ..heads.recipe import setting_text
    from ..report.experiments import comparison_tables
    from ..report.progress import ProgressLine
    from ..report.terminal import note, print_json, print_parts

    recipe = settings.recipe(fusion=fusion, modality=modality)
    with ProgressLine("fit", "fits") as progress:
        protocol = Protocol(folds, repeats, fold_seed)
        result = run(replace(setup, on_fit=progress), recipe, grid_of(grid), trials, protocol)
    _note_rows(result)
    if as_json:
        print_json(result)
        return
    print_parts(*comparison_tables(result, by_class=False))
    flags = " ".join(f"--{name.replace('_', '-')} {setting_text(value)}" for name, value in result["best"].items())
    note(
        f"highest: {flags or 'the settings as they are'}. The highest of many is partly luck: where its interval is "
        "not clear of 0, keep what is simpler, and score it once, with train-head, on the test rows"
    )


def _compare(
    setup: "Setup",
    candidates: "list[Candidate]",
    protocol: Any,
    against: str,
    focus_class: str | None,
    what: str,
    as_json: bool,
) -> None:
    from ..heads.experiments import compare as run
    from ..report.experiments import comparison_tables, focus_table
    from ..report.progress import ProgressLine
    from ..report.tables import shown_path
    from ..report.terminal import print_json, print_parts

    with ProgressLine("fit", "fits") as progress:
        result = run(replace(setup, on_fit=progress), candidates, protocol, against, focus_class, what)
    _note_rows(result)
    if as_json:
        print_json(result)
    else:
        focus = [focus_table(result)] if what == "ablate" or focus_class is not None else []
        print_parts(
            *comparison_tables(result),
            *focus,
            f"{shown_path(result['folder'])}: results.csv, results.json, results.png, out_of_fold.csv",
        )


def _single_split(
    setup: "Setup",
    candidates: "list[Candidate]",
    focus_class: str | None,
    what: str,
    as_json: bool,
) -> None:
    from ..heads.experiments import single_split
    from ..report.experiments import single_split_tables
    from ..report.progress import ProgressLine
    from ..report.terminal import print_json, print_parts

    with ProgressLine("fit", "fits") as progress:
        result = single_split(replace(setup, on_fit=progress), candidates, focus_class)
    _note_rows(result)
    if as_json:
        print_json(result)
    else:
        print_parts(*single_split_tables(result, what))


def _refuse_folds(context: typer.Context, single_split: bool) -> None:
    for name in ("folds", "repeats", "fold_seed", "without_test"):
        if single_split and typed(context, name):
            raise typer.BadParameter(f"--{name.replace('_', '-')} has no meaning with --single-split")


def _note_rows(result: dict[str, Any]) -> None:
    from ..report.terminal import note

    if result["labels_without_features"]:
        note(f"note: {result['labels_without_features']} labels are of pairs without features; left out")
