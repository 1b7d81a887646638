"""``compare``: score candidates on the same repeated folds, with intervals and paired differences; or on one split."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ...cache.atomic import write_json
from ...cache.errors import MmcliError
from ..evaluation.folds import Fold, Indices, folds_of, repeated_folds
from ..evaluation.metrics import accuracy, confusion_matrix, f1_per_class, interval, macro_f1, score
from ..evaluation.splits import SPLITS, separated
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
from ..recipe import Recipe
from ..runs.folders import check_writable, new_folder
from .candidates import Candidate, candidates_of
from .fits import FoldFit, by_candidate, fit_all
from .results import (
    CandidateResult,
    ClassResult,
    Comparison,
    Difference,
    SplitCandidate,
    SplitComparison,
    write_results,
)
from .setup import Data, Protocol, Setup, focus_of, open_data, with_scored_counts


def compare(
    setup: Setup | str | Path,
    candidates: Sequence[Candidate | str],
    protocol: Protocol | None = None,
    against: str = "best",
    focus_class: str | None = None,
    what: str = "compare",
) -> Comparison:
    """Score candidates out of fold, on the same rows in the same folds with the same seeds, and test their differences.

    Parameters
    ----------
    setup, protocol
        Where to read and write (for the defaults: the cache file), and how to make folds. A tenth of each training part
        decides when a fit stops. Fit i has the seed of its recipe plus i.
    candidates
        Recipes with names; or fusions, which are trained by the default recipe (see ``candidates_of``).
    against
        The candidate from which differences are taken; ``best`` is the candidate with the highest macro-F1.
    focus_class
        Class to look at closely; default: the rarest class.
    what
        Last part of the name of the result folder.

    Raises
    ------
    MmcliError
        A name does not exist, features are missing, or a class is too small for the folds.
    """
    protocol, setup = protocol or Protocol(), setup if isinstance(setup, Setup) else Setup(setup)
    chosen = [named if isinstance(named, Candidate) else candidates_of([named], Recipe())[0] for named in candidates]
    names = [candidate.name for candidate in chosen]
    if against != "best" and against not in names:
        raise MmcliError(f"no candidate is called {against!r}: choose among {', '.join(names)}")
    check_writable(Path(setup.out))
    data, summary, _ = open_data(setup, chosen, ("train", "val") if protocol.without_test else None, protocol.folds)
    folds = repeated_folds(
        data.rows.classes, data.groups, data.classes, protocol.folds, protocol.repeats, protocol.seed
    )
    scored = np.unique(np.concatenate([fold.test for fold in folds]))  # the other rows are only trained on
    summary = with_scored_counts(summary, data, scored)
    focus = focus_of(focus_class, summary)
    fits = fit_all(data, chosen, folds, setup)
    data, folds, fits = _scored_only(data, folds, fits, scored)
    logits = out_of_fold(fits, len(data.guids), len(data.classes), protocol.repeats)
    results, reference, tested = score_candidates(data, logits, fits, against)
    with new_folder(Path(setup.out), what) as (draft, folder):
        result = Comparison(
            folder=str(folder.absolute()),
            what=what,
            data=summary,
            focus_class=focus,
            protocol=protocol,
            against=reference,
            differences_tested=tested,
            candidates=results,
            recipes={candidate.name: candidate.recipe.to_dict() for candidate in chosen},
        )
        write_results(draft, result, data, logits, folds)
    return result


def _scored_only(
    data: Data, folds: list[Fold], fits: list[FoldFit], scored: Indices
) -> tuple[Data, list[Fold], list[FoldFit]]:
    """Return only the rows ``scored``, with folds and fits whose test rows are renumbered accordingly."""
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
) -> tuple[list[CandidateResult], str, int]:
    """Return the candidates, best first, the name of the reference, and the number of differences tested."""
    true, n_classes, names = data.rows.classes, len(data.classes), list(logits)
    predicted = np.stack([logits[name].argmax(axis=2) for name in names])  # (K, R, n)
    drawn = paired_bootstrap(true, predicted, n_classes, seed=0, groups=data.groups)
    fits_of = by_candidate(fits)
    results = [_scored(data, fits_of[name], predicted[number], drawn, number) for number, name in enumerate(names)]
    macro = [result.macro_f1 for result in results]
    reference = int(np.argmax(macro)) if against == "best" else names.index(against)
    pairs = _pairs(len(names), reference, every=against == "best")
    folds = [fitted.fold for fitted in fits_of[names[0]]]
    differences = _differences(pairs, results, drawn, data, predicted, folds)
    for number, result in enumerate(results):
        results[number] = replace(result, difference=differences.get((number, reference)))
    results.sort(key=lambda result: -result.macro_f1)
    return results, names[reference], len(pairs)


def _scored(
    data: Data, fits: Sequence[FoldFit], predicted: NDArray[np.int64], drawn: Replicates, number: int
) -> CandidateResult:
    """Return the mean scores of candidate ``number`` over its repeats; ``predicted`` is (R, n)."""
    true, n_classes = data.rows.classes, len(data.classes)
    confusions = np.stack([confusion_matrix(true, repeat, n_classes) for repeat in predicted])  # (R, C, C)
    f1 = f1_per_class(confusions).mean(axis=0)  # all repeats score the same rows, so their means are comparable
    hits = np.diagonal(confusions, axis1=1, axis2=2)
    recall = (hits / np.maximum(confusions.sum(axis=2), 1)).mean(axis=0)
    per_class = {}
    for index, name in enumerate(data.classes):
        if np.isnan(f1[index]):
            per_class[name] = ClassResult(None, None, None, None)
            continue
        f1_ci, recall_ci = (interval(scores[:, number, index]) for scores in (drawn.f1, drawn.recall))
        per_class[name] = ClassResult(float(f1[index]), f1_ci, float(recall[index]), recall_ci)
    by_fold = [confusion_matrix(true[fit.fold.test], fit.logits.argmax(axis=1), n_classes) for fit in fits]
    return CandidateResult(
        name=fits[0].candidate,
        macro_f1=float(np.nanmean(f1)),
        macro_f1_ci=interval(drawn.macro_f1[:, number]),
        accuracy=float(accuracy(confusions).mean()),
        accuracy_ci=interval(drawn.accuracy[:, number]),
        per_class=per_class,
        confusion=confusions.mean(axis=0).tolist(),
        fold_macro_f1=[float(macro_f1(confusion)) for confusion in by_fold],
        parameters=fits[0].parameters,
        fit_seconds=float(np.median([fit.seconds for fit in fits])),  # the first fit of a process also imports
        epochs=float(np.mean([fit.epochs for fit in fits])),
    )


def _pairs(count: int, reference: int, every: bool) -> list[tuple[int, int]]:
    """Return the pairs of candidates to test: each candidate with the reference, or with ``every`` all pairs.

    If the reference is the best candidate, the scores have chosen the pairs, so p values are adjusted for all pairs.
    """
    others = [number for number in range(count) if number != reference]
    with_reference = [(number, reference) for number in others]
    return with_reference + (list(itertools.combinations(others, 2)) if every else [])


def _differences(
    pairs: Sequence[tuple[int, int]],
    results: Sequence[CandidateResult],
    drawn: Replicates,
    data: Data,
    predicted: NDArray[np.int64],
    folds: Sequence[Fold],
) -> dict[tuple[int, int], Difference]:
    """Return the difference in macro-F1 of each pair, with its interval and its p values, raw and adjusted."""
    true, n_classes = data.rows.classes, len(data.classes)
    influences = np.stack([[influence(true, repeat, n_classes) for repeat in repeats] for repeats in predicted])
    fold_of = folds_of(folds, len(true))
    test_share = len(folds[0].test) / (len(folds[0].train) + len(folds[0].stop))
    differences: dict[tuple[int, int], Difference] = {}
    for first, second in pairs:
        over_rows = drawn.macro_f1[:, first] - drawn.macro_f1[:, second]
        spread = fit_spread(influences[first] - influences[second], fold_of, data.groups)
        replicates = with_fits(over_rows, spread, seed=1)
        n_differ = len(np.unique(data.groups[(predicted[first] != predicted[second]).any(axis=0)]))
        by_fold = np.array(results[first].fold_macro_f1) - np.array(results[second].fold_macro_f1)
        t, p_t = corrected_t(by_fold, test_share)
        p_bootstrap = bootstrap_p(replicates, tail_p(over_rows, spread, n_differ))
        change = results[first].macro_f1 - results[second].macro_f1
        differences[first, second] = Difference(change, *interval(replicates), p_bootstrap, t, p_t)
    for name in ("p_bootstrap", "p_corrected_t"):
        adjusted = holm(np.array([getattr(difference, name) for difference in differences.values()]))
        for pair, value in zip(pairs, adjusted, strict=True):
            differences[pair] = replace(differences[pair], **{f"{name}_holm": float(value)})
    return differences


def single_split(setup: Setup, candidates: Sequence[Candidate], focus_class: str | None = None) -> SplitComparison:
    """Train each candidate on one 8:1:1 split, stop it on the validation rows, and score validation and test rows.

    This is how the published report compares. ``results.json`` in the result folder has the content of the result.
    """
    check_writable(Path(setup.out))
    data, summary, split = open_data(setup, candidates, SPLITS)
    assert split is not None
    if not split.test:
        raise MmcliError(
            f"--single-split scores the test part, and {setup.split.split_dir} has no labelled test row: take "
            "--without-test, which scores folds of the training and validation rows"
        )
    parts, classes = split.named(), data.rows.classes
    row_of = {guid: row for row, guid in enumerate(data.guids)}
    train, val, test = (np.array([row_of[guid] for guid in guids], dtype=np.int64) for guids in parts.values())
    focus = focus_of(focus_class, with_scored_counts(summary, data, test))
    group_of = dict(zip(data.guids, data.groups.tolist(), strict=True))
    summary = replace(summary, rows=replace(summary.rows, duplicates_separated=separated(parts, group_of)))
    results = []
    for fitted in fit_all(data, candidates, [Fold(0, 0, train, val, np.concatenate([val, test]))], setup):
        predicted = np.split(fitted.logits.argmax(axis=1), [len(val)])
        on_val, on_test = (
            score(classes[rows], numbers, data.classes, data.groups[rows])
            for rows, numbers in zip((val, test), predicted, strict=True)
        )
        gap = on_val.macro_f1 - on_test.macro_f1
        results.append(SplitCandidate(fitted.candidate, on_val, on_test, gap, fitted.parameters))
    with new_folder(Path(setup.out), "single-split") as (draft, folder):
        result = SplitComparison(
            folder=str(folder.absolute()),
            data=summary,
            n_rows={name: len(guids) for name, guids in parts.items()},
            focus_class=focus,
            offsets=any(candidate.recipe.offsets for candidate in candidates),
            candidates=results,
        )
        write_json(draft / "results.json", result.to_dict())
    return result
