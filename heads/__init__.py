"""From cached embeddings to a trained head and its scores: fusions, MLP, training, splits, metrics, run folders.

Imports ``cache``, ``report``, and for prediction ``featurize``. Names are imported when they are asked for: PyTorch and
scikit-learn take seconds, and a recipe needs neither.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from .estimator import FusionClassifier
    from .fusions import FUSIONS
    from .inputs import Rows
    from .metrics import score
    from .model import Ensemble, Head
    from .predictor import Predictions, Predictor, predict
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
    "Predictor",
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

_MODULES = {
    "checkpoint": ("Checkpoint", "load_checkpoint", "save_checkpoint"),
    "estimator": ("FusionClassifier",),
    "fusions": ("FUSIONS",),
    "inputs": ("Rows",),
    "metrics": ("score",),
    "model": ("Ensemble", "Head"),
    "predictor": ("Predictions", "Predictor", "predict"),
    "recipe": ("Recipe",),
    "run": ("evaluate", "train_full", "train_head"),
    "splits": ("Split", "read_split", "stratified_split", "write_split"),
    "training": ("Fit", "fit", "predict_logits"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
