"""The setup of an experiment: where it reads and writes, its folds, and its rows."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.errors import CheckpointError, MmcliError
from ...cache.machine import cpu_count
from ...cache.store import FeatureCache
from ..evaluation.folds import Fold, Indices, groups_by_guid
from ..evaluation.splits import Split, SplitOptions, divide, settle_rare_in_folds
from ..model.inputs import Rows
from ..runs.fit_store import data_key
from ..runs.fitting import OnFit
from ..runs.folders import LATEST, pointed_at
from ..runs.labelled import class_numbers, features_for, labels_of, left_for_features, share_of
from .candidates import Candidate, Data, FoldFit


@dataclass(frozen=True)
class Setup:
    """Where an experiment reads and writes, and how it runs.

    Attributes
    ----------
    cache, labels
        The file that ``featurize`` wrote, and a CSV ``guid,tag``; default: the labels file recorded in the cache.
    split_dir, split_seed, group_duplicates, new
        The split of ``train-head``, for experiments that use it or leave out its test rows (see ``SplitOptions``).
    rare
        Use of classes too rare for a part of the split, or without a split for the folds.
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
    split_dir: str | Path | None = None
    split_seed: int = 42
    group_duplicates: bool = True
    out: str | Path = "artifacts/experiments"
    jobs: int | None = None
    max_bytes: int | None = None
    on_fit: OnFit | None = None
    new: str = "train"
    rare: str = "train-only"
    data: str | Path | None = None
    backbone: str | None = None
    on_states: OnFit | None = None

    @property
    def kept(self) -> Path:
        """The folder of finished fits, beside the folders of results."""
        return Path(self.out) / "fits"

    def split_options(self) -> SplitOptions:
        """Return the options of the split."""
        return SplitOptions(self.split_dir, self.split_seed, self.group_duplicates, self.new, self.rare)

    def bytes_each(self) -> int | None:
        """Return the share of ``max_bytes`` for each process.

        Arrays that several processes share take memory twice. Blocks that are read from the file take memory in each
        process.
        """
        return share_of(self.max_bytes, self.jobs or cpu_count())


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


def open_data(
    setup: Setup, candidates: Sequence[Candidate], parts: Sequence[str] | None = None, folds: int = 2
) -> tuple[Data, dict[str, Any], Split | None]:
    """Return the rows of an experiment, a description for the results, and with ``parts`` the split of ``setup``.

    Parameters
    ----------
    parts
        Parts of the split to use (``train``, ``val``, ``test``); default: all labelled rows, without a split.
    folds
        Number of folds to be made; without ``parts``, classes with fewer rows are rare.

    Raises
    ------
    MmcliError
        There is no candidate, or two candidates have one name.
    """
    if not candidates:
        raise MmcliError("no candidate: name at least one")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise MmcliError(f"a name is given twice among {', '.join(names)}")
    with FeatureCache.open(setup.cache) as cache:
        labels_file, labels, absent = labels_of(cache, setup.labels)
        group_of, split, counts = groups_by_guid(cache, list(labels)), None, {}
        if parts is not None:
            division = divide(labels, group_of, setup.split_options())
            labels, split, counts = division.labels, division.split, division.counts
            guids = [guid for name in parts for guid in split.named()[name]]
        else:
            labels, counts = settle_rare_in_folds(labels, group_of, folds, setup.split_options().rare)
            guids = list(labels)
        classes = sorted({labels[guid] for guid in guids})
        recipes = [candidate.recipe for candidate in candidates]
        numbers = class_numbers(guids, labels, classes)
        rows = Rows(features_for(cache, guids, recipes, left_for_features(cache, setup.bytes_each())), numbers)
        groups = np.unique([group_of[guid] for guid in guids], return_inverse=True)[1]
        data = Data(rows, guids, groups, classes, data_key(cache.fingerprint, guids, rows))
        about = {
            "cache": str(cache.path.absolute()),
            "labels": str(labels_file),
            "labels_without_features": absent,
            "rows": len(guids),
            "copies": len(guids) - len(np.unique(groups)),
            "classes": classes,
            "counts": np.bincount(rows.classes, minlength=len(classes)).tolist(),
            **counts,
        }
        if parts is not None:
            about["split_dir"] = None if setup.split_dir is None else str(Path(setup.split_dir).absolute())
            about["split_seed"] = setup.split_seed if setup.split_dir is None else None
        return data, about, split


def scored_rows(folds: Sequence[Fold]) -> Indices:
    """Return the numbers of the rows that some fold scores, in order; the other rows are only trained on."""
    return np.unique(np.concatenate([fold.test for fold in folds]))


def scored_counts(data: Data, folds: Sequence[Fold]) -> dict[str, Any]:
    """Return ``counts`` (scored rows of each class), ``train_only_rows`` and ``classes_not_scored``."""
    scored = scored_rows(folds)
    counts = np.bincount(data.rows.classes[scored], minlength=len(data.classes)).tolist()
    return {
        "counts": counts,
        "train_only_rows": len(data.guids) - len(scored),
        "classes_not_scored": [name for name, count in zip(data.classes, counts, strict=True) if not count],
    }


def scored_only(data: Data, folds: list[Fold], fits: list[FoldFit]) -> tuple[Data, list[Fold], list[FoldFit]]:
    """Return only the scored rows, with folds and fits whose test rows are renumbered accordingly."""
    scored = scored_rows(folds)
    if len(scored) == len(data.guids):
        return data, folds, fits
    place = np.full(len(data.guids), -1)
    place[scored] = np.arange(len(scored))
    guids = [data.guids[row] for row in scored.tolist()]
    groups = np.unique(data.groups[scored], return_inverse=True)[1]
    return (
        replace(data, rows=data.rows.take(scored), guids=guids, groups=groups),
        [replace(fold, test=place[fold.test]) for fold in folds],
        [replace(fitted, fold=replace(fitted.fold, test=place[fitted.fold.test])) for fitted in fits],
    )


def with_split_of_latest(setup: Setup, runs: str | Path, chosen: Collection[str] = ()) -> Setup:
    """Return ``setup`` with the split of the latest run in ``runs``, if it has the same cache and labels file.

    A run on all rows (``--full``) stands for the run that it repeats.

    Parameters
    ----------
    chosen
        Names among ``new`` and ``rare`` that ``setup`` keeps; the others are taken from the run.
    """
    try:
        folder = pointed_at(Path(runs) / LATEST)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("full"):
            folder = Path(config["epochs_from"]).parent
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
    return replace(setup, split_dir=splits, **options)


def focus_of(focus_class: str | None, about: Mapping[str, Any]) -> str:
    """Return the class to look at closely: ``focus_class``, or by default the rarest class that is scored.

    Raises
    ------
    MmcliError
        The class does not exist, or none of its rows is scored.
    """
    counts: dict[str, int] = dict(zip(about["classes"], about["counts"], strict=True))
    scored = {name: count for name, count in counts.items() if count}
    if focus_class is None:
        return min(scored, key=scored.__getitem__)
    if focus_class not in scored:
        why = "class {!r} has no row that is scored" if focus_class in counts else "no class is called {!r}"
        raise MmcliError(f"{why.format(focus_class)}: choose among {', '.join(scored)}")
    return focus_class
