"""Losses, class weights and decision offsets for imbalanced labels."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...cache.errors import MmcliError
from ..recipe import Recipe

_BETA = 0.999  # Cui et al. use 0.9 to 0.9999 for the effective number
_MOST_PASSES = 20  # over the classes, to fit offsets

LossFunction = Callable[[Tensor, Tensor], Tensor]


def class_weights(counts: NDArray[np.int64], kind: str) -> NDArray[np.float32]:
    """Return a weight per class, (C,) float32 with mean 1, from the counts of the classes in the training rows.

    ``none`` weights all classes alike. ``inverse`` is proportional to 1 / count, and ``sqrt`` to its square root.
    ``effective`` is proportional to (1 - b) / (1 - b ** count) with b = 0.999 (Cui et al., Class-Balanced Loss Based on
    Effective Number of Samples, CVPR 2019). Raise an MmcliError where a class has no training row.
    """
    if (counts == 0).any():
        raise MmcliError(f"class number {int(np.argmin(counts))} has no training row")
    rows = counts.astype(np.float64)
    weights = {
        "none": np.ones_like(rows),
        "inverse": 1 / rows,
        "sqrt": np.sqrt(1 / rows),
        "effective": (1 - _BETA) / (1 - _BETA**rows),
    }[kind]
    return (weights / weights.mean()).astype(np.float32)


def focal_loss(logits: Tensor, classes: Tensor, weight: Tensor, gamma: float, smoothing: float = 0.0) -> Tensor:
    """Return the weighted mean of -(1 - p) ** gamma log p (Lin et al., Focal Loss for Dense Object Detection, 2017).

    At ``gamma=0`` it equals PyTorch's cross-entropy, and it has the same scale: the term of each class is multiplied by
    the class's weight, and the sum is divided by the summed weights of the true classes. ``logits`` are (n, C),
    ``classes`` (n,) int64 and ``weight`` (C,); ``smoothing`` is the share of the target spread over all classes.
    """
    n_classes = logits.shape[1]
    target = functional.one_hot(classes, n_classes).to(logits.dtype) * (1 - smoothing) + smoothing / n_classes
    log_probs = torch.log_softmax(logits, dim=1)
    # At p = 1 the power has no finite slope where gamma is below 1, and its slope times 0 would be NaN.
    missed = (-torch.expm1(log_probs)).clamp_min(torch.finfo(logits.dtype).tiny)
    terms = target * weight * missed**gamma * -log_probs
    return terms.sum() / weight[classes].sum()


def make_loss(recipe: Recipe, counts: NDArray[np.int64], device: str) -> LossFunction:
    """Return the loss of ``recipe``: a function of logits (n, C) and classes (n,), to be minimised.

    Logit adjustment adds tau log(class frequency) to the logits (Menon et al., Long-tail learning via logit adjustment,
    ICLR 2021, equation 10). Predictions use the logits without it. ``counts``, (C,), are the training rows by class.
    """
    weight = torch.from_numpy(class_weights(counts, recipe.class_weights)).to(device)
    frequency = torch.from_numpy(counts / counts.sum()).float().to(device)
    shift = recipe.logit_adjustment * torch.log(frequency)

    def loss(logits: Tensor, classes: Tensor) -> Tensor:
        adjusted = logits + shift
        if recipe.loss == "focal":
            return focal_loss(adjusted, classes, weight, recipe.focal_gamma, recipe.label_smoothing)
        return functional.cross_entropy(adjusted, classes, weight.to(adjusted), label_smoothing=recipe.label_smoothing)

    return loss


def fit_offsets(logits: NDArray[np.floating], classes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return a number per class, (C,) float32 with mean 0, that raises macro-F1 when it is added to the logits.

    Coordinate ascent changes one class at a time. It tries every value at which a prediction changes, so each step is
    exact, and keeps the middle of the best gap. Of several gaps that are as good, it keeps the nearest to no change.
    Fit the offsets on rows that the head was not trained on, with ``logits`` (n, C) and ``classes`` (n,), and score
    them on other rows.
    """
    scores = logits.astype(np.float64)
    n_classes = scores.shape[1]
    support = np.bincount(classes, minlength=n_classes)
    offsets = np.zeros(n_classes)
    for _ in range(_MOST_PASSES):
        before = offsets.copy()
        for number in np.flatnonzero(support).tolist():  # a class without rows gives no evidence for its offset
            offsets[number] += _best_shift(scores + offsets, classes, number, support)
        if np.array_equal(before, offsets):
            break
    return (offsets - offsets.mean()).astype(np.float32)


def _best_shift(
    scores: NDArray[np.float64], classes: NDArray[np.int64], chosen: int, support: NDArray[np.int64]
) -> float:
    """Return the change of the scores of class ``chosen`` that gives the best macro-F1; 0 where none improves it."""
    n, n_classes = scores.shape
    others = scores.copy()
    others[:, chosen] = -np.inf
    rival = others.argmax(axis=1)
    margin = others.max(axis=1) - scores[:, chosen]  # a larger shift makes `chosen` the prediction of the row
    order = np.argsort(margin)
    margin, rival, true = margin[order], rival[order], classes[order]
    # A shift beyond the k smallest margins predicts `chosen` for k rows, and the rival for the rest.
    chosen_f1 = 2 * np.cumsum(true == chosen) / (np.arange(1, n + 1) + max(support[chosen], 1))
    chosen_f1 = np.concatenate([[0.0], chosen_f1])
    predicted, hits = np.bincount(rival, minlength=n_classes), np.bincount(rival[rival == true], minlength=n_classes)
    rival_f1 = 2 * hits / np.maximum(predicted + support, 1)
    # Each row that turns to `chosen` takes one prediction, and perhaps one hit, from its rival.
    by_rival = np.argsort(rival, kind="stable")
    numbers = rival[by_rival]
    first = np.searchsorted(numbers, np.arange(n_classes))
    taken = np.arange(n) - first[numbers] + 1
    hits_before = np.cumsum(np.concatenate([[0], numbers == true[by_rival]]))
    lost = hits_before[1:] - hits_before[first[numbers]]
    after = 2 * (hits[numbers] - lost) / np.maximum(predicted[numbers] - taken + support[numbers], 1)
    before = np.where(taken == 1, rival_f1[numbers], np.concatenate([[0.0], after[:-1]]))
    change = np.empty(n)
    change[by_rival] = after - before
    macro = (rival_f1.sum() + np.concatenate([[0.0], np.cumsum(change)]) + chosen_f1) / np.count_nonzero(support)
    edges = np.concatenate([[margin[0] - 2], margin, [margin[-1] + 2]])
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    macro[width <= 0] = -1  # no shift fits between equal margins
    now = macro[np.searchsorted(margin, 0.0)]
    best = macro.max()
    if best <= now + 1e-12:
        return 0.0
    as_good = np.flatnonzero(macro >= best - 1e-12)
    return float(middle[as_good[np.argmin(np.abs(middle[as_good]))]])
