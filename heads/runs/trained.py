"""A trained head, ready for use: logits of rows of a cache, and of raw pairs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import CheckpointError
from ...cache.store import FeatureCache
from ...featurize.backbones.base import Encoder
from ...featurize.embed import embed_pairs, open_same
from ...featurize.pairs.hashing import Reject
from ...featurize.pairs.pair import Pair
from ..training.loop import predict_logits
from .checkpoint import Checkpoint, load_checkpoint

OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Scored:
    """Logits, (n, C) float32, of some of the pairs asked for, and those that could not be read."""

    guids: list[str]
    logits: NDArray[np.float32]
    rejects: list[Reject]


class Trained:
    """A head on frozen features. ``finetune`` has its counterpart for heads whose backbone was trained on.

    Attributes
    ----------
    checkpoint
        What best.pt holds.
    device
        A torch device, for what has to be encoded.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.checkpoint, self.device = checkpoint, device
        self._encoders: dict[str, Encoder] = {}  # by where the backbone is; kept, for the next pairs

    @property
    def needs_tokens(self) -> bool:
        """Whether token states are looked at."""
        return self.checkpoint.head.needs_tokens

    def get_ready(self, cache: FeatureCache, guids: Sequence[str], on_progress: OnProgress | None = None) -> None:
        """Compute what is needed of rows of a cache beyond what it has; nothing is, here.

        Parameters
        ----------
        on_progress
            Called with (pairs computed, pairs to compute).
        """

    def of_rows(self, cache: FeatureCache, guids: Sequence[str], max_bytes: int | None = None) -> NDArray[np.float32]:
        """Return the logits, (n, C), of rows of a cache with the checkpoint's fingerprint.

        Parameters
        ----------
        max_bytes
            Embeddings, or token states, that take more than this are read as they are needed.

        Raises
        ------
        CacheError
            Tokens are needed and not there, or a number is not finite.
        """
        features = cache.features(guids, self.needs_tokens, max_bytes=max_bytes)
        return self.finite(guids, predict_logits(self.checkpoint.head, features))

    def finite(self, guids: Sequence[str], logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits, (n, C), of ``guids``; a CheckpointError names the first that is not finite."""
        fine = np.isfinite(logits).all(axis=1)
        if not fine.all():
            raise CheckpointError(
                f"{self.checkpoint.path} gives {np.count_nonzero(~fine)} of {len(guids)} pairs scores that are not "
                f"finite, the first is {guids[int(np.argmin(fine))]!r}: train the head again"
            )
        return logits

    def of_pairs(
        self,
        pairs: Sequence[Pair],
        backbone: dict[str, Any],
        cache: FeatureCache | None,
        on_progress: OnProgress | None = None,
    ) -> Iterator[Scored]:
        """Yield the logits of raw pairs, some at a time. Rows of ``cache`` with the same raw bytes are taken from it.

        Raises
        ------
        BackboneError
            ``backbone`` cannot be had, or is not the one of the checkpoint.
        """
        identity, head = self.checkpoint.identity, self.checkpoint.head

        def load() -> Encoder:
            place = f"{backbone['name']}@{backbone['revision']}"
            if place not in self._encoders:
                source = open_same(identity, backbone)
                resize = identity["image"]["resize"]
                self._encoders[place] = source.load(self.device, identity["dtype"], resize)
            return self._encoders[place]

        for found in embed_pairs(pairs, identity, load, cache, self.needs_tokens, on_progress):
            none = np.zeros((0, len(self.checkpoint.classes)), np.float32)
            logits = self.finite(found.guids, predict_logits(head, found.features)) if found.guids else none
            yield Scored(found.guids, logits, found.rejects)


def trained(best_pt: "str | Path | Trained", device: str = "cpu") -> Trained:
    """Return what ``best_pt`` names, with its head on ``device``; a ``Trained`` is returned as it is."""
    return best_pt if isinstance(best_pt, Trained) else Trained(load_checkpoint(best_pt, device), device)
