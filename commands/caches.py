"""featurize, and cache info | verify | export."""

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .options import CACHE, CacheArgument, DataOption, Device, EncoderOption, Options, OutputOption, RecordedData

if TYPE_CHECKING:
    from ..featurize import Dataset


@dataclass(frozen=True, kw_only=True)
class Featurize(Options):
    """Encode every pair once and keep the embeddings in one file. Interrupted? Run it again: it goes on.

    Example: mmcli featurize tweets/ --labels train.txt --backbone offline
    """

    goes_on = True
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Folder of <guid>.jpg and <guid>.txt, or manifest .csv .jsonl .parquet. Default: as in the cache.",
            rich_help_panel="Data",
        ),
    ] = None
    labels: Annotated[Path | None, DataOption(help="CSV with the header guid,tag; the cache records its path.")] = None
    clean: Annotated[
        bool | None,
        DataOption(
            "--clean-text/--no-clean-text",
            help="Drop URLs and mentions, unwrap hashtags, lower-case. Default: as in the cache, else yes.",
        ),
    ] = None
    encoding: Annotated[
        str | None, DataOption(help="Codec of all texts, such as cp1251. Default: detected for each text.")
    ] = None
    max_reject_rate: Annotated[
        float, DataOption(min=0, max=1, help="Largest share of pairs that may be unreadable; above it, fail.")
    ] = 0.05
    columns: Annotated[
        str | None,
        DataOption(
            help="Columns of a manifest: guid=id,image=img,text=title+description,label=category. Default: as in the "
            "cache, else by their usual names."
        ),
    ] = None
    image_root: Annotated[
        Path | None, DataOption(help="Folder of the images of a manifest. Default: as in the cache, else its folder.")
    ] = None
    prune: Annotated[bool, DataOption("--prune", help="Drop cached pairs that are no longer in DATA.")] = False
    backbone: Annotated[
        str | None,
        EncoderOption(
            help="Hub id, local folder, or `offline`. Default: as in the cache, else openai/clip-vit-base-patch32."
        ),
    ] = None
    revision: Annotated[str | None, EncoderOption(help="Commit or tag of the hub model.")] = None
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], EncoderOption(help="Precision of the encoder.")] = "auto"
    views: Annotated[int, EncoderOption(min=0, help="Number of augmented views of each image to keep as well.")] = 0
    tokens: Annotated[bool, EncoderOption("--tokens", help="Keep the last hidden states of both towers as well.")] = (
        False
    )
    resize: Annotated[
        int | None,
        EncoderOption(min=1, max=4096, help="Short side in pixels before the centre crop. Default: as in the cache."),
    ] = None
    batch_size: Annotated[
        int | None, EncoderOption(min=1, help="Images per call of the encoder. Default: what suits the device.")
    ] = None
    out: Annotated[Path, OutputOption(help="Cache file to make or to add to.")] = CACHE
    device: Device = "auto"

    def run(self) -> None:
        """Featurize, and show what was done."""
        if self.data is None and not self.out.is_file():
            raise typer.BadParameter(f"give DATA, a folder or a manifest: there is no cache {self.out} that names it")
        from ..cache import FeatureCache
        from ..cache.labels import parse_columns
        from ..cache.machine import keep_freed_memory
        from ..featurize import FeaturizeOptions, featurize
        from ..report.progress import ProgressLine
        from ..report.tables import featurize_table

        typed = {field.name: getattr(self, field.name) for field in fields(FeaturizeOptions)}
        columns = None if self.columns is None else parse_columns(self.columns)
        options = FeaturizeOptions(**typed | {"columns": columns})
        data = self.data
        if data is None:
            with FeatureCache.open(self.out) as recorded:
                data = Path(recorded.header.dataset["data"])
        keep_freed_memory()
        with ProgressLine("featurize") as progress:
            summary = featurize(data, self.labels, self.out, options, progress, _say_how_understood).to_dict()
        cache = "" if self.out == CACHE else f"--cache {self.out} "
        self.show(summary, featurize_table(summary, f"mmcli train-head {cache}--fusion concat"))


@dataclass(frozen=True, kw_only=True)
class Info(Options):
    """Say what a cache holds and what it was made from.

    Example: mmcli cache info artifacts/features.h5
    """

    cache: CacheArgument = CACHE

    def run(self) -> None:
        """Describe the cache, and count its texts and labels."""
        from ..cache import DataError, FeatureCache
        from ..featurize import Dataset
        from ..featurize.summary import count_labels, count_rows, count_without_files
        from ..report.tables import info_table

        with FeatureCache.open(self.cache) as cache:
            result = cache.describe() | {"content": asdict(count_rows(cache))}
            recorded = cache.header.dataset
            try:
                dataset = Dataset.recorded(recorded, labels=True)
            except DataError as error:
                result["dataset_problem"] = str(error)
            else:
                result["labels"] = asdict(count_labels(dataset, cache.guids, len(cache)))
                result["without_files"] = count_without_files(dataset, cache.guids)
        self.show(result, info_table(result))


@dataclass(frozen=True, kw_only=True)
class Verify(Options):
    """Compare a cache with its raw pairs: list rows that are out of date, without a source, or not sound.

    Example: mmcli cache verify artifacts/features.h5
    """

    cache: CacheArgument = CACHE
    data: RecordedData = None

    def run(self) -> None:
        """Read the raw pairs again; rows that are not sound are an error."""
        from ..cache import CacheError, FeatureCache
        from ..cache.store import verify
        from ..featurize import Dataset
        from ..report.tables import counted, pairs_table

        with FeatureCache.open(self.cache) as cache:
            pairs = {pair.guid: pair for pair in Dataset.recorded(cache.header.dataset, self.data).pairs}
            problems = verify(cache, lambda guid: pairs[guid].digests() if guid in pairs else None)
            rows, sound = len(cache), not any(problems.values())
        listed = {name: counted(guids) for name, guids in problems.items()}
        self.show({"rows": rows, "sound": sound, **problems}, pairs_table({"rows": rows, **listed}))
        if not sound:
            raise CacheError(
                f"{self.cache} has rows that do not agree with their sources: run `mmcli featurize` again; --prune "
                "drops those without a source"
            )


@dataclass(frozen=True, kw_only=True)
class Export(Options):
    """Write the embeddings as NumPy or Parquet files.

    Example: mmcli cache export artifacts/features.h5 --npy exported/
    """

    cache: CacheArgument = CACHE
    npy: Annotated[Path | None, OutputOption(help="Folder for image.npy, text.npy and guids.txt.")] = None
    parquet: Annotated[Path | None, OutputOption(help="Parquet file with the columns guid, image, text.")] = None

    def run(self) -> None:
        """Write the files that were asked for."""
        if self.npy is None and self.parquet is None:
            raise typer.BadParameter("give --npy FOLDER, --parquet FILE, or both")
        from ..cache import FeatureCache
        from ..cache.export import export_npy, export_parquet

        with FeatureCache.open(self.cache) as cache:
            written = [] if self.npy is None else export_npy(cache, self.npy)
            written += [] if self.parquet is None else export_parquet(cache, self.parquet)
        names = [str(path) for path in written]
        self.show({"written": names}, *names)


def _say_how_understood(dataset: "Dataset") -> None:
    from ..featurize.summary import describe_manifest
    from ..report.terminal import note

    for line in describe_manifest(dataset):
        note(line)
