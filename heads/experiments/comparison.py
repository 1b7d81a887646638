"""``compare``: candidates on the same repeated folds, with intervals and paired differences."""

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
        Where to read and write, and how to make folds. A tenth of each training part is what a fit is stopped by; fit
        number i has the seed of its recipe plus i.
    candidates
        Recipes with names.
    against
        The candidate from which differences are taken; ``best``: the one with the highest macro-F1.
    focus_class
        Class to look at closely; default: the rarest.
    what
        Last part of the name of the result folder.

    Returns
    -------
    dict
        What ``results.json`` holds; ``candidates`` in the order of their macro-F1.

    Raises
    ------
    MmcliError
        Names that do not exist, features that are not there, classes too small for the folds: one line on what to do.
    """
    protocol = protocol or Protocol()
    names = [candidate.name for candidate in candidates]
    if against != "best" and against not in names:
        raise MmcliError(f"no candidate is called {against!r}: choose among {', '.join(names)}")
    check_writable(Path(setup.out))
    data, about, _ = open_data(setup, candidates, ("train", "val") if protocol.without_test else None, protocol.folds)
    made = repeated_folds(data.rows.classes, data.groups, data.classes, protocol.folds, protocol.repeats, protocol.seed)
    about |= scored_counts(data, made)
    about["focus_class"] = focus_of(focus_class, about)
    fits = fit_all(data, candidates, made, setup)
    data, made, fits = scored_only(data, made, fits)
    logits = out_of_fold(fits, len(data.guids), len(data.classes), protocol.repeats)
    scored = score_candidates(data, logits, fits, against)
    recipes = {candidate.name: candidate.recipe.to_dict() for candidate in candidates}
    result = {"what": what, **about, **asdict(protocol), **scored, "recipes": recipes}
    return write_results(Path(setup.out), what, result, data, logits, made)


def out_of_fold(fits: Sequence[FoldFit], n: int, n_classes: int, repeats: int) -> dict[str, NDArray[np.float32]]:
    """Return logits (R, n, C) by candidate: of each row, those of the fit that had it in its test part."""
    logits: dict[str, NDArray[np.float32]] = {}
    for name, each in by_candidate(fits).items():
        logits[name] = np.full((repeats, n, n_classes), np.nan, dtype=np.float32)
        for one in each:
            logits[name][one.fold.repeat, one.fold.test] = one.logits
    return logits


def score_candidates(
    data: Data, logits: dict[str, NDArray[np.float32]], fits: Sequence[FoldFit], against: str = "best"
) -> dict[str, Any]:
    """Return ``candidates`` (scores, intervals, differences; best first) and ``against`` (what they differ from)."""
    true, n_classes, names = data.rows.classes, len(data.classes), list(logits)
    predicted = np.stack([logits[name].argmax(axis=2) for name in names])  # (K, R, n)
    confusions = np.stack([[confusion_matrix(true, each, n_classes) for each in of_one] for of_one in predicted])
    drawn = paired_bootstrap(true, predicted, n_classes, seed=0, groups=data.groups)
    grouped = by_candidate(fits)
    listed = []
    for number, name in enumerate(names):
        entry = _scores(confusions[number], drawn, number, data.classes)
        entry |= {
            "fold_macro_f1": [float(macro_f1(_confusion(each, true, n_classes))) for each in grouped[name]],
            "parameters": grouped[name][0].parameters,
            "fit_seconds": float(np.mean([each.seconds for each in grouped[name]])),
            "epochs": float(np.mean([each.epochs for each in grouped[name]])),
        }
        listed.append({"name": name, **entry})
    macro = [entry["macro_f1"] for entry in listed]
    reference = int(np.argmax(macro)) if against == "best" else names.index(against)
    pairs = _pairs(len(names), reference, every=against == "best")
    folds = [each.fold for each in grouped[names[0]]]
    found = _differences(pairs, listed, drawn, data, predicted, folds)
    for number, entry in enumerate(listed):
        entry["difference"] = found.get((number, reference))
    listed.sort(key=lambda entry: -entry["macro_f1"])
    return {"against": names[reference], "differences_tested": len(pairs), "candidates": listed}


def _confusion(each: FoldFit, true: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    return confusion_matrix(true[each.fold.test], each.logits.argmax(axis=1), n_classes)


def _scores(confusions: NDArray[np.int64], drawn: Replicates, number: int, classes: Sequence[str]) -> dict[str, Any]:
    """Return the scores of one candidate, means over its repeats, with intervals; confusions are (R, C, C)."""
    f1 = f1_per_class(confusions).mean(axis=0)  # every repeat scores the same rows
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    recall = (hits / np.maximum(confusions.sum(axis=2), 1)).mean(axis=0)
    return {
        "macro_f1": float(np.nanmean(f1)),
        "macro_f1_ci": interval(drawn.macro_f1[:, number]),
        "accuracy": float(accuracy(confusions).mean()),
        "accuracy_ci": interval(drawn.accuracy[:, number]),
        "per_class": {
            each: dict.fromkeys(("f1", "f1_ci", "recall", "recall_ci"))
            if np.isnan(f1[index])
            else {
                "f1": float(f1[index]),
                "f1_ci": interval(drawn.f1[:, number, index]),
                "recall": float(recall[index]),
                "recall_ci": interval(drawn.recall[:, number, index]),
            }
            for index, each in enumerate(classes)
        },
        "confusion": confusions.mean(axis=0).tolist(),
    }


def _pairs(count: int, reference: int, every: bool) -> list[tuple[int, int]]:
    """Return the pairs of candidates whose difference is looked at: each with the reference, or every one.

    The best is known only after the scores are: with it as reference, every pair could have been the one looked at.
    """
    shown = [(number, reference) for number in range(count) if number != reference]
    others = itertools.combinations((number for number in range(count) if number != reference), 2)
    return shown + (list(others) if every else [])


def _differences(
    pairs: Sequence[tuple[int, int]],
    listed: Sequence[dict[str, Any]],
    drawn: Replicates,
    data: Data,
    predicted: NDArray[np.int64],
    folds: Sequence[Fold],
) -> dict[tuple[int, int], dict[str, float]]:
    """Return for each pair the difference in macro-F1, its interval, and p values, adjusted for their number too."""
    true, n_classes = data.rows.classes, len(data.classes)
    influences = np.stack([[influence(true, each, n_classes) for each in of_one] for of_one in predicted])
    fold_of = folds_of(folds, len(true))
    test_share = len(folds[0].test) / (len(folds[0].train) + len(folds[0].stop))
    found: dict[tuple[int, int], dict[str, float]] = {}
    for one, other in pairs:
        over_rows = drawn.macro_f1[:, one] - drawn.macro_f1[:, other]
        spread = fit_spread(influences[one] - influences[other], fold_of, data.groups)
        replicates = with_fits(over_rows, spread, seed=1)
        n_differ = len(np.unique(data.groups[(predicted[one] != predicted[other]).any(axis=0)]))
        by_fold = np.array(listed[one]["fold_macro_f1"]) - np.array(listed[other]["fold_macro_f1"])
        t, p_t = corrected_t(by_fold, test_share)
        low, high = interval(replicates)
        found[one, other] = {
            "macro_f1": listed[one]["macro_f1"] - listed[other]["macro_f1"],
            "low": low,
            "high": high,
            "p_bootstrap": bootstrap_p(replicates, tail_p(over_rows, spread, n_differ)),
            "t_corrected": t,
            "p_corrected_t": p_t,
        }
    for which in ("p_bootstrap", "p_corrected_t"):
        adjusted = holm(np.array([each[which] for each in found.values()]))
        for each, value in zip(found.values(), adjusted, strict=True):
            each[f"{which}_holm"] = float(value)
    return found
