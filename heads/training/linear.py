"""The linear head: L2 logistic regression by scikit-learn, like the linear probe of the CLIP paper."""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...cache.errors import MmcliError
from ..evaluation.folds import group_folds, groups_per_class
from ..model.fusions import refuse_weights
from ..model.head import Head
from ..model.inputs import Rows, batches
from ..model.losses import class_weights
from ..recipe import Recipe

_STRENGTHS = np.array([0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 1000.0])  # C times the number of rows, weakest penalty last
_WITHOUT_FOLDS = 2  # index of the strength to use where a class is too small for inner folds
_INNER_FOLDS = 3
_INNER_TOLERANCE = 1e-3
_WORSE_IN_A_ROW = 2  # the search stops after this many worse scores: weaker penalties are slow and seldom the best
_MAX_ITERATIONS = 500


def fit_linear(head: Head, recipe: Recipe, train: Rows, groups: NDArray[np.int64] | None) -> float:
    """Set the linear layers of ``head`` to L2 logistic regressions on its standardised inputs, and return C.

    C is chosen by macro-F1 over inner folds, which keep the rows of a group, (n,), together. Radford et al., Learning
    Transferable Visual Models From Natural Language Supervision, 2021, appendix A.3, sweep it on validation rows
    instead. Late fusion has two C, and the result is the C of the text head. Raise an MmcliError if the fusion has
    weights, which a logistic regression cannot learn, or if rows are left in the file.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    refuse_weights(type(head.fusion), recipe.fusion)
    if train.features.places is not None:
        raise MmcliError(
            f"a linear head needs all {len(train)} training rows in memory, and they do not fit: raise --max-memory, "
            "or train with --head mlp"
        )
    weights = class_weights(np.bincount(train.classes, minlength=head.n_classes), recipe.class_weights)
    weight_of = dict(enumerate(weights.tolist()))
    device = str(next(head.parameters()).device)
    with torch.no_grad():
        fused = [head.fusion(head.standardised(batch)) for batch in batches(train.features, False, device)]
    chosen = 0.0
    for part, mlp in enumerate(head.mlps):
        inputs = torch.cat([outputs[part] for outputs in fused]).cpu().numpy()
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # separable classes do not converge at a weak penalty
            chosen = _best_c(inputs, train.classes, weight_of, groups, recipe.seed)
            model = LogisticRegression(C=chosen, class_weight=weight_of, max_iter=_MAX_ITERATIONS)
            model.fit(inputs, train.classes)
        (layer,) = mlp.children()
        assert isinstance(layer, nn.Linear)
        binary = head.n_classes == 2  # then scikit-learn has only the logit of the second class
        weight = np.vstack([0 * model.coef_, model.coef_]) if binary else model.coef_
        bias = np.concatenate([[0.0], model.intercept_]) if binary else model.intercept_
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return chosen


def _best_c(
    inputs: NDArray[np.float32],
    classes: NDArray[np.int64],
    weight_of: dict[int, float],
    groups: NDArray[np.int64] | None,
    seed: int,
) -> float:
    """Return the smallest C with the best macro-F1 over inner folds; too few rows for folds get a fixed strength."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    rows = np.arange(len(classes)) if groups is None else groups
    strengths = _STRENGTHS / len(classes)
    present = np.unique(classes)
    if groups_per_class(classes, rows, int(present[-1]) + 1)[present].min() < _INNER_FOLDS:
        return float(strengths[_WITHOUT_FOLDS])
    folds = group_folds(classes, rows, _INNER_FOLDS, seed)
    settings = {"class_weight": weight_of, "max_iter": _MAX_ITERATIONS, "tol": _INNER_TOLERANCE}
    models = [LogisticRegression(**settings, warm_start=True) for _ in folds]
    scores: list[float] = []
    for strength in strengths:  # a warm start takes the solution of the stronger penalty
        predicted = np.zeros_like(classes)
        for model, (inside, outside) in zip(models, folds, strict=True):
            model.set_params(C=strength).fit(inputs[inside], classes[inside])
            predicted[outside] = model.predict(inputs[outside])
        scores.append(f1_score(classes, predicted, average="macro"))
        if len(scores) > _WORSE_IN_A_ROW and max(scores[-_WORSE_IN_A_ROW:]) < max(scores):
            break
    return float(strengths[int(np.argmax(scores))])
