"""From cached embeddings to a trained head and its scores: fusions, MLP, training, splits, metrics, run folders.

Imports ``cache``, ``report``, and for prediction ``featurize``.
"""

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .fusions import FUSIONS
from .metrics import score
from .model import Head
from .predict import Predictions, predict
from .run import evaluate, train_full, train_head
from .splits import Split, read_split, stratified_split, write_split
from .training import Fit, Recipe, Rows, fit, predict_logits

__all__ = [
    "FUSIONS",
    "Checkpoint",
    "Fit",
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
