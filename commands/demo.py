"""The whole job on a small dataset that is made on the spot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..featurize import FeaturizeOptions, featurize
from ..featurize.pairs.sample import make_sample
from ..heads.recipe import Recipe
from ..heads.runs.trainer import train_head


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
    folder = Path(folder)
    data, labels = make_sample(folder, pairs, seed)
    cache = folder / "features.h5"
    featurize(data, labels, cache, FeaturizeOptions(backbone="offline"), on_progress)
    runs = {
        modality: train_head(cache, recipe=Recipe(modality=modality), runs=folder / "runs")
        for modality in ("text", "image", "both")
    }
    return {"data": str(data), "labels": str(labels), "cache": str(cache), "pairs": pairs, "runs": runs}
