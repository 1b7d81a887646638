"""featurize, and cache info | verify | export."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import CACHE, INTERRUPTED, CacheArgument, Device, Json


def featurize(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of <guid>.jpg + <guid>.txt, or manifest .csv .jsonl .parquet. Default: the cache's."
        ),
    ] = None,
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
    clean_text: Annotated[
        bool | None,
        typer.Option(
            "--clean-text/--no-clean-text",
            help="Drop URLs and mentions, unwrap hashtags, lower-case. Default: as in the cache, else yes.",
        ),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option(help="Codec of all texts, such as cp1251. Default: found out for each text.")
    ] = None,
    resize: Annotated[
        int | None,
        typer.Option(min=1, max=4096, help="Short side in pixels before the centre crop. Default: as in the cache."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per call of the encoder. Default: what suits the device.")
    ] = None,
    max_reject_rate: Annotated[float, typer.Option(min=0, max=1, help="Fail where more cannot be read.")] = 0.05,
    prune: Annotated[bool, typer.Option("--prune", help="Drop cached pairs that are no longer in DATA.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Encode every pair once and keep the embeddings in one file. Interrupted? Run it again: it goes on.

    Example: mmcli featurize tweets/ --labels train.txt --backbone offline
    """
    if data is None and not out.is_file():
        raise typer.BadParameter(f"give DATA, a folder or a manifest: {out} is not there to say where it is")
    from ..cache import FeatureCache
    from ..cache.machine import keep_freed_memory
    from ..featurize import FeaturizeOptions
    from ..featurize import featurize as run
    from ..report.progress import ProgressLine
    from ..report.tables import featurize_table
    from ..report.terminal import note, print_json, print_parts

    options = FeaturizeOptions(
        backbone=backbone,
        revision=revision,
        dtype=dtype,
        device=device,
        views=views,
        tokens=tokens,
        clean=clean_text,
        encoding=encoding,
        resize=resize,
        batch_size=batch_size,
        max_reject_rate=max_reject_rate,
        prune=prune,
    )
    if data is None:
        with FeatureCache.open(out) as recorded:
            data = Path(recorded.header.dataset["data"])
    keep_freed_memory()
    try:
        with ProgressLine("featurize") as progress:
            summary = run(data, labels, out, options, progress).to_dict()
    except KeyboardInterrupt:
        note(INTERRUPTED)
        raise typer.Exit(130) from None
    if as_json:
        print_json(summary)
    else:
        where = "" if out == CACHE else f"--cache {out} "
        print_parts(featurize_table(summary, f"mmcli train-head {where}--fusion concat"))


def info(cache: CacheArgument = CACHE, as_json: Json = False) -> None:
    """Say what a cache holds and what it was made from.

    Example: mmcli cache info artifacts/features.h5
    """
    from ..cache import DataError, FeatureCache
    from ..featurize import Dataset
    from ..featurize.summary import count_labels, count_rows, count_without_files
    from ..report.tables import content_rows, flat, pairs_table
    from ..report.terminal import print_json, print_parts

    with FeatureCache.open(cache) as opened:
        result = opened.describe() | {"content": count_rows(opened).to_dict()}
        recorded = opened.header.dataset
        try:
            dataset = Dataset.open(recorded["data"], recorded["labels"])
        except DataError as error:
            result["dataset_problem"] = str(error)
        else:
            result["labels"] = count_labels(dataset, opened.guids, len(opened)).to_dict()
            result["without_files"] = count_without_files(dataset, opened.guids)
    if as_json:
        print_json(result)
        return
    content, labels = result.pop("content"), result.pop("labels", {"file": None})
    without = result.pop("without_files", {"rows": 0})
    if without["rows"]:
        result["without files"] = (
            f"{without['rows']:,} rows whose files are not both there, such as {without['example']!r}"
        )
    del result["codecs"], result["truncated"]
    lines = {name: flat(value) for name, value in result.items()}
    print_parts(pairs_table(lines | content_rows(content, labels)))


def verify(
    cache: CacheArgument = CACHE,
    data: Annotated[Path | None, typer.Option(help="Where the raw pairs are now; default: as recorded.")] = None,
    as_json: Json = False,
) -> None:
    """Read the raw pairs again: which rows are out of date, which have lost their source, which are not sound.

    Example: mmcli cache verify artifacts/features.h5
    """
    from ..cache import CacheError, FeatureCache
    from ..cache.verify import verify as run
    from ..featurize import Dataset
    from ..report.tables import counted, pairs_table
    from ..report.terminal import print_json, print_parts

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


def export(
    cache: CacheArgument = CACHE,
    npy: Annotated[Path | None, typer.Option(help="Folder for image.npy, text.npy and guids.txt.")] = None,
    parquet: Annotated[Path | None, typer.Option(help="Parquet file with guid, image, text.")] = None,
    as_json: Json = False,
) -> None:
    """Write the embeddings as NumPy or Parquet files.

    Example: mmcli cache export artifacts/features.h5 --npy exported/
    """
    from ..cache import FeatureCache
    from ..cache.export import export_npy, export_parquet
    from ..report.terminal import print_json, print_parts

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
