"""demo: the whole job on a small dataset that is made on the spot."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from .command import DataOption, Options, OutputOption
from .options import GO_ON

if TYPE_CHECKING:
    from ..heads import RunResult


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
            runs = run_demo(folder, self.pairs, self.seed, progress)
        if self.as_json:
            paths = {name: str(folder / name) for name in ("data", "labels.csv", "features.h5")}
            made = dict(zip(("data", "labels", "cache"), paths.values(), strict=True))
            print_json({**made, "pairs": self.pairs, "runs": {name: run.to_dict() for name, run in runs.items()}})
        else:
            print_parts(runs_table(runs), *demo_hints(folder))


def run_demo(
    folder: Path, pairs: int, seed: int, on_progress: "Callable[[int, int], None] | None" = None
) -> "dict[str, RunResult]":
    """Make a sample dataset, featurize it with the offline backbone, and train heads on text, image and both."""
    from ..featurize import FeaturizeOptions, featurize
    from ..featurize.pairs.sample import make_sample
    from ..heads import Recipe, RunOptions, train_head

    data, labels = make_sample(folder, pairs, seed)
    cache = folder / "features.h5"
    featurize(data, labels, cache, FeaturizeOptions(backbone="offline"), on_progress)
    options = RunOptions(folder / "runs")
    return {
        modality: train_head(cache, recipe=Recipe(modality=modality), options=options)
        for modality in ("text", "image", "both")
    }
