"""Where an experiment reads and writes, how it makes folds, and the rows that it is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.errors import MmcliError
from ...cache.store import FeatureCache
from ..duplicates import duplicate_groups
from ..inputs import Rows
from ..labelled import features_of, labels_of
from ..splits import Split, read_split, stratified_split
from .fits import Candidate, Data, OnFit, data_key

KEPT = "fits"  # folder of finished fits, beside the folders of results


@dataclass(frozen=True)
class Setup:
    """Where an experiment reads and writes.

    Attributes
    ----------
    cache, labels
        What ``featurize`` wrote, and a CSV ``guid,tag``; default: the one recorded in the cache.
    split_dir, split_seed
        The 8:1:1 split of ``train-head``, for what uses it.
    out
        Folder of result folders; finished fits are kept in ``fits/`` in it.
    jobs
        Processes; default: one per core.
    max_bytes
        Token states that take more than this are read from the cache as they are needed.
    on_fit
        Called with (fits finished, fits there are).
    """

    cache: str | Path = "artifacts/features.h5"
    labels: str | Path | None = None
    split_dir: str | Path | None = None
    split_seed: int = 42
    out: str | Path = "artifacts/experiments"
    jobs: int | None = None
    max_bytes: int | None = None
    on_fit: OnFit | None = None

    def split(self, labels: dict[str, str]) -> Split:
        """Return the split that ``train-head`` would use."""
        if self.split_dir is not None:
            return read_split(self.split_dir, labels)
        return stratified_split(list(labels), list(labels.values()), self.split_seed)


@dataclass(frozen=True)
class Protocol:
    """Repeated stratified k-fold that keeps copies on one side.

    Attributes
    ----------
    folds, repeats
        At least 2, at least 1.
    seed
        Of the folds.
    without_test
        Leave out the rows that ``train-head`` keeps for testing.
    """

    folds: int = 5
    repeats: int = 2
    seed: int = 42
    without_test: bool = False


def open_data(setup: Setup, candidates: Sequence[Candidate], without_test: bool = False) -> tuple[Data, dict[str, Any]]:
    """Return the labelled rows for an experiment, and where they are from.

    Parameters
    ----------
    without_test
        Leave out the test rows of the split of ``setup``.

    Raises
    ------
    MmcliError
        No candidate, or two of one name.
    """
    if not candidates:
        raise MmcliError("no candidate: name at least one")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise MmcliError(f"a name is given twice among {', '.join(names)}")
    with FeatureCache.open(setup.cache) as cache:
        labels_file, labels, absent = labels_of(cache, setup.labels)
        guids = list(labels)
        if without_test:
            split = setup.split(labels)
            guids = [*split.train, *split.val]
        classes = sorted({labels[guid] for guid in guids})
        recipes = [candidate.recipe for candidate in candidates]
        features = features_of(cache, guids, recipes, setup.max_bytes)
        rows = Rows(features, np.searchsorted(classes, [labels[guid] for guid in guids]).astype(np.int64))
        groups = duplicate_groups(cache, guids)
        data = Data(rows, guids, groups, classes, data_key(cache.fingerprint, guids, rows))
        about = {
            "cache": str(cache.path.absolute()),
            "labels": str(labels_file),
            "labels_without_features": absent,
            "rows": len(guids),
            "copies": len(guids) - len(np.unique(groups)),
            "classes": classes,
            "counts": np.bincount(rows.classes, minlength=len(classes)).tolist(),
        }
        return data, about


def focus_of(focus_class: str | None, about: Mapping[str, Any]) -> str:
    """Return the class to look at closely: the one asked for, else the rarest.

    Raises
    ------
    MmcliError
        No such class.
    """
    classes: list[str] = about["classes"]
    if focus_class is None:
        return classes[int(np.argmin(about["counts"]))]
    if focus_class not in classes:
        raise MmcliError(f"no class is called {focus_class!r}: choose among {', '.join(classes)}")
    return focus_class
