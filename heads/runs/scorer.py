"""``evaluate``: score a best.pt on the rows that it held out, or on new rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError
from ...cache.store import FeatureCache
from ..evaluation.folds import groups_by_guid
from ..evaluation.metrics import score
from ..evaluation.splits import Split, group_numbers, relabel, separated, without_copies
from .checkpoint import Checkpoint
from .labelled import changed_labels, class_numbers, counts_of_unusable, labels_of, left_for_features, usable_rows
from .trained import OnProgress, Trained, open_best_pt


def evaluate(
    best_pt: str | Path | Trained,
    cache_path: str | Path | None = None,
    on: Sequence[str] = ("val", "test"),
    labels_path: str | Path | None = None,
    device: str = "cpu",
    max_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Score a best.pt on the rows that it held out, or on labelled rows that it has not seen.

    Parameters
    ----------
    best_pt
        The file or run folder of a trained head, or the result of ``open_best_pt``.
    cache_path, labels_path
        Default: the cache and the labels file that the head was trained with.
    on
        Parts of its split (``train``, ``val``, ``test``), or ``new``: rows of ``labels_path`` that are in no part and
        are no copies of its training or validation rows. Parts without rows are left out, unless all are empty.
    max_bytes
        As in ``train_head``.
    on_progress
        Called with (pairs computed, pairs to compute) while stage 2 computes states.

    Returns
    -------
    dict
        ``best_pt``, ``classes``, ``fusion``, ``modality``, ``labels_without_features``, and a score (see
        ``metrics.score``) by part. ``parts_without_rows`` lists the requested parts that are empty. Three counts by
        part: ``rows_gone`` (pairs of the split that have lost their label or features), ``labels_changed`` (rows scored
        with a label that differs from the splits folder beside best.pt) and ``labels_unknown`` (rows left out because
        the head does not know their class). ``duplicates_separated`` counts rows with a copy in another part of the
        split, and ``duplicates_left_out`` the copies that ``new`` leaves out.

    Raises
    ------
    DataError
        No row can be scored.
    """
    model = open_best_pt(best_pt, device)
    checkpoint = model.checkpoint
    with FeatureCache.open(checkpoint.cache_path(cache_path)) as cache:
        checkpoint.check_cache(cache)
        _, labels, absent = labels_of(cache, checkpoint.labels_path(labels_path))
        result: dict[str, Any] = {"best_pt": str(checkpoint.path), "classes": checkpoint.classes}
        result |= {"fusion": checkpoint.recipe.fusion, "modality": checkpoint.recipe.modality}
        result["labels_without_features"] = absent
        known = relabel(labels, checkpoint.relabelled, keep_dropped=True)
        parts, copies, counts = _rows_to_score(checkpoint, cache, known, [on] if isinstance(on, str) else on)
        result |= counts
        result["labels_changed"] = changed_labels(checkpoint.path, parts, labels)
        for name, guids in parts.items():
            true = class_numbers(guids, known, checkpoint.classes)
            model.get_ready(cache, guids, on_progress)
            logits = model.of_rows(cache, guids, left_for_features(cache, max_bytes))
            result[name] = score(true, logits.argmax(axis=1), checkpoint.classes, copies[name])
    return result


def _rows_to_score(
    checkpoint: Checkpoint, cache: FeatureCache, labels: dict[str, str], requested: Sequence[str]
) -> tuple[dict[str, list[str]], dict[str, NDArray[np.int64]], dict[str, Any]]:
    """Return the guids to score and their groups, by requested part, and the counts of other rows."""
    parts = checkpoint.split.named()
    seen = {guid for guids in parts.values() for guid in guids}
    cached = {name: [guid for guid in guids if guid in cache] for name, guids in parts.items()}
    groups = groups_by_guid(cache, [guid for guid in cache.guids if guid in seen or guid in labels])
    counts: dict[str, Any] = {}
    if "new" in requested:
        fresh = [guid for guid in labels if guid not in seen]
        parts["new"] = without_copies(fresh, [*cached["train"], *cached["val"]], groups)
        counts["duplicates_left_out"] = len(fresh) - len(parts["new"])
        if fresh and not parts["new"]:
            raise DataError(f"all {len(fresh)} new rows are copies of rows that the head learned from")
    counts["parts_without_rows"] = [name for name in requested if not parts[name]]
    if len(counts["parts_without_rows"]) == len(requested):
        raise DataError(_nothing_to_score(checkpoint, requested[0]))
    usable = {name: usable_rows(name, parts[name], labels, checkpoint.classes) for name in requested if parts[name]}
    counts |= counts_of_unusable(usable)
    held_out = [name for name in usable if name in ("val", "test")]
    counts["duplicates_separated"] = separated(Split(**cached), groups, held_out)
    scored = {name: rows.guids for name, rows in usable.items()}
    return scored, group_numbers(groups, scored), counts


def _nothing_to_score(checkpoint: Checkpoint, part: str) -> str:
    """Return the message for a part without rows."""
    if part == "new":
        why = "give --labels FILE with labels of other pairs"
    elif part == "test" and checkpoint.split.val:
        why = "its split has no labelled test part; label those pairs and score them with --on new, or use --on val"
    else:
        why = "it learned from all rows; give --from the run that held some out"
    return f"{checkpoint.path} has no {part} row to be scored on: {why}"
