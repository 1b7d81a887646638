"""The predictions of a head for some pairs, and their CSV file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import write_text
from ...cache.labels import table_text
from ...featurize.pairs.hashing import Reject
from ..evaluation.metrics import softmax
from .checkpoint import Checkpoint


@dataclass(frozen=True)
class Predictions:
    """Predicted labels and probabilities of some pairs.

    Attributes
    ----------
    guids, labels
        A guid and a label per pair, in the order asked for.
    classes
        Names, in the order of the columns of ``probs``.
    probs
        (n, C) float64; each row sums to 1.
    rejects
        Pairs of a folder that could not be read.
    head
        The head that predicted: its file, fusion and modality.
    notes
        Sentences for the user.
    """

    guids: list[str]
    labels: list[str]
    classes: list[str]
    probs: NDArray[np.float64]
    rejects: list[Reject]
    head: str
    notes: list[str] = field(default_factory=list)

    def to_csv(self, with_probs: bool = False) -> str:
        """Return a CSV with header ``guid,tag``, and with ``with_probs`` a column per class."""
        rows = zip(self.guids, self.labels, self.probs, strict=True)
        return table_text(
            ["guid", "tag", *(self.classes if with_probs else [])],
            ([guid, tag, *([f"{prob:.6f}" for prob in probs] if with_probs else [])] for guid, tag, probs in rows),
        )

    def write(self, path: str | Path, with_probs: bool = False) -> None:
        """Write ``to_csv`` to a file, atomically."""
        write_text(Path(path), self.to_csv(with_probs))


def predictions_of(
    checkpoint: Checkpoint,
    guids: list[str],
    logits_of: Mapping[str, NDArray[np.float32]],
    rejects: list[Reject],
    notes: Sequence[str] = (),
) -> Predictions:
    """Return the predictions for ``guids``, given the logits, (C,), of each guid."""
    logits = np.stack([logits_of[guid] for guid in guids])
    labels = [checkpoint.classes[index] for index in logits.argmax(axis=1)]
    head = f"{checkpoint.path} ({checkpoint.recipe.modality}, {checkpoint.recipe.fusion})"
    return Predictions(guids, labels, checkpoint.classes, softmax(logits), rejects, head, list(notes))
