"""The command line: parse, call, print. What a command does is in the folder that it calls.

Heavy modules (torch, scikit-learn, matplotlib) are imported inside the commands, so that help is instant.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import __version__

app = typer.Typer(
    name="mmcli",
    help="Classify image-text pairs: featurize once with a frozen CLIP, then experiment in seconds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache_app = typer.Typer(help="Look at a feature cache: info, verify, export.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")

CACHE = Path("artifacts/features.h5")
RUNS = Path("artifacts/runs")
BEST = RUNS / "latest" / "best.pt"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where to compute.")]
CacheArgument = Annotated[Path, typer.Argument(help="The cache file.")]
From = Annotated[Path, typer.Option("--from", help="A best.pt; default: that of the latest run.")]
MAX_SEED = 2**32 - 1  # what scikit-learn takes
SPLITS = ["train", "val", "test"]
Trained = "Default: what the head was trained with."


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmcli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = (
        False
    ),
) -> None:
    pass


@app.command()
def featurize(
    data: Annotated[Path, typer.Argument(help="Folder of <guid>.jpg + <guid>.txt, or manifest .csv .jsonl .parquet.")],
    labels: Annotated[Path | None, typer.Option(help="CSV with header guid,tag; its place is recorded.")] = None,
    backbone: Annotated[
        str | None,
        typer.Option(
            help="Hub id, local folder, or `offline`; default: the cache's, else openai/clip-vit-base-patch32."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit or tag of the hub model.")] = None,
    out: Annotated[Path, typer.Option(help="The cache file to make or to add to.")] = CACHE,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Precision of the encoder.")] = "auto",
    views: Annotated[int, typer.Option(min=0, help="Also keep K augmented views of each image.")] = 0,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also keep the towers' last hidden states.")] = False,
    clean_text: Annotated[bool, typer.Option(help="Drop URLs and mentions, unwrap hashtags, lower-case.")] = True,
    resize: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Short side in pixels before the centre crop.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images, or texts, per call of the encoder.")] = 64,
    max_reject_rate: Annotated[float, typer.Option(min=0, max=1, help="Fail where more cannot be read.")] = 0.05,
    prune: Annotated[bool, typer.Option("--prune", help="Drop cached pairs that are no longer in DATA.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode every pair once and keep the embeddings in one file. Interrupted? Run it again: it goes on.

    Example: mmcli featurize tweets/ --labels train.txt --backbone offline
    """
    from .featurize import FeaturizeOptions
    from .featurize import featurize as run
    from .report.progress import ProgressLine
    from .report.tables import featurize_table
    from .report.terminal import note, print_json, print_parts

    options = FeaturizeOptions(
        backbone=backbone,
        revision=revision,
        dtype=dtype,
        device=device,
        views=views,
        tokens=tokens,
        clean=clean_text,
        resize=resize,
        batch_size=batch_size,
        max_reject_rate=max_reject_rate,
        prune=prune,
    )
    try:
        with ProgressLine("featurize") as progress:
            summary = asdict(run(data, labels, out, options, progress))
    except KeyboardInterrupt:
        note("interrupted: what was finished is kept; run the same command again to go on")
        raise typer.Exit(130) from None
    if as_json:
        print_json(summary)
    else:
        where = "" if out == CACHE else f"--cache {out} "
        print_parts(featurize_table(summary, f"mmcli train-head {where}--fusion concat"))


@cache_app.command()
def info(cache: CacheArgument = CACHE, as_json: Json = False) -> None:
    """Say what a cache holds and what it was made from.

    Example: mmcli cache info artifacts/features.h5
    """
    from .cache import FeatureCache
    from .report.tables import flat, pairs_table
    from .report.terminal import print_json, print_parts

    with FeatureCache.open(cache) as opened:
        result = opened.describe()
    if as_json:
        print_json(result)
    else:
        print_parts(pairs_table({name: flat(value) for name, value in result.items()}))


@cache_app.command()
def verify(
    cache: CacheArgument = CACHE,
    data: Annotated[Path | None, typer.Option(help="Where the raw pairs are now; default: as recorded.")] = None,
    as_json: Json = False,
) -> None:
    """Read the raw pairs again: which rows are out of date, which have lost their source, which are not sound.

    Example: mmcli cache verify artifacts/features.h5
    """
    from .cache import CacheError, FeatureCache
    from .cache.verify import verify as run
    from .featurize import Dataset
    from .report.tables import counted, pairs_table
    from .report.terminal import print_json, print_parts

    with FeatureCache.open(cache) as opened:
        there = {pair.guid: pair for pair in Dataset.open(data or opened.header.dataset["data"]).pairs}
        report = run(opened, lambda guid: there[guid].digests() if guid in there else None)
    found = {name: guids for name, guids in asdict(report).items() if name != "rows"}
    if as_json:
        print_json({"rows": report.rows, "sound": report.sound, **found})
    else:
        print_parts(pairs_table({"rows": report.rows} | {name: counted(guids) for name, guids in found.items()}))
    if not report.sound:
        raise CacheError(
            f"{cache} has rows that do not agree with their sources: run `mmcli featurize` again, with --prune to drop "
            "those whose source is gone"
        )


@cache_app.command()
def export(
    cache: CacheArgument = CACHE,
    npy: Annotated[Path | None, typer.Option(help="Folder for image.npy, text.npy and guids.txt.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Parquet file with guid, image, text.")] = None,
    as_json: Json = False,
) -> None:
    """Write the embeddings as NumPy or Parquet files.

    Example: mmcli cache export artifacts/features.h5 --npy exported/
    """
    from .cache import FeatureCache
    from .cache.export import export_npy, export_parquet
    from .report.terminal import print_json, print_parts

    if npy is None and parquet is None:
        raise typer.BadParameter("give --npy FOLDER, --parquet FILE, or both")
    with FeatureCache.open(cache) as opened:
        written = [] if npy is None else export_npy(opened, npy)
        written += [] if parquet is None else export_parquet(opened, parquet)
    names = [str(path) for path in written]
    if as_json:
        print_json({"written": names})
    else:
        print_parts(*names)


@app.command("train-head")
def train_head(
    context: typer.Context,
    cache: Annotated[
        Path | None, typer.Option(help=f"What featurize wrote; default: {CACHE}, with --full that of the run.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="CSV guid,tag; default: the one recorded in the cache.")] = None,
    fusion: Annotated[str, typer.Option(help="How image and text are joined: concat.")] = "concat",
    modality: Annotated[Literal["both", "text", "image"], typer.Option(help="What the head sees.")] = "both",
    epochs: Annotated[int, typer.Option(min=1, help="At most this many.")] = 60,
    patience: Annotated[int, typer.Option(min=1, help="Epochs without a better validation macro-F1.")] = 12,
    batch_size: Annotated[int, typer.Option(min=2, help="Rows per step.")] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.05,
    dropout: Annotated[float, typer.Option(min=0, max=0.99, help="After each hidden layer.")] = 0.5,
    class_weights: Annotated[
        Literal["none", "inverse", "sqrt", "effective"], typer.Option(help="Against imbalance.")
    ] = "sqrt",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of weights, order and dropout.")] = 42,
    split_dir: Annotated[Path | None, typer.Option(help="Reuse the splits/ folder of another run.")] = None,
    split_seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the 8:1:1 split.")] = 42,
    full: Annotated[
        bool, typer.Option("--full", help="Train the run of --from again on all labelled rows, for its best epochs.")
    ] = False,
    source: Annotated[Path | None, typer.Option("--from", help="With --full; default: the latest of --runs.")] = None,
    runs: Annotated[Path, typer.Option(help="Where the run folder goes.")] = RUNS,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Train a head on cached features, in seconds, and write a run folder.

    Example: mmcli train-head --fusion concat --modality both
    """
    _recipe_or_full(context, full)
    from .featurize.loading import choose_device
    from .heads import Recipe
    from .heads import train_full as run_full
    from .heads import train_head as run
    from .report.tables import run_table, score_tables
    from .report.terminal import note, print_json, print_parts

    where = choose_device(device)
    if full:
        result = run_full(source or runs / "latest", cache, labels, runs, where)
    else:
        recipe = Recipe(
            fusion=fusion,
            modality=modality,
            epochs=epochs,
            patience=patience,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            dropout=dropout,
            class_weights=class_weights,
            seed=seed,
        )
        result = run(cache or CACHE, labels, recipe, split_dir, split_seed, runs, where)
    if result["labels_without_features"]:
        note(f"note: {result['labels_without_features']} labels are of pairs without features; left out")
    if as_json:
        print_json(result)
    else:
        parts = {name: result[name] for name in SPLITS if name in result}
        where = "" if runs == RUNS else f"--from {runs / 'latest' / 'best.pt'} "
        next_command = f"mmcli predict {where}--ids FILE --out submission.txt"
        print_parts(*score_tables(parts, result["classes"]), run_table(result, next_command))


def _recipe_or_full(context: typer.Context, full: bool) -> None:
    """Refuse options of the recipe beside --full, which takes its recipe from a run, and --from without it."""
    recipe = (
        "fusion modality epochs patience batch_size lr weight_decay dropout class_weights seed split_dir split_seed"
    )
    for name in recipe.split() if full else ["source"]:
        given = context.get_parameter_source(name)
        if given is not None and given.name == "COMMANDLINE":
            option = "--from" if name == "source" else "--" + name.replace("_", "-")
            why = "cannot go with --full, which takes the recipe of --from" if full else "needs --full"
            raise typer.BadParameter(f"{option} {why}")


@app.command()
def evaluate(
    source: From = BEST,
    on: Annotated[
        Literal["held-out", "val", "test", "train", "new"],
        typer.Option(help="Rows to score. held-out: val and test; new: labelled rows that the run has not seen."),
    ] = "held-out",
    cache: Annotated[Path | None, typer.Option(help=Trained)] = None,
    labels: Annotated[Path | None, typer.Option(help=Trained)] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Score a trained head, with intervals.

    Example: mmcli evaluate --from artifacts/runs/latest/best.pt --on test
    """
    from .featurize.loading import choose_device
    from .heads import evaluate as run
    from .report.tables import score_tables, shown_path
    from .report.terminal import note, print_json, print_parts

    parts: list[str] = ["val", "test"] if on == "held-out" else [on]
    result = run(source, cache, parts, labels, choose_device(device))
    if result["labels_without_features"]:
        note(f"note: {result['labels_without_features']} labels are of pairs without features; left out")
    if as_json:
        print_json(result)
    else:
        print_parts(f"{result['modality']}, {result['fusion']}: {shown_path(result['best_pt'])}")
        print_parts(*score_tables({name: result[name] for name in parts}, result["classes"]))


@app.command()
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
    from .cache.atomic import refuse_to_overwrite
    from .heads import predict as run
    from .report.progress import ProgressLine
    from .report.terminal import note, print_json, print_parts

    pair = None if image is None or text is None else (image, text)
    if out is not None:
        refuse_to_overwrite(out, b"guid", [source, *(path for path in (ids, data, image, cache) if path)])
        out.parent.mkdir(parents=True, exist_ok=True)
    with ProgressLine("encode") as progress:
        found = run(source, ids, data, pair, cache, backbone, device, progress)
    note(f"head: {found.head}")
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
        sys.stdout.write(found.to_csv(probs))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the sample dataset and the runs go.")] = Path("artifacts/demo"),
    pairs: Annotated[int, typer.Option(min=60, help="Size of the sample dataset.")] = 360,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample dataset.")] = 0,
    as_json: Json = False,
) -> None:
    """Make a small dataset, featurize it, train on text, on image and on both, and show the scores.

    Example: mmcli demo
    """
    from .heads.demo import run_demo
    from .report.progress import ProgressLine
    from .report.tables import demo_hints, runs_table
    from .report.terminal import note, print_json, print_parts

    note(f"{pairs} pairs into {out}; mmcli featurize {out}/data --labels {out}/labels.csv --backbone offline")
    with ProgressLine("featurize") as progress:
        result = run_demo(out, pairs, seed, progress)
    if as_json:
        print_json(result)
        return
    print_parts(runs_table(result["runs"]), *demo_hints(out))


def main() -> None:
    """Run the command line. Exit code 0 done, 1 ``MmcliError`` (one line on stderr), 2 usage, 130 interrupted."""
    try:
        app()
    except Exception as error:
        from .cache.errors import MmcliError  # here, because help must not wait for h5py

        if isinstance(error, MmcliError):
            message = " ".join(str(error).split())
        elif isinstance(error, OSError) and error.errno is not None:  # no permission, a closed pipe, a full disk
            message = f"{error.strerror}" if error.filename is None else f"{error.filename}: {error.strerror}"
        else:
            raise
        sys.stderr.write(f"error: {message}\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
