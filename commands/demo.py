"""demo: the whole job on a small dataset that is made on the spot."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from .options import DataOption, Options, OutputOption


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """Make a small dataset, featurize it, train on text, on image and on both, and show the scores.

    Example: mmcli demo
    """

    goes_on = True
    pairs: Annotated[int, DataOption(min=60, help="Number of pairs in the sample dataset.")] = 360
    seed: Annotated[int, DataOption(min=0, help="Seed for the sample dataset.")] = 0
    out: Annotated[Path, OutputOption(help="Folder for the sample dataset and the runs.")] = Path("artifacts/demo")

    def run(self) -> None:
        """Featurize the sample with the offline backbone, train heads on text, image and both, and show the scores."""
        from ..cache.machine import keep_freed_memory
        from ..featurize import FeaturizeOptions, featurize
        from ..featurize.pairs.sample import make_sample
        from ..heads import Recipe, RunOptions, train_head
        from ..report.progress import ProgressLine
        from ..report.tables import demo_hints, runs_table
        from ..report.terminal import note

        folder, cache = self.out, self.out / "features.h5"
        note(
            f"{self.pairs} pairs into {folder}; "
            f"mmcli featurize {folder}/data --labels {folder}/labels.csv --backbone offline"
        )
        keep_freed_memory()
        with ProgressLine("featurize") as progress:
            data, labels = make_sample(folder, self.pairs, self.seed)
            featurize(data, labels, cache, FeaturizeOptions(backbone="offline"), progress)
            runs = {
                modality: train_head(cache, recipe=Recipe(modality=modality), options=RunOptions(folder / "runs"))
                for modality in ("text", "image", "both")
            }
        paths = {"data": str(data), "labels": str(labels), "cache": str(cache)}
        result = {**paths, "pairs": self.pairs, "runs": {name: run.to_dict() for name, run in runs.items()}}
        self.show(result, runs_table(runs), *demo_hints(folder))
