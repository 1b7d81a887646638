"""train-head, evaluate, predict, fusions, demo."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import (
    BEST,
    CACHE,
    RECIPE,
    RUNS,
    Device,
    From,
    GroupDuplicates,
    Jobs,
    Json,
    Labels,
    MaxMemory,
    NewRows,
    RareClasses,
    Settings,
    SplitDir,
    SplitSeed,
    keep_copies_together,
    parse_bytes,
    typed,
    with_options,
)
from .paths import look_at_inputs

SPLITS = ["train", "val", "test"]
Trained = "Default: what the head was trained with."


@with_options(RECIPE, interrupted="interrupted: nothing was written")
def train_head(
    settings: Settings,
    context: typer.Context,
    cache: Annotated[
        Path | None, typer.Option(help=f"What featurize wrote; default: {CACHE}, with --full that of the run.")
    ] = None,
    labels: Labels = None,
    fusion: Annotated[str, typer.Option(help="How image and text are joined; `mmcli fusions` lists them.")] = "concat",
    modality: Annotated[Literal["both", "text", "image"], typer.Option(help="What the head sees.")] = "both",
    seeds: Annotated[
        int, typer.Option(help="Train this many heads, with --seed and up; best.pt is their ensemble.")
    ] = 1,
    split_dir: SplitDir = None,
    split_seed: SplitSeed = 42,
    group_duplicates: GroupDuplicates = True,
    new: NewRows = "train",
    rare: RareClasses = "train-only",
    full: Annotated[
        bool, typer.Option("--full", help="Train the run of --from again on all labelled rows, for its best epochs.")
    ] = False,
    source: Annotated[Path | None, typer.Option("--from", help="With --full; default: the latest of --runs.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the run folder goes.")] = RUNS,
    jobs: Jobs = None,
    max_memory: MaxMemory = "4GB",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a head on cached features, in seconds, and write a run folder.

    Example: mmcli train-head --fusion concat --modality both
    """
    _recipe_or_full(context, settings, full)
    together = keep_copies_together(context)
    max_bytes = parse_bytes(max_memory)
    recipe = None if full else settings.recipe(fusion=fusion, modality=modality)
    if recipe is not None:
        settings.check_used([recipe])
    best_pt, own_cache = (source or runs / "latest", cache) if full else (None, cache or CACHE)
    look_at_inputs(best_pt=best_pt, cache=own_cache, labels=labels, split_dir=split_dir, result_folder=runs)
    from ..report.notes import note_about
    from ..report.progress import ProgressLine
    from ..report.tables import run_table, score_tables, seeds_table
    from ..report.terminal import print_json, print_parts

    with ProgressLine("train", "epochs" if seeds == 1 and not full else "heads") as progress:
        from ..featurize.backbones.opening import choose_device
        from ..heads import train_full as run_full
        from ..heads import train_head as run

        where = choose_device("cpu" if device == "auto" else device)  # a head is too small for an accelerator
        if recipe is None:
            result = run_full(source or runs / "latest", cache, labels, runs, where, max_bytes, jobs, progress)
        else:
            result = run(
                cache or CACHE,
                labels,
                recipe,
                split_dir=split_dir,
                split_seed=split_seed,
                runs=runs,
                device=where,
                seeds=seeds,
                group_duplicates=together,
                max_bytes=max_bytes,
                jobs=jobs,
                on_fit=None if recipe.head == "linear" and seeds == 1 else progress,
                new=new,
                rare=rare,
            )
    note_about(result | {"full": full})
    if as_json:
        print_json(result)
    else:
        parts = {name: result[name] for name in SPLITS if name in result}
        place = "" if runs == RUNS else f"--from {runs / 'latest' / 'best.pt'} "
        next_command = f"mmcli predict {place}--ids FILE --out submission.txt"
        over_seeds = [seeds_table(result)] if "over_seeds" in result else []
        print_parts(*score_tables(parts, result["classes"]), *over_seeds, run_table(result, next_command))


def _recipe_or_full(context: typer.Context, settings: Settings, full: bool) -> None:
    """Refuse options of the recipe beside --full, which takes its recipe from a run, and --from without it."""
    if full:
        why = "cannot go with --full, which takes the recipe of --from"
        settings.refuse(why)
        for name in ("fusion", "modality", "seeds", "split_dir", "split_seed", "group_duplicates", "new", "rare"):
            if typed(context, name):
                raise typer.BadParameter(f"--{name.replace('_', '-')} {why}")
    elif typed(context, "source"):
        raise typer.BadParameter("--from needs --full")


def evaluate(
    context: typer.Context,
    source: From = BEST,
    on: Annotated[
        Literal["held-out", "val", "test", "train", "new"],
        typer.Option(help="Rows to score. held-out: val and test; new: labelled rows that the run has not seen."),
    ] = "held-out",
    cache: Annotated[Path | None, typer.Option(help=Trained)] = None,
    labels: Annotated[Path | None, typer.Option(help=Trained)] = None,
    data: Annotated[Path | None, typer.Option(help="Stage 2: where the raw pairs are now, if they moved.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Stage 2: where the backbone is now, if it was moved.")] = None,
    max_memory: MaxMemory = "4GB",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a trained head, with intervals.

    Example: mmcli evaluate --from artifacts/runs/latest/best.pt --on test
    """
    look_at_inputs(best_pt=source, cache=cache, labels=labels, data=data)
    from ..featurize.backbones.opening import choose_device
    from ..heads import evaluate as run
    from ..heads import open_best_pt
    from ..report.notes import note_about
    from ..report.progress import ProgressLine
    from ..report.tables import score_tables, shown_path
    from ..report.terminal import print_json, print_parts

    parts: list[str] = ["val", "test"] if on == "held-out" else [on]
    where = choose_device(device)
    model = open_best_pt(source, where, data, backbone)
    if not model.layers and "stage1" not in model.checkpoint.made_from:
        for name in ("data", "backbone"):
            if typed(context, name):
                raise typer.BadParameter(f"--{name} has no effect: {model.checkpoint.path} needs no raw pairs")
    with ProgressLine("frozen part") as progress:
        result = run(model, cache, parts, labels, where, parse_bytes(max_memory), progress)
    note_about(result)
    if as_json:
        print_json(result)
    else:
        print_parts(f"{result['modality']}, {result['fusion']}: {shown_path(result['best_pt'])}")
        print_parts(*score_tables({name: result[name] for name in parts if name in result}, result["classes"]))


def predict(
    source: From = BEST,
    ids: Annotated[Path | None, typer.Option(help="CSV with the column guid: which pairs, in which order.")] = None,
    data: Annotated[Path | None, typer.Option(help="Folder or manifest of pairs, featurized or not.")] = None,
    image: Annotated[Path | None, typer.Option(help="One image file; with --text.")] = None,
    text: Annotated[str | None, typer.Option(help="One text; with --image.")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV to write; default: print it.")] = None,
    probs: Annotated[bool, typer.Option("--probs", help="Add a column per class.")] = False,
    cache: Annotated[Path | None, typer.Option(help=Trained)] = None,
    backbone: Annotated[str | None, typer.Option(help="Where the backbone is now, if it was moved.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Predict the label of listed pairs, of a folder of pairs, or of one pair.

    Example: mmcli predict --ids test_without_label.txt --out submission.txt
    """
    if (image is None) != (text is None):
        raise typer.BadParameter("--image and --text go together")
    if (image is None) == (ids is None and data is None):
        raise typer.BadParameter("give --ids FILE, or --data FOLDER (with or without --ids), or --image with --text")
    from ..cache.atomic import make_folder, refuse_to_overwrite
    from ..cache.machine import keep_freed_memory
    from ..report.progress import ProgressLine
    from ..report.terminal import note, print_csv, print_json, print_parts

    pair = None if image is None or text is None else (image, text)
    look_at_inputs(best_pt=source, cache=cache, ids=ids, data=data, image=image)
    if out is not None:
        refuse_to_overwrite(out, b"guid", [source, *(path for path in (ids, data, image, cache) if path)])
        make_folder(out.parent)
    from ..featurize.backbones.opening import choose_device
    from ..heads import open_best_pt
    from ..heads import predict as run

    keep_freed_memory()
    with ProgressLine("encode") as progress:
        model = open_best_pt(source, choose_device(device), backbone=backbone)
        if out is not None:  # labels look like predictions, and a head that learns from its own would score well
            refuse_to_overwrite(out, b"guid", model.checkpoint.inputs(cache))
        found = run(model, ids, data, pair, cache, backbone, device, progress)
    note(f"head: {found.head}")
    for said in found.notes:
        note(said)
    for reject in found.rejects:
        note(f"left out {reject.guid}: {reject.reason}")
    if out is not None:
        found.write(out, probs)
    if as_json:
        rows = zip(found.guids, found.labels, found.probs.tolist(), strict=True)
        listed = [{"guid": guid, "tag": tag, "probs": each} for guid, tag, each in rows]
        left_out = [asdict(reject) for reject in found.rejects]
        place = None if out is None else str(out)
        print_json({"classes": found.classes, "predictions": listed, "left_out": left_out, "out": place})
    elif out is not None:
        print_parts(f"{out}: {len(found.guids)} predictions")
    elif pair is not None:
        shown = ", ".join(f"{name} {prob:.3f}" for name, prob in zip(found.classes, found.probs[0], strict=True))
        print_parts(f"{found.labels[0]} ({shown})")
    else:
        print_csv(found.to_csv(probs))


def fusions(
    cache: Annotated[Path | None, typer.Option(help="Count for its sizes; default: those of CLIP ViT-B/32.")] = None,
    classes: Annotated[int, typer.Option(min=2, help="Number of classes.")] = 3,
    as_json: Json = False,
) -> None:
    """List the fusions: formula, source, and counted parameters of the whole head.

    Example: mmcli fusions
    """
    from ..heads.model.head import VIT_B32, describe_fusions
    from ..report.comparison_tables import fusions_table
    from ..report.terminal import print_json, print_parts

    sizes = VIT_B32
    if cache is not None:
        from ..cache import FeatureCache
        from ..heads.model.fusions import Sizes

        with FeatureCache.open(cache) as opened:
            sizes = Sizes(opened.dim, opened.dim, *opened.token_widths)
    listed = describe_fusions(sizes, classes)
    if as_json:
        print_json({"sizes": sizes._asdict(), "classes": classes, "fusions": listed})
    else:
        print_parts(fusions_table(listed, sizes._asdict(), classes))


def demo(
    out: Annotated[Path, typer.Option(help="Where the sample dataset and the runs go.")] = Path("artifacts/demo"),
    pairs: Annotated[int, typer.Option(min=60, help="Size of the sample dataset.")] = 360,
    seed: Annotated[int, typer.Option(min=0, help="Seed for the sample dataset.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a small dataset, featurize it, train on text, on image and on both, and show the scores.

    Example: mmcli demo
    """
    from ..cache.machine import keep_freed_memory
    from ..report.progress import ProgressLine
    from ..report.tables import demo_hints, runs_table
    from ..report.terminal import note, print_json, print_parts
    from .demo import run_demo

    note(f"{pairs} pairs into {out}; mmcli featurize {out}/data --labels {out}/labels.csv --backbone offline")
    keep_freed_memory()
    with ProgressLine("featurize") as progress:
        result = run_demo(out, pairs, seed, progress)
    if as_json:
        print_json(result)
        return
    print_parts(runs_table(result["runs"]), *demo_hints(out))
