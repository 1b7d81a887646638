"""Fits of candidates on folds: spread over cores, and each kept on the disk as soon as it is finished."""

import contextlib
import functools
import hashlib
import io
import json
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import disk_full_is_clear, write_bytes
from ...cache.errors import MmcliError
from ...cache.features import Features
from ..evaluation.folds import Fold
from ..model.head import Head
from ..model.inputs import Rows, stretches_per_block
from ..model.losses import fit_offsets
from ..recipe import Recipe
from ..runs.parallel import each_of
from ..training.loop import fit, predict_logits

_CODE = ("cache", "featurize", "finetune", "heads")  # folders whose code decides what a fit gives

_PACKAGE = Path(__file__).parents[2]

OnFit = Callable[[int, int], None]


class Prepared(Protocol):
    """What goes on with a head after it was fitted, ready to be sent to another process."""

    def __call__(self, head: Head, recipe: Recipe, n_classes: int, rows: Rows, fold: Fold) -> "Continued":
        """Go on with ``head``, fitted on ``fold``."""
        ...


class Continuation(Protocol):
    """What goes on with a head after it was fitted: stage 2, of which this folder knows no more than this."""

    @property
    def uses(self) -> tuple[str, ...]:
        """Names of the settings of a head that it depends on, whatever the head."""
        ...

    def key(self) -> dict[str, Any]:
        """Return, as plain data, all that its result depends on beside the fit and the data."""
        ...

    def prepare(self, data: "Data") -> Prepared:
        """Get ready for the rows of ``data``, in their order; called once, where there is something to fit."""
        ...


class Continued(NamedTuple):
    """Logits, (n, C) float32, of a fold's test rows and of those that it is stopped by; epochs; parameters."""

    test: NDArray[np.float32]
    stop: NDArray[np.float32]
    epochs: int
    parameters: int


@dataclass(frozen=True)
class Candidate:
    """A recipe under the name by which tables show it, and what goes on after its fits."""

    name: str
    recipe: Recipe
    then: Continuation | None = None

    def that_matter(self) -> dict[str, Any]:
        """Return, as plain data, the settings that its fits depend on."""
        found = self.recipe.that_matter()
        if self.then is not None:
            settings = self.recipe.to_dict()
            found |= {name: settings[name] for name in self.then.uses} | {"then": self.then.key()}
        return found


@dataclass(frozen=True)
class Data:
    """Labelled rows of a cache, and what tells them from others.

    Attributes
    ----------
    rows
        Features and classes, n of them.
    guids, groups
        Of each row; rows of one group are copies.
    classes
        Names, in the order of the class numbers.
    key
        Of the features: their fingerprint and their numbers.
    """

    rows: Rows
    guids: list[str]
    groups: NDArray[np.int64]
    classes: list[str]
    key: str


@dataclass(frozen=True)
class FoldFit:
    """What became of one candidate on one fold.

    Attributes
    ----------
    logits
        (n_test, C) float32, of the fold's test rows.
    seconds, epochs, parameters
        Of the fit. Of a linear head, one epoch.
    """

    candidate: str
    fold: Fold
    logits: NDArray[np.float32]
    seconds: float
    epochs: int
    parameters: int


def data_key(fingerprint: str, guids: Sequence[str], rows: Rows) -> str:
    """Return a digest of the numbers that a fit learns from: embeddings, views and classes.

    Token states are too many to be read for it; what they are made from is in the fingerprint, and the embeddings of
    the same pass stand for them.
    """
    digest = hashlib.sha256(fingerprint.encode())
    digest.update("\n".join(guids).encode())
    rows.features.hash_into(digest)
    digest.update(rows.classes.tobytes())
    return digest.hexdigest()


def fit_all(
    data: Data,
    candidates: Sequence[Candidate],
    folds: Sequence[Fold],
    kept: Path,
    jobs: int | None = None,
    on_fit: OnFit | None = None,
) -> list[FoldFit]:
    """Fit every candidate on every fold; those that are already in ``kept`` are taken from there.

    The seed of a fit is the recipe's plus the number of the fold, counted over all repeats. One seed for all folds
    would make their fits alike, and hide from the statistics how much a seed matters.

    Parameters
    ----------
    kept
        Folder of finished fits, each named by a digest of all that it depends on, so that an interrupted experiment
        goes on where it was and another one that shares a fit does not repeat it.
    jobs
        Processes; default: one per core.
    on_fit
        Called with (fits finished, fits there are).
    """
    tasks: list[tuple[Any, ...]] = []
    found: dict[tuple[str, int, int], FoldFit] = {}
    for candidate in candidates:
        for number, fold in enumerate(folds):
            recipe = candidate.recipe.reseeded(number)
            path = kept / f"{_key(data, replace(candidate, recipe=recipe), fold)}.npz"
            finished = _load(path, candidate.name, fold)
            if finished is None:
                task = (candidate.name, recipe, data.rows, len(data.classes), data.groups, fold, path)
                tasks.append((*task, candidate.then))
            else:
                found[candidate.name, fold.repeat, fold.fold] = finished
    total = len(candidates) * len(folds)
    if on_fit is not None:
        on_fit(len(found), total)
    with disk_full_is_clear(kept):
        kept.mkdir(parents=True, exist_ok=True)
    prepared = {id(then): then.prepare(data) for *_, then in tasks if then is not None}
    tasks = [(*task, None if then is None else prepared[id(then)]) for *task, then in tasks]
    for each in each_of(_fit_one, sorted(tasks, key=_expected_cost, reverse=True), jobs):
        found[each.candidate, each.fold.repeat, each.fold.fold] = each
        if on_fit is not None:
            on_fit(len(found), total)
    return [found[candidate.name, fold.repeat, fold.fold] for candidate in candidates for fold in folds]


def _expected_cost(task: tuple[Any, ...]) -> int:
    """Long fits first, so that no core is idle at the end."""
    recipe: Recipe = task[1]
    if task[-1] is not None:
        return 4
    return {"cross_attn": 3, "late": 2, "film": 2}.get(recipe.sees, 1) if recipe.head == "mlp" else 2


def _fit_one(
    name: str,
    recipe: Recipe,
    rows: Rows,
    n_classes: int,
    groups: NDArray[np.int64],
    fold: Fold,
    path: Path,
    then: Prepared | None = None,
) -> FoldFit:
    started = time.perf_counter()
    try:
        stop = rows.take(fold.stop)
        done = fit(recipe, n_classes, rows.take(fold.train), stop, score_train=False, groups=groups[fold.train])
        if then is None:
            of_test, of_stop = (predict_logits(done.head, rows.features.take(part)) for part in (fold.test, fold.stop))
            found = Continued(of_test, of_stop, len(done.history), done.head.n_parameters())
        else:
            found = then(done.head, recipe, n_classes, rows, fold)
        logits = found.test + fit_offsets(found.stop, stop.classes) if recipe.offsets else found.test
    except MmcliError as error:
        raise MmcliError(f"{name}, repeat {fold.repeat + 1}, fold {fold.fold + 1}: {error}") from error
    seconds = time.perf_counter() - started
    result = FoldFit(name, fold, logits, seconds, found.epochs, found.parameters)
    _save(path, result)
    return result


def code_digest(package: Path = _PACKAGE) -> str:
    """Return a digest of the source that decides what a fit gives, of both stages: no kept fit outlives a change of it.

    A list of modules would be shorter, and would miss the module that somebody adds.

    Raises
    ------
    MmcliError
        There is no source.
    """
    digest = hashlib.sha256()
    sources = sorted(path for folder in _CODE for path in (package / folder).rglob("*.py"))
    if not sources:
        raise MmcliError(f"{package} holds no source code, so kept fits cannot be told from outdated ones: reinstall")
    for path in sources:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


_digest_of_this_code = functools.cache(code_digest)


def _order_in_file(features: Features, train: NDArray[np.int64]) -> dict[str, Any] | None:
    """Return what shuffling depends on where training rows are left in the file; None where they are in memory."""
    if features.places is None:
        return None
    order = np.argsort(features.places[train], kind="stable")
    return {"stretches": stretches_per_block(features), "order": hashlib.sha256(order.tobytes()).hexdigest()}


def _key(data: Data, candidate: Candidate, fold: Fold) -> str:
    digest = hashlib.sha256()
    depends_on = {
        "code": _digest_of_this_code(),
        "left in the file": _order_in_file(data.rows.features, fold.train),
        "torch": version("torch"),
        "numpy": version("numpy"),
        "scikit-learn": version("scikit-learn"),
        "recipe": candidate.that_matter(),
        "data": data.key,
        "classes": data.classes,
    }
    digest.update(json.dumps(depends_on, sort_keys=True).encode())
    for rows in (fold.train, fold.stop, fold.test, data.groups[fold.train]):
        digest.update(rows.tobytes() + b";")
    return digest.hexdigest()[:32]


def _save(path: Path, result: FoldFit) -> None:
    buffer = io.BytesIO()
    numbers = np.array([result.seconds, result.epochs, result.parameters], dtype=np.float64)
    np.savez(buffer, logits=result.logits, numbers=numbers)
    write_bytes(path, buffer.getvalue())


def _load(path: Path, name: str, fold: Fold) -> FoldFit | None:
    """Return the finished fit at ``path``; None where there is none, or none that can be read."""
    if not path.is_file():
        return None
    with (
        contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        np.load(path, allow_pickle=False) as stored,
    ):
        seconds, epochs, parameters = stored["numbers"].tolist()
        return FoldFit(name, fold, stored["logits"], seconds, int(epochs), int(parameters))
    return None


def by_candidate(fits: Iterable[FoldFit]) -> dict[str, list[FoldFit]]:
    """Group fits by the name of their candidate, in their order."""
    grouped: dict[str, list[FoldFit]] = {}
    for each in fits:
        grouped.setdefault(each.candidate, []).append(each)
    return grouped
