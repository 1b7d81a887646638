"""Where an experiment reads and writes, how it makes folds, and the rows that it is about."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.errors import MmcliError
from ...cache.machine import cpu_count
from ...cache.store import FeatureCache
from ..duplicates import Groups
from ..labelled import labels_of, left_for_features, rows_of, share_of
from ..splits import Split, make_split
from .fits import Candidate, Data, OnFit, data_key

KEPT = "fits"  # folder of finished fits, beside the folders of results


@dataclass(frozen=True)
class Setup:
    """Where an experiment reads and writes.

    Attributes
    ----------
    cache, labels
        What ``featurize`` wrote, and a CSV ``guid,tag``; default: the one recorded in the cache.
    split_dir, split_seed, group_duplicates
        The split of ``train-head``, for what uses it or leaves out its test rows.
    out
        Folder of result folders; finished fits are kept in ``fits/`` in it.
    jobs
        Processes; default: one per core.
    max_bytes
        What all processes may take: embeddings and token states that do not fit are read as they are needed.
    on_fit
        Called with (fits finished, fits there are).
    """

    cache: str | Path = "artifacts/features.h5"
    labels: str | Path | None = None
    split_dir: str | Path | None = None
    split_seed: int = 42
    group_duplicates: bool = False
    out: str | Path = "artifacts/experiments"
    jobs: int | None = None
    max_bytes: int | None = None
    on_fit: OnFit | None = None

    def bytes_each(self) -> int | None:
        """Return the share of ``max_bytes`` for each process.

        What is in memory is there twice where several processes share it, and blocks of what is left in the file once
        in each process.
        """
        return share_of(self.max_bytes, self.jobs or cpu_count())


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


def open_data(
    setup: Setup, candidates: Sequence[Candidate], parts: Sequence[str] | None = None
) -> tuple[Data, dict[str, Any], Split | None]:
    """Return the rows for an experiment, where they are from, and the split of ``setup`` where ``parts`` asks for it.

    Parameters
    ----------
    parts
        Which parts of the split (``train``, ``val``, ``test``) are looked at; default: all labelled rows, no split.

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
        guids, split = list(labels), None
        group_of = Groups(cache, guids)
        if parts is not None:
            split = make_split(labels, group_of, setup.split_dir, setup.split_seed, setup.group_duplicates)
            guids = [guid for name in parts for guid in split.named()[name]]
        classes = sorted({labels[guid] for guid in guids})
        recipes = [candidate.recipe for candidate in candidates]
        rows = rows_of(cache, guids, labels, classes, recipes, left_for_features(cache, setup.bytes_each()))
        groups = np.array([group_of[guid] for guid in guids], dtype=np.int64)
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
        return data, about, split


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
