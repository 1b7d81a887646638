"""The whole job from Python: from pairs to a cache, from the cache to a head, from the head to predictions.

Run it with ``python examples/quickstart.py``. It makes its own sample dataset and needs the extra ``offline``.
"""

import sys
import tempfile
from pathlib import Path

from mmcli.cache import FeatureCache
from mmcli.featurize import FeaturizeOptions, featurize
from mmcli.featurize.pairs.sample import make_sample
from mmcli.heads import Recipe, RunOptions, predict, train_head


def main(folder: Path, pairs: int = 240) -> None:
    """Do the whole job inside ``folder``."""
    data, labels = make_sample(folder, pairs)

    # Once: encode every pair. A second call with nothing changed encodes nothing.
    summary = featurize(data, labels, folder / "features.h5", FeaturizeOptions(backbone="offline"))
    print(f"{summary.rows} rows of {summary.backbone}, {summary.rejects} rejects")

    # The cache holds plain arrays, matched by guid.
    with FeatureCache.open(folder / "features.h5") as cache:
        image, text = cache.embeddings(["1", "2", "3"])
        print("image", image.shape, "text", text.shape)

    # As often as you like: train a head within seconds.
    for modality in ("text", "image", "both"):
        run = train_head(folder / "features.h5", recipe=Recipe(modality=modality), options=RunOptions(folder / "runs"))
        low, high = run.scores["test"].macro_f1_ci
        print(f"{modality}: test macro-F1 {run.scores['test'].macro_f1:.3f} [{low:.3f}, {high:.3f}]")

    # One new pair.
    predictions = predict(run.best_pt, pair=(data / "1.jpg", "what a wonderful day"))
    print(predictions.labels[0], dict(zip(predictions.classes, predictions.probs[0].round(3).tolist(), strict=True)))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
