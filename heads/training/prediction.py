"""Logits of pairs, computed batch by batch."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...cache.features import Features
from ..evaluation.metrics import quick_scores
from ..model.head import Ensemble, Head
from ..model.inputs import Batch, Rows, batches


@contextlib.contextmanager
def one_thread(wanted: bool = True) -> Iterator[None]:
    """Compute on one thread: small matrices gain nothing from several, and waiting for a busy core costs ten times.

    This also makes a head the same to the bit in a process of its own as among others.
    """
    threads = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def predict_logits(head: Head | Ensemble, features: Features) -> NDArray[np.float32]:
    """Return the logits of n pairs, (n, C) float32; a head without ``tops`` ignores the states of towers."""
    with one_thread(head.is_small), torch.inference_mode():
        logits: NDArray[np.float32] = _by_batch(head, features, head).float().cpu().numpy()
    return logits


def predicted_classes(head: Head | Ensemble, rows: Rows) -> NDArray[np.int64]:
    """Return the number of the predicted class of each row, (n,)."""
    return predict_logits(head, rows.features).argmax(axis=1)


def predict_parts(head: Head, features: Features) -> Tensor:
    """Return the logits of each of the k MLPs of a head, (k, n, C), for n pairs."""
    with torch.inference_mode():
        parts = _by_batch(head, features, lambda batch: head.parts(head.standardised(batch)).transpose(0, 1))
        return parts.transpose(0, 1)


def scores_of_part(logits: Tensor, classes: NDArray[np.int64], n_classes: int, part: str) -> dict[str, float]:
    """Return ``<part>_macro_f1`` and ``<part>_accuracy``."""
    scores = quick_scores(classes, logits.argmax(dim=1).cpu().numpy(), n_classes)
    return {f"{part}_{name}": value for name, value in scores.items()}


def _by_batch(head: Head | Ensemble, features: Features, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Return the results of ``compute`` for all rows, (n, ...), in the order of ``features``."""
    device = str(next(head.parameters()).device)
    if not head.tops:
        features = replace(features, states={})
    ordered, back = features.in_fast_order()
    results, start = torch.empty(0), 0
    for batch in batches(ordered, head.needs_tokens, device):
        computed = compute(batch)
        if start == 0:  # one allocation, because small results between large ones would fragment the memory
            results = computed.new_empty((len(features), *computed.shape[1:]))
        results[start : start + len(computed)] = computed
        start += len(computed)
    return results if back is None else results[torch.from_numpy(back).to(device)]
