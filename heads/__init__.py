"""From cached embeddings to a trained head and its scores: fusions, MLP, training, splits, metrics, run folders.

Imports ``cache``, ``report``, and for prediction ``featurize``.
"""

from typing import Any

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .fusions import FUSIONS
from .inputs import Rows
from .metrics import score
from .model import Ensemble, Head
from .predict import Predictions, predict
from .recipe import Recipe
from .run import evaluate, train_full, train_head
from .splits import Split, read_split, stratified_split, write_split
from .training import Fit, fit, predict_logits

__all__ = [
    "FUSIONS",
    "Checkpoint",
    "Ensemble",
    "Fit",
    "FusionClassifier",
    "Head",
    "Predictions",
    "Recipe",
    "Rows",
    "Split",
    "evaluate",
    "fit",
    "load_checkpoint",
    "predict",
    "predict_logits",
    "read_split",
    "save_checkpoint",
    "score",
    "stratified_split",
    "train_full",
    "train_head",
    "write_split",
]


def __getattr__(name: str) -> Any:
    """Import ``FusionClassifier`` when it is asked for: scikit-learn takes a second that training does without."""
    if name == "FusionClassifier":
        from .estimator import FusionClassifier

        return FusionClassifier
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
