"""A trained head with all that is needed to use it on other pairs."""

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ...cache.errors import CacheError, CheckpointError
from ...cache.schema import describe_difference, fingerprint_of
from ...cache.store import FeatureCache
from ..evaluation.splits import Split
from ..model.fusions import Sizes
from ..model.head import Ensemble
from ..recipe import Recipe


@dataclass
class Checkpoint:
    """A trained head or an ensemble, with all that is needed to use it on other pairs.

    Attributes
    ----------
    head
        The heads, in evaluation mode.
    classes
        Names, in the order of the logits.
    sizes
        Lengths of embeddings, widths of token states.
    recipe
        The settings of the training; the seed is the first of ``seeds``.
    seeds
        A seed for each head.
    identity, backbone
        Description of the features that the head was trained on (see ``cache.schema.Header``).
    split
        Guids of the rows for training, stopping and testing.
    best_epochs
        The epoch from which each head has its weights.
    made_from
        ``cache`` and ``labels`` are absolute paths at the time of training, the defaults of later commands.
        ``cache_from_run`` and ``labels_from_run`` are the same paths seen from the run folder, in case all files moved
        together. After stage 2, ``stage1`` is the best.pt that it started from.
    path
        The file that was read.
    relabelled
        New names for classes of the labels file; None for a class that the head does not know.
    changed
        After stage 2, for each head, the weights of the unfrozen layers by their names in the whole model. Empty after
        stage 1. The rest of the backbone is not kept.
    """

    head: Ensemble
    classes: list[str]
    sizes: Sizes
    recipe: Recipe
    seeds: list[int]
    identity: dict[str, Any]
    backbone: dict[str, Any]
    split: Split
    best_epochs: list[int]
    made_from: dict[str, str]
    path: Path | None = None
    relabelled: dict[str, str | None] = field(default_factory=dict)
    changed: list[dict[str, Tensor]] = field(default_factory=list)

    def offset_by_class(self) -> dict[str, float]:
        """Return the decision offset of each class."""
        return dict(zip(self.classes, self.head.offsets.tolist(), strict=True))

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the features that the head was trained on."""
        return fingerprint_of(self.identity)

    def cache_path(self, given: str | Path | None = None) -> Path:
        """Return the cache to use: ``given``, or the cache of the training, or the cache that moved with the run.

        Raises
        ------
        CacheError
            Neither cache is there; the message names both paths.
        """
        if given is not None:
            return Path(given)
        recorded, beside = self._places("cache")
        if recorded.is_file() or beside == recorded:
            return recorded
        if beside.is_file():
            with FeatureCache.open(beside) as cache:
                guids = [guid for part in self.split.named().values() for guid in part]
                if cache.fingerprint == self.fingerprint and 2 * sum(guid in cache for guid in guids) >= len(guids):
                    return beside
            raise CacheError(
                f"no feature cache at {recorded}, where the head was trained, and {beside} holds other features or "
                "other pairs: give the cache with --cache"
            )
        raise CacheError(
            f"no feature cache at {recorded}, where the head was trained, nor at {beside}: give the cache with --cache"
        )

    def labels_path(self, given: str | Path | None = None) -> Path:
        """Return the labels file to use, in the order of ``cache_path``."""
        if given is not None:
            return Path(given)
        recorded, beside = self._places("labels")
        return beside if beside.is_file() and not recorded.is_file() else recorded

    def _places(self, what: str) -> tuple[Path, Path]:
        """Return the path of a file at the time of training, and its path if it moved with the run folder."""
        recorded, beside = Path(self.made_from[what]), self.made_from.get(f"{what}_from_run")
        if beside is None or self.path is None:
            return recorded, recorded
        return recorded, Path(os.path.normpath(self.path.parent / beside))

    def inputs(self, cache_path: str | Path | None = None) -> list[Path]:
        """Return the files that the head was made from: labels, split, and the dataset of its cache if there is one."""
        files = [Path(self.made_from["labels"])]
        if self.path is not None:
            files += (self.path.parent / "splits").glob("*.csv")
        with contextlib.suppress(CacheError), FeatureCache.open(self.cache_path(cache_path)) as cache:
            files += [Path(path) for path in cache.header.dataset.values() if path is not None]
        return files

    def check_cache(self, cache: FeatureCache) -> None:
        """Refuse a cache with another fingerprint.

        Raises
        ------
        CheckpointError
            The fingerprints differ; the message names the differences.
        """
        if cache.fingerprint != self.fingerprint:
            raise CheckpointError(
                f"this head was trained on features of {self.backbone['name']}, and {cache.path} holds features of "
                f"{cache.header.backbone['name']}, which differ ("
                + "; ".join(describe_difference(cache.header.identity, self.identity))
                + "): use the cache that the head was trained on, or train a head on this cache"
            )
