"""The linear head: L2 logistic regression by scikit-learn, as in the CLIP paper's linear probe."""

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
_WITHOUT_FOLDS = 2  # which of them is taken where a class is too small for inner folds
_INNER_FOLDS = 3
_INNER_TOLERANCE = 1e-3
_WORSE_IN_A_ROW = 2  # worse scores after which weaker penalties are not tried: they are slow, and seldom the best
_MAX_ITERATIONS = 500


def fit_linear(
    head: Head, recipe: Recipe, n_classes: int, train: Rows, groups: NDArray[np.int64] | None = None
) -> float:
    """Set the linear layers of ``head`` to L2 logistic regressions on its standardised inputs.

    C is chosen by inner cross-validated macro-F1 (Radford et al., Learning Transferable Visual Models From Natural
    Language Supervision, 2021, appendix A.3 sweeps it on validation rows instead).

    Parameters
    ----------
    head
        With learned inputs; its fusion must have no weights of its own.
    groups
        (n,): rows of one group stay on one side of the inner folds.

    Returns
    -------
    float
        The C chosen; of late fusion, that of the text head.

    Raises
    ------
    MmcliError
        The fusion has weights that a logistic regression cannot learn; the rows are left in the file.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    refuse_weights(type(head.fusion), recipe.fusion)
    if train.features.places is not None:
        raise MmcliError(
            f"a linear head needs all of its {len(train)} training rows in memory, which do not fit: raise "
            "--max-memory, or train with --head mlp"
        )
    weights = class_weights(np.bincount(train.classes, minlength=n_classes), recipe.class_weights)
    by_class = dict(enumerate(weights.tolist()))
    device = str(next(head.parameters()).device)
    with torch.no_grad():
        seen = [head.fusion(head.standardised(batch)) for batch in batches(train.features, False, device)]
    chosen = 0.0
    for part, mlp in enumerate(head.mlps):
        inputs = torch.cat([each[part] for each in seen]).cpu().numpy()
        with warnings.catch_warnings(), threadpool_limits(1):
            warnings.simplefilter("ignore", ConvergenceWarning)  # where C is weak, the classes are separable
            chosen = _choose(inputs, train.classes, by_class, groups, recipe.seed)
            model = LogisticRegression(C=chosen, class_weight=by_class, max_iter=_MAX_ITERATIONS)
            model.fit(inputs, train.classes)
        (layer,) = mlp.children()
        assert isinstance(layer, nn.Linear)
        binary = n_classes == 2  # scikit-learn then keeps one row: the logit of the second class
        weight = np.vstack([0 * model.coef_, model.coef_]) if binary else model.coef_
        bias = np.concatenate([[0.0], model.intercept_]) if binary else model.intercept_
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(weight))
            layer.bias.copy_(torch.from_numpy(bias))
    return chosen


def _choose(
    inputs: NDArray[np.float32],
    classes: NDArray[np.int64],
    by_class: dict[int, float],
    groups: NDArray[np.int64] | None,
    seed: int,
) -> float:
    """Return the C with the best macro-F1 over inner folds, of equals the smallest; a middling one for too few rows."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    rows = np.arange(len(classes)) if groups is None else groups
    strengths = _STRENGTHS / len(classes)
    present = np.unique(classes)
    if groups_per_class(classes, rows, int(present[-1]) + 1)[present].min() < _INNER_FOLDS:
        return float(strengths[_WITHOUT_FOLDS])
    folds = group_folds(classes, rows, _INNER_FOLDS, seed)
    settings = {"class_weight": by_class, "max_iter": _MAX_ITERATIONS, "tol": _INNER_TOLERANCE}
    models = [LogisticRegression(**settings, warm_start=True) for _ in folds]
    scores: list[float] = []
    for strength in strengths:  # each starts from the solution of the stronger penalty
        predicted = np.zeros_like(classes)
        for model, (inside, outside) in zip(models, folds, strict=True):
            model.set_params(C=strength).fit(inputs[inside], classes[inside])
            predicted[outside] = model.predict(inputs[outside])
        scores.append(f1_score(classes, predicted, average="macro"))
        if len(scores) > _WORSE_IN_A_ROW and max(scores[-_WORSE_IN_A_ROW:]) < max(scores):
            break
    return float(strengths[int(np.argmax(scores))])
