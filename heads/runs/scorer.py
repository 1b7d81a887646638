"""``evaluate``: score a best.pt on the rows that it held out, or on new rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache.errors import DataError
from ...cache.store import FeatureCache
from ...featurize.encode import OnProgress
from ..evaluation.folds import groups_by_guid
from ..evaluation.metrics import Scores, score
from ..evaluation.splits import group_numbers, relabel, separated, without_copies
from .checkpoint import Checkpoint
from .labelled import RowReport, changed_labels, class_numbers, labels_of, left_for_features, usable_rows
from .trained import Trained, open_best_pt


@dataclass(frozen=True)
class Evaluation:
    """Scores of a best.pt by part, and what became of the labelled rows."""

    best_pt: str
    classes: list[str]
    fusion: str
    modality: str
    scores: dict[str, Scores]
    rows: RowReport
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data, with the rows and the scores of each part on top."""
        plain = {name: value for name, value in vars(self).items() if name not in ("scores", "rows", "notes")}
        return plain | self.rows.to_dict() | {part: scores.to_dict() for part, scores in self.scores.items()}


def evaluate(
    best_pt: str | Path | Trained,
    cache_path: str | Path | None = None,
    labels_path: str | Path | None = None,
    on: Sequence[str] = ("val", "test"),
    max_bytes: int | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Score a best.pt on the rows that it held out, or on labelled rows that it has not seen.

    Parameters
    ----------
    best_pt
        The file or run folder of a trained head; or the result of ``open_best_pt``, for another device or moved files.
    cache_path, labels_path
        Default: the cache and the labels file that the head was trained with.
    on
        Parts of its split (``train``, ``val``, ``test``), or ``new``: rows of ``labels_path`` that are in no part and
        are no copies of its training or validation rows. Parts without rows are left out, unless all are empty.
    max_bytes
        Limit for the memory of the process; features that do not fit are read as they are needed.
    on_progress
        Called with (pairs computed, pairs to compute) while stage 2 computes states.

    Raises
    ------
    DataError
        No row can be scored.
    """
    model = open_best_pt(best_pt)
    checkpoint = model.checkpoint
    with FeatureCache.open(checkpoint.cache_path(cache_path)) as cache:
        checkpoint.check_cache(cache)
        _, labels, absent = labels_of(cache, checkpoint.labels_path(labels_path))
        known = relabel(labels, checkpoint.relabelled, keep_dropped=True)
        parts, groups, counts = _rows_to_score(checkpoint, cache, known, [on] if isinstance(on, str) else on)
        changed = changed_labels(checkpoint.path, parts, labels)
        scores = {}
        for name, guids in parts.items():
            true = class_numbers(guids, known, checkpoint.classes)
            model.get_ready(cache, guids, on_progress)
            logits = model.of_rows(cache, guids, left_for_features(cache, max_bytes))
            scores[name] = score(true, logits.argmax(axis=1), checkpoint.classes, groups[name])
    recipe, rows = checkpoint.recipe, RowReport(absent, labels_changed=changed, **counts)
    return Evaluation(str(checkpoint.path), checkpoint.classes, recipe.fusion, recipe.modality, scores, rows)


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
    with_rows = {name: parts[name] for name in requested if parts[name]}
    usable, counts["rows_gone"], counts["labels_unknown"] = usable_rows(with_rows, labels, checkpoint.classes)
    counts["duplicates_separated"] = separated(cached, groups, {"val", "test"} & usable.keys())
    return usable, group_numbers(groups, usable), counts


def _nothing_to_score(checkpoint: Checkpoint, part: str) -> str:
    """Return the message for a part without rows."""
    if part == "new":
        why = "give --labels FILE with labels of other pairs"
    elif part == "test" and checkpoint.split.val:
        why = "its split has no labelled test part; label those pairs and score them with --on new, or use --on val"
    else:
        why = "it learned from all rows; give --from the run that held some out"
    return f"{checkpoint.path} has no {part} row to be scored on: {why}"
