"""``compare``: score candidates on the same repeated folds, with intervals and paired differences."""

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import MmcliError
from ..evaluation.folds import Fold, folds_of, repeated_folds
from ..evaluation.metrics import accuracy, confusion_matrix, f1_per_class, interval, macro_f1
from ..evaluation.statistics import (
    Replicates,
    bootstrap_p,
    corrected_t,
    fit_spread,
    holm,
    influence,
    paired_bootstrap,
    tail_p,
    with_fits,
)
from ..runs.folders import check_writable
from .candidates import Candidate, Data, FoldFit
from .fits import by_candidate, fit_all
from .results import write_results
from .setup import Protocol, Setup, focus_of, open_data, scored_counts, scored_only


def compare(
    setup: Setup,
    candidates: Sequence[Candidate],
    protocol: Protocol | None = None,
    against: str = "best",
    focus_class: str | None = None,
    what: str = "compare",
) -> dict[str, Any]:
    """Score candidates out of fold, on the same rows in the same folds with the same seeds, and test their differences.

    Parameters
    ----------
    setup, protocol
        Where to read and write, and how to make folds. A tenth of each training part decides when a fit stops. Fit i
        has the seed of its recipe plus i.
    candidates
        Recipes with names.
    against
        The candidate from which differences are taken; ``best`` is the candidate with the highest macro-F1.
    focus_class
        Class to look at closely; default: the rarest class.
    what
        Last part of the name of the result folder.

    Returns
    -------
    dict
        The content of ``results.json``; ``candidates`` are sorted by macro-F1.

    Raises
    ------
    MmcliError
        A name does not exist, features are missing, or a class is too small for the folds.
    """
    protocol = protocol or Protocol()
    names = [candidate.name for candidate in candidates]
    if against != "best" and against not in names:
        raise MmcliError(f"no candidate is called {against!r}: choose among {', '.join(names)}")
    check_writable(Path(setup.out))
    data, about, _ = open_data(setup, candidates, ("train", "val") if protocol.without_test else None, protocol.folds)
    folds = repeated_folds(
        data.rows.classes, data.groups, data.classes, protocol.folds, protocol.repeats, protocol.seed
    )
    about |= scored_counts(data, folds)
    about["focus_class"] = focus_of(focus_class, about)
    fits = fit_all(data, candidates, folds, setup)
    data, folds, fits = scored_only(data, folds, fits)
    logits = out_of_fold(fits, len(data.guids), len(data.classes), protocol.repeats)
    scores = score_candidates(data, logits, fits, against)
    recipes = {candidate.name: candidate.recipe.to_dict() for candidate in candidates}
    result = {"what": what, **about, **asdict(protocol), **scores, "recipes": recipes}
    return write_results(Path(setup.out), what, result, data, logits, folds)


def out_of_fold(fits: Sequence[FoldFit], n: int, n_classes: int, repeats: int) -> dict[str, NDArray[np.float32]]:
    """Return logits (R, n, C) by candidate; each row has the logits of the fit that tested it."""
    logits: dict[str, NDArray[np.float32]] = {}
    for name, fits_of_name in by_candidate(fits).items():
        logits[name] = np.full((repeats, n, n_classes), np.nan, dtype=np.float32)
        for fitted in fits_of_name:
            logits[name][fitted.fold.repeat, fitted.fold.test] = fitted.logits
    return logits


def score_candidates(
    data: Data, logits: dict[str, NDArray[np.float32]], fits: Sequence[FoldFit], against: str = "best"
) -> dict[str, Any]:
    """Return ``candidates`` (scores, intervals, differences; best first) and ``against``, the name of the reference."""
    true, n_classes, names = data.rows.classes, len(data.classes), list(logits)
    predicted = np.stack([logits[name].argmax(axis=2) for name in names])  # (K, R, n)
    drawn = paired_bootstrap(true, predicted, n_classes, seed=0, groups=data.groups)
    fits_of = by_candidate(fits)
    entries = []
    for number, name in enumerate(names):
        confusions = np.stack([confusion_matrix(true, repeat, n_classes) for repeat in predicted[number]])
        by_fold = [
            confusion_matrix(true[fitted.fold.test], fitted.logits.argmax(axis=1), n_classes)
            for fitted in fits_of[name]
        ]
        entry = {"name": name, **_scores(confusions, drawn, number, data.classes)}
        entry |= {
            "fold_macro_f1": [float(macro_f1(confusion)) for confusion in by_fold],
            "parameters": fits_of[name][0].parameters,
            "fit_seconds": float(np.mean([fitted.seconds for fitted in fits_of[name]])),
            "epochs": float(np.mean([fitted.epochs for fitted in fits_of[name]])),
        }
        entries.append(entry)
    macro = [entry["macro_f1"] for entry in entries]
    reference = int(np.argmax(macro)) if against == "best" else names.index(against)
    pairs = _pairs(len(names), reference, every=against == "best")
    folds = [fitted.fold for fitted in fits_of[names[0]]]
    differences = _differences(pairs, entries, drawn, data, predicted, folds)
    for number, entry in enumerate(entries):
        entry["difference"] = differences.get((number, reference))
    entries.sort(key=lambda entry: -entry["macro_f1"])
    return {"against": names[reference], "differences_tested": len(pairs), "candidates": entries}


def _scores(confusions: NDArray[np.int64], drawn: Replicates, number: int, classes: Sequence[str]) -> dict[str, Any]:
    """Return the mean scores of one candidate over its repeats, with intervals; confusions are (R, C, C)."""
    f1 = f1_per_class(confusions).mean(axis=0)  # all repeats score the same rows, so their means are comparable
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    recall = (hits / np.maximum(confusions.sum(axis=2), 1)).mean(axis=0)
    return {
        "macro_f1": float(np.nanmean(f1)),
        "macro_f1_ci": interval(drawn.macro_f1[:, number]),
        "accuracy": float(accuracy(confusions).mean()),
        "accuracy_ci": interval(drawn.accuracy[:, number]),
        "per_class": {
            name: dict.fromkeys(("f1", "f1_ci", "recall", "recall_ci"))
            if np.isnan(f1[index])
            else {
                "f1": float(f1[index]),
                "f1_ci": interval(drawn.f1[:, number, index]),
                "recall": float(recall[index]),
                "recall_ci": interval(drawn.recall[:, number, index]),
            }
            for index, name in enumerate(classes)
        },
        "confusion": confusions.mean(axis=0).tolist(),
    }


def _pairs(count: int, reference: int, every: bool) -> list[tuple[int, int]]:
    """Return the pairs of candidates to test: each candidate with the reference, or with ``every`` all pairs.

    If the reference is the best candidate, the scores have chosen the pairs, so p values are adjusted for all pairs.
    """
    others = [number for number in range(count) if number != reference]
    with_reference = [(number, reference) for number in others]
    return with_reference + (list(itertools.combinations(others, 2)) if every else [])


def _differences(
    pairs: Sequence[tuple[int, int]],
    entries: Sequence[dict[str, Any]],
    drawn: Replicates,
    data: Data,
    predicted: NDArray[np.int64],
    folds: Sequence[Fold],
) -> dict[tuple[int, int], dict[str, float]]:
    """Return the difference in macro-F1 of each pair, with its interval and its p values, raw and adjusted."""
    true, n_classes = data.rows.classes, len(data.classes)
    influences = np.stack([[influence(true, repeat, n_classes) for repeat in repeats] for repeats in predicted])
    fold_of = folds_of(folds, len(true))
    test_share = len(folds[0].test) / (len(folds[0].train) + len(folds[0].stop))
    differences: dict[tuple[int, int], dict[str, float]] = {}
    for first, second in pairs:
        over_rows = drawn.macro_f1[:, first] - drawn.macro_f1[:, second]
        spread = fit_spread(influences[first] - influences[second], fold_of, data.groups)
        replicates = with_fits(over_rows, spread, seed=1)
        n_differ = len(np.unique(data.groups[(predicted[first] != predicted[second]).any(axis=0)]))
        by_fold = np.array(entries[first]["fold_macro_f1"]) - np.array(entries[second]["fold_macro_f1"])
        t, p_t = corrected_t(by_fold, test_share)
        low, high = interval(replicates)
        differences[first, second] = {
            "macro_f1": entries[first]["macro_f1"] - entries[second]["macro_f1"],
            "low": low,
            "high": high,
            "p_bootstrap": bootstrap_p(replicates, tail_p(over_rows, spread, n_differ)),
            "t_corrected": t,
            "p_corrected_t": p_t,
        }
    for name in ("p_bootstrap", "p_corrected_t"):
        adjusted = holm(np.array([difference[name] for difference in differences.values()]))
        for difference, value in zip(differences.values(), adjusted, strict=True):
            difference[f"{name}_holm"] = float(value)
    return differences
