"""Where an experiment reads and writes, how it makes folds, and the rows that it is about."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.errors import CheckpointError, MmcliError
from ...cache.machine import cpu_count
from ...cache.store import FeatureCache
from ..evaluation.division import SplitOptions, divide
from ..evaluation.duplicates import groups_by_guid
from ..evaluation.folds import Fold, Indices
from ..evaluation.rare import settle_rare_in_folds
from ..evaluation.splits import Split
from ..runs.fit_store import data_key
from ..runs.fitting import OnFit
from ..runs.folders import LATEST, pointed_at
from ..runs.labelled import labels_of, left_for_features, rows_of, share_of
from .candidates import Candidate, Data, FoldFit


@dataclass(frozen=True)
class Setup:
    """Where an experiment reads and writes.

    Attributes
    ----------
    cache, labels
        What ``featurize`` wrote, and a CSV ``guid,tag``; default: the one recorded in the cache.
    split_dir, split_seed, group_duplicates, new
        The split of ``train-head``, for what uses it or leaves out its test rows (see ``SplitOptions``).
    rare
        What becomes of classes too rare for a part of the split, or for the folds where there is no split.
    out
        Folder of result folders; finished fits are kept in ``fits/`` in it.
    jobs
        Processes; default: one per core.
    max_bytes
        What all processes may take: embeddings and token states that do not fit are read as they are needed.
    on_fit
        Called with (fits finished, fits there are).
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
        """Return how its split is made."""
        return SplitOptions(self.split_dir, self.split_seed, self.group_duplicates, self.new, self.rare)

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
    setup: Setup, candidates: Sequence[Candidate], parts: Sequence[str] | None = None, folds: int = 2
) -> tuple[Data, dict[str, Any], Split | None]:
    """Return the rows for an experiment, where they are from, and the split of ``setup`` where ``parts`` asks for it.

    Parameters
    ----------
    parts
        Which parts of the split (``train``, ``val``, ``test``) are looked at; default: all labelled rows, no split.
    folds
        How many folds will be made; without ``parts``, classes with fewer rows are rare.

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
        group_of, split, counts = groups_by_guid(cache, list(labels)), None, {}
        if parts is not None:
            division = divide(labels, group_of, setup.split_options())
            labels, split, counts = division.labels, division.split, division.counts
            guids = [guid for name in parts for guid in split.named()[name]]
        else:
            settled = settle_rare_in_folds(labels, group_of, folds, setup.split_options().rare)
            labels, counts = settled.labels, settled.counts(folds)
            guids = list(labels)
        classes = sorted({labels[guid] for guid in guids})
        recipes = [candidate.recipe for candidate in candidates]
        rows = rows_of(cache, guids, labels, classes, recipes, left_for_features(cache, setup.bytes_each()))
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
            about |= {"split_dir": None if setup.split_dir is None else str(Path(setup.split_dir).absolute())}
            about |= {"split_seed": setup.split_seed if setup.split_dir is None else None}
        return data, about, split


def scored_rows(folds: Sequence[Fold]) -> Indices:
    """Return the numbers of the rows that some fold scores, in order: all but those that train only."""
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
    """Return the scored rows alone, and folds and fits whose test rows have the numbers that these rows now have."""
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
        [replace(each, fold=replace(each.fold, test=place[each.fold.test])) for each in fits],
    )


def with_split_of_latest(setup: Setup, runs: str | Path, chosen: Collection[str] = ()) -> Setup:
    """Return ``setup`` with the split of the latest run in ``runs``, if that is of the same cache and labels file.

    A run on all rows (``--full``) stands for the run that it repeats.

    Parameters
    ----------
    chosen
        Which of ``new`` and ``rare`` stay as they are in ``setup``; the others are those of the run.
    """
    try:
        folder = pointed_at(Path(runs) / LATEST)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if config.get("full"):
            folder = Path(config["epochs_from"]).parent
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        with FeatureCache.open(setup.cache) as cache:
            recorded = cache.header.dataset["labels"]
        of_run = [Path(config[name]).resolve() for name in ("cache", "labels")]
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return setup  # no run, or none that says what it was made from
    labels = recorded if setup.labels is None else setup.labels
    if labels is None or of_run != [Path(setup.cache).resolve(), Path(labels).resolve()]:
        return setup
    splits = folder.resolve() / "splits"
    if not (splits / "val_split.csv").is_file():
        return setup
    # As the run took them: what it left out stays out, what it merged stays merged.
    taken = {name: config[name] for name in ("new", "rare") if name in config and name not in chosen}
    return replace(setup, split_dir=splits, **taken)


def focus_of(focus_class: str | None, about: Mapping[str, Any]) -> str:
    """Return the class to look at closely: the one asked for, else the rarest that is scored.

    Raises
    ------
    MmcliError
        No such class, or none of its rows is scored.
    """
    counts: dict[str, int] = dict(zip(about["classes"], about["counts"], strict=True))
    scored = {name: count for name, count in counts.items() if count}
    if focus_class is None:
        return min(scored, key=scored.__getitem__)
    if focus_class not in scored:
        why = "class {!r} has no row that is scored" if focus_class in counts else "no class is called {!r}"
        raise MmcliError(f"{why.format(focus_class)}: choose among {', '.join(scored)}")
    return focus_class
