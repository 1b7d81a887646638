"""demo: the whole job on a small dataset that is made on the spot."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from .command import DataOption, Options, OutputOption
from .options import GO_ON


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """Make a small dataset, featurize it, train on text, on image and on both, and show the scores.

    Example: mmcli demo
    """

    pairs: Annotated[int, DataOption(min=60, help="Number of pairs in the sample dataset.")] = 360
    seed: Annotated[int, DataOption(min=0, help="Seed for the sample dataset.")] = 0
    out: Annotated[Path, OutputOption(help="Folder for the sample dataset and the runs.")] = Path("artifacts/demo")

    def interrupted(self) -> str:
        """Say that the same command goes on."""
        return GO_ON

    def run(self) -> None:
        """Run the demo, and show the scores."""
        from ..cache.machine import keep_freed_memory
        from ..report.progress import ProgressLine
        from ..report.tables import demo_hints, runs_table
        from ..report.terminal import note, print_json, print_parts

        folder = self.out
        note(
            f"{self.pairs} pairs into {folder}; "
            f"mmcli featurize {folder}/data --labels {folder}/labels.csv --backbone offline"
        )
        keep_freed_memory()
        with ProgressLine("featurize") as progress:
            result = run_demo(folder, self.pairs, self.seed, progress)
        if self.as_json:
            print_json(result)
        else:
            print_parts(runs_table(result["runs"]), *demo_hints(folder))


def run_demo(
    folder: str | Path,
    pairs: int = 360,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Make a sample dataset, featurize it with the offline backbone, train heads on text, image and both.

    Returns
    -------
    dict
        ``data``, ``labels``, ``cache`` (paths), ``pairs``, and ``runs``: what ``train_head`` returned for ``text``,
        ``image`` and ``both``.
    """
    from ..featurize import FeaturizeOptions, featurize
    from ..featurize.pairs.sample import make_sample
    from ..heads.recipe import Recipe
    from ..heads.runs.trainer import train_head

    folder = Path(folder)
    data, labels = make_sample(folder, pairs, seed)
    cache = folder / "features.h5"
    featurize(data, labels, cache, FeaturizeOptions(backbone="offline"), on_progress)
    runs = {
        modality: train_head(cache, recipe=Recipe(modality=modality), runs=folder / "runs")
        for modality in ("text", "image", "both")
    }
    return {"data": str(data), "labels": str(labels), "cache": str(cache), "pairs": pairs, "runs": runs}
