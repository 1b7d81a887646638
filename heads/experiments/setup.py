"""The setup of an experiment: where it reads and writes, its folds, and its rows."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import CheckpointError, MmcliError
from ...cache.machine import cpu_count
from ...cache.store import FeatureCache
from ...featurize.encode import OnProgress
from ..evaluation.folds import Indices, groups_by_guid
from ..evaluation.splits import Split, SplitOptions, divide, settle_rare_in_folds
from ..model.inputs import Rows
from ..runs.fit_store import data_key
from ..runs.folders import LATEST, pointed_at
from ..runs.labelled import (
    RowReport,
    absent_labels_are_named,
    class_numbers,
    features_for,
    labels_of,
    left_for_features,
    share_of,
)
from .candidates import Candidate


@dataclass(frozen=True)
class Setup:
    """Where an experiment reads and writes, and how it runs.

    Attributes
    ----------
    cache, labels
        The file that ``featurize`` wrote, and a CSV ``guid,tag``; default: the labels file recorded in the cache.
    split
        The split of ``train-head``, for experiments that use it or leave out its test rows. Its ``rare`` also says what
        becomes of classes that are too rare for the folds.
    out
        Folder of result folders; its folder ``fits`` keeps finished fits.
    jobs
        Number of processes; default: one per core.
    max_bytes
        Memory for all processes together; embeddings and token states that do not fit are read as they are needed.
    on_fit
        Called with (fits finished, number of fits).
    data, backbone
        For candidates with a stage 2: where the raw pairs and the backbone are now; default: as recorded in the cache.
    on_states
        Called with (pairs computed, pairs to compute) while the frozen part of stage 2 is computed.
    """

    cache: str | Path = "artifacts/features.h5"
    labels: str | Path | None = None
    split: SplitOptions = field(default_factory=SplitOptions)
    out: str | Path = "artifacts/experiments"
    jobs: int | None = None
    max_bytes: int | None = None
    on_fit: OnProgress | None = None
    data: str | Path | None = None
    backbone: str | None = None
    on_states: OnProgress | None = None

    @property
    def fits_folder(self) -> Path:
        """The folder of finished fits, beside the folders of results."""
        return Path(self.out) / "fits"

    def bytes_each(self) -> int | None:
        """Return the share of ``max_bytes`` for each process.

        Arrays that several processes share take memory twice. Blocks that are read from the file take memory in each
        process.
        """
        return share_of(self.max_bytes, self.jobs or cpu_count())


@dataclass(frozen=True)
class Data:
    """Labelled rows of a cache.

    Attributes
    ----------
    rows
        Features and class numbers of n rows.
    guids, groups
        Guid and group of each row; rows of one group are copies.
    classes
        Names, in the order of the class numbers.
    key
        A digest of the features, from their fingerprint and their numbers.
    """

    rows: Rows
    guids: list[str]
    groups: NDArray[np.int64]
    classes: list[str]
    key: str


@dataclass(frozen=True)
class Protocol:
    """Repeated stratified k-fold that keeps copies on one side.

    Attributes
    ----------
    folds, repeats
        Number of folds, at least 2, and of repeats, at least 1.
    seed
        Seed for the folds.
    without_test
        Leave out the rows that ``train-head`` keeps for testing.
    """

    folds: int = 5
    repeats: int = 2
    seed: int = 42
    without_test: bool = False


@dataclass(frozen=True)
class DataSummary:
    """The rows of an experiment.

    Attributes
    ----------
    cache, labels
        Paths.
    n_rows, copies
        Number of rows, and how many of them are copies of another.
    classes, counts
        Names of the classes, and their numbers of rows that are scored.
    rows
        What became of the labelled rows.
    split
        The split that the rows come from; None for all labelled rows.
    """

    cache: str
    labels: str
    n_rows: int
    copies: int
    classes: list[str]
    counts: list[int]
    rows: RowReport
    split: SplitOptions | None

    def to_dict(self) -> dict[str, Any]:
        """Return this as the entries of ``results.json``."""
        plain = {name: value for name, value in vars(self).items() if name not in ("rows", "split", "n_rows")}
        plain |= {"rows": self.n_rows, **self.rows.to_dict()}
        if self.split is not None:
            plain |= {name: self.split.to_dict()[name] for name in ("split_dir", "split_seed")}
        return plain


def open_data(
    setup: Setup, candidates: Sequence[Candidate], parts: Sequence[str] | None = None, folds: int = 2
) -> tuple[Data, DataSummary, Split | None]:
    """Return the rows of an experiment and their summary, and with ``parts`` the split of ``setup``.

    ``parts`` are the parts of the split to use; default: all labelled rows, without a split. Then classes with fewer
    rows than ``folds`` are rare. Raise an MmcliError if there is no candidate, or if two candidates have one name.
    """
    if not candidates:
        raise MmcliError("no candidate: name at least one")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise MmcliError(f"a name is given twice among {', '.join(names)}")
    with FeatureCache.open(setup.cache) as cache:
        labels_file, labels, absent = labels_of(cache, setup.labels)
        group_of, split = groups_by_guid(cache, list(labels)), None
        if parts is not None:
            with absent_labels_are_named(cache, absent):
                division = divide(labels, group_of, setup.split)
            labels, split, counts = division.labels, division.split, division.counts
            guids = [guid for name in parts for guid in split.named()[name]]
        else:
            labels, counts = settle_rare_in_folds(labels, group_of, folds, setup.split.rare)
            guids = list(labels)
        classes = sorted({labels[guid] for guid in guids})
        recipes = [candidate.recipe for candidate in candidates]
        numbers = class_numbers(guids, labels, classes)
        rows = Rows(features_for(cache, guids, recipes, left_for_features(cache, setup.bytes_each())), numbers)
        groups = np.unique([group_of[guid] for guid in guids], return_inverse=True)[1]
        data = Data(rows, guids, groups, classes, data_key(cache.fingerprint, guids, rows))
        summary = DataSummary(
            cache=str(cache.path.absolute()),
            labels=str(labels_file),
            n_rows=len(guids),
            copies=len(guids) - len(np.unique(groups)),
            classes=classes,
            counts=np.bincount(rows.classes, minlength=len(classes)).tolist(),
            rows=RowReport(absent, **counts),
            split=None if parts is None else setup.split,
        )
        return data, summary, split


def with_scored_counts(summary: DataSummary, data: Data, scored: Indices) -> DataSummary:
    """Return ``summary`` for an experiment that scores only some rows, and trains on all."""
    counts = np.bincount(data.rows.classes[scored], minlength=len(data.classes)).tolist()
    not_scored = [name for name, count in zip(data.classes, counts, strict=True) if not count]
    rows = replace(summary.rows, train_only_rows=len(data.guids) - len(scored), classes_not_scored=not_scored)
    return replace(summary, counts=counts, rows=rows)


def with_split_of_latest(setup: Setup, runs: str | Path, chosen: Collection[str] = ()) -> Setup:
    """Return ``setup`` with the split of the latest run in ``runs``, if it has the same cache and labels file.

    A run on all rows (``--full``) stands for the run that it repeats, and a stage 2 for its stage 1. ``chosen`` are the
    names among ``new`` and ``rare`` that ``setup`` keeps; the others are taken from the run.
    """
    try:
        folder = pointed_at(Path(runs) / LATEST)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        while earlier := config.get("epochs_from") or config.get("stage1"):
            folder = Path(earlier).parent
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with FeatureCache.open(setup.cache) as cache:
            recorded = cache.header.dataset["labels"]
        files_of_run = [Path(config[name]).resolve() for name in ("cache", "labels")]
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return setup  # there is no run, or its files do not say what it was made from
    labels = recorded if setup.labels is None else setup.labels
    if labels is None or files_of_run != [Path(setup.cache).resolve(), Path(labels).resolve()]:
        return setup
    splits = folder.resolve() / "splits"
    if not (splits / "val_split.csv").is_file():
        return setup
    # The options of the run, so that rows that it left out stay out, and classes that it merged stay merged.
    options = {name: config[name] for name in ("new", "rare") if name in config and name not in chosen}
    return replace(setup, split=replace(setup.split, split_dir=splits, **options))


def focus_of(focus_class: str | None, summary: DataSummary) -> str:
    """Return the class to look at closely: ``focus_class``, or by default the rarest class that is scored.

    Raise an MmcliError if the class does not exist, or if none of its rows is scored.
    """
    scored = {name: count for name, count in zip(summary.classes, summary.counts, strict=True) if count}
    if focus_class is None:
        return min(scored, key=scored.__getitem__)
    if focus_class not in scored:
        exists = focus_class in summary.classes
        why = f"class {focus_class!r} has no row that is scored" if exists else f"no class is called {focus_class!r}"
        raise MmcliError(f"{why}: choose among {', '.join(scored)}")
    return focus_class
