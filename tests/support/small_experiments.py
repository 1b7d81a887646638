"""What tests of runs and experiments share: quick recipes, labels files, and what a result folder holds."""

import csv
from pathlib import Path

from mmcli.heads import Recipe
from mmcli.heads.experiments import Protocol
from mmcli.heads.model.fusions import FUSIONS

QUICK = Recipe(epochs=3, hidden=(8,), lr=5e-3)
LEARNS = Recipe(epochs=30, hidden=(32,), lr=1e-2)
POOLED = [name for name, fusion in FUSIONS.items() if not fusion.needs_tokens]
SMALL = Protocol(folds=3, repeats=2)


def out_of_fold(folder):
    """Return the rows of ``out_of_fold.csv`` in a result folder."""
    with (Path(folder) / "out_of_fold.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_tags(path, tags):
    path.write_text("guid,tag\n" + "".join(f"{guid},{tag}\n" for guid, tag in tags.items()))
    return path
