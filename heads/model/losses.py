"""Losses and decisions for imbalanced labels."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...cache.errors import MmcliError
from ..recipe import Recipe

_BETA = 0.999  # of the effective number; Cui et al. use 0.9 to 0.9999

Loss = Callable[[Tensor, Tensor], Tensor]


def class_weights(counts: NDArray[np.int64], kind: str) -> NDArray[np.float32]:
    """Return a weight per class, (C,) float32, with mean 1, from the classes' counts in the training rows.

    ``none``: all 1. ``inverse``: proportional to 1 / count. ``sqrt``: the square root of those, as the reference has
    it. ``effective``: (1 - b) / (1 - b ** count), b = 0.999 (Cui et al., Class-Balanced Loss Based on Effective Number
    of Samples, CVPR 2019).

    Raises
    ------
    MmcliError
        For a class without a row.
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

    Scaled as PyTorch's cross-entropy, to which it is equal at ``gamma=0``: each class's term has its weight, the sum is
    divided by the weights of the true classes.

    Parameters
    ----------
    logits, classes, weight
        (n, C), (n,) int64, (C,).
    gamma
        How much is discounted what is already right.
    smoothing
        Share of the target that is spread over all classes.
    """
    n_classes = logits.shape[1]
    target = functional.one_hot(classes, n_classes).to(logits.dtype) * (1 - smoothing) + smoothing / n_classes
    log_probs = torch.log_softmax(logits, dim=1)
    # At p = 1 the power has no finite slope where gamma is below 1, and its slope times 0 would be NaN.
    missed = (-torch.expm1(log_probs)).clamp_min(torch.finfo(logits.dtype).tiny)
    terms = target * weight * missed**gamma * -log_probs
    return terms.sum() / weight[classes].sum()


def make_loss(recipe: Recipe, counts: NDArray[np.int64], device: str) -> Loss:
    """Return the loss of ``recipe``: a function of logits (n, C) and classes (n,), to be minimised.

    With logit adjustment, tau log(class frequency) is added to the logits (Menon et al., Long-tail learning via logit
    adjustment, ICLR 2021, their loss of equation 10); predictions use the logits without it.

    Parameters
    ----------
    counts
        Of each class in the training rows, (C,).
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


def fit_offsets(logits: NDArray[np.floating], classes: NDArray[np.int64], rounds: int = 20) -> NDArray[np.float32]:
    """Return a number per class, (C,) float32, mean 0, that raises macro-F1 when it is added to the logits.

    Coordinate ascent: one class at a time, every value at which a prediction changes is tried, so each step is exact;
    the value kept is the middle of the best gap, the one nearest to no change where several are as good. Fit it on rows
    that the head was not trained on, and score it on others.

    Parameters
    ----------
    logits, classes
        (n, C) and (n,) of the validation rows.
    rounds
        Passes over the classes, at most.
    """
    scores = logits.astype(np.float64)
    n_classes = scores.shape[1]
    support = np.bincount(classes, minlength=n_classes)
    offsets = np.zeros(n_classes)
    for _ in range(rounds):
        before = offsets.copy()
        for each in np.flatnonzero(support).tolist():  # nothing says where a class without a row should be
            offsets[each] += _best_shift(scores + offsets, classes, each, support)
        if np.array_equal(before, offsets):
            break
    return (offsets - offsets.mean()).astype(np.float32)


def _best_shift(
    scores: NDArray[np.float64], classes: NDArray[np.int64], each: int, support: NDArray[np.int64]
) -> float:
    """Return the change of class ``each``'s scores with the best macro-F1, 0 where none is better."""
    n, n_classes = scores.shape
    others = scores.copy()
    others[:, each] = -np.inf
    rival = others.argmax(axis=1)
    margin = others.max(axis=1) - scores[:, each]  # shifted by more than this, the row is called `each`
    order = np.argsort(margin)
    margin, rival, true = margin[order], rival[order], classes[order]
    # After the k smallest margins are passed, k rows are called `each`, the others what their rival is.
    of_each = 2 * np.cumsum(true == each) / (np.arange(1, n + 1) + max(support[each], 1))
    of_each = np.concatenate([[0.0], of_each])
    called, hits = np.bincount(rival, minlength=n_classes), np.bincount(rival[rival == true], minlength=n_classes)
    of_others = 2 * hits / np.maximum(called + support, 1)
    # Each row that is passed takes one call, and maybe one hit, from its rival: F1 of the rival before and after.
    by_rival = np.argsort(rival, kind="stable")
    first = np.searchsorted(rival[by_rival], np.arange(n_classes))
    taken = np.arange(n) - first[rival[by_rival]] + 1
    was_hit = np.cumsum(np.concatenate([[0], rival[by_rival] == true[by_rival]]))
    lost = was_hit[1:] - was_hit[first[rival[by_rival]]]
    numbers = rival[by_rival]
    after = 2 * (hits[numbers] - lost) / np.maximum(called[numbers] - taken + support[numbers], 1)
    before = np.where(taken == 1, of_others[numbers], np.concatenate([[0.0], after[:-1]]))
    change = np.empty(n)
    change[by_rival] = after - before
    macro = (of_others.sum() + np.concatenate([[0.0], np.cumsum(change)]) + of_each) / np.count_nonzero(support)
    edges = np.concatenate([[margin[0] - 2], margin, [margin[-1] + 2]])
    middle, width = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    macro[width <= 0] = -1  # between equal margins there is no room
    now = macro[np.searchsorted(margin, 0.0)]
    best = macro.max()
    if best <= now + 1e-12:
        return 0.0
    as_good = np.flatnonzero(macro >= best - 1e-12)
    return float(middle[as_good[np.argmin(np.abs(middle[as_good]))]])
