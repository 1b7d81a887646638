"""Score candidates on one split, as in the published report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...cache.atomic import write_json
from ...cache.errors import MmcliError
from ..evaluation.folds import Fold
from ..evaluation.metrics import score
from ..evaluation.splits import SPLITS, separated
from ..runs.folders import check_writable, new_folder
from .candidates import Candidate
from .fits import fit_all
from .setup import Setup, focus_of, open_data


def single_split(setup: Setup, candidates: Sequence[Candidate], focus_class: str | None = None) -> dict[str, Any]:
    """Train each candidate on one 8:1:1 split, stop it on the validation rows, and score validation and test rows.

    Returns
    -------
    dict
        ``classes``, ``rows`` (by part), ``focus_class``, ``folder`` and ``candidates``: name, ``val`` and ``test`` (see
        ``metrics.score``), ``gap`` (validation less test macro-F1) and parameters. ``results.json`` in ``folder`` has
        the same content.
    """
    check_writable(Path(setup.out))
    data, about, split = open_data(setup, candidates, SPLITS)
    assert split is not None
    if not split.test:
        raise MmcliError(
            f"--single-split scores the test part, and {setup.split_dir} has no labelled test row: take "
            "--without-test, which scores folds of the training and validation rows"
        )
    parts = split.named()
    group_of = dict(zip(data.guids, data.groups.tolist(), strict=True))
    row_of = {guid: row for row, guid in enumerate(data.guids)}
    train, val, test = (np.array([row_of[guid] for guid in guids], dtype=np.int64) for guids in parts.values())
    counts = np.bincount(data.rows.classes[test], minlength=len(data.classes)).tolist()
    focus = focus_of(focus_class, about | {"counts": counts})
    fold = Fold(0, 0, train, val, np.concatenate([val, test]))
    true, groups, n_val = data.rows.classes[fold.test], data.groups[fold.test], len(val)
    entries = []
    for fitted in fit_all(data, candidates, [fold], setup):
        predicted = fitted.logits.argmax(axis=1)
        val_scores = score(true[:n_val], predicted[:n_val], data.classes, groups[:n_val])
        test_scores = score(true[n_val:], predicted[n_val:], data.classes, groups[n_val:])
        gap = val_scores["macro_f1"] - test_scores["macro_f1"]
        entry = {"name": fitted.candidate, "val": val_scores, "test": test_scores, "gap": gap}
        entries.append(entry | {"parameters": fitted.parameters})
    with new_folder(Path(setup.out), "single-split") as (draft, folder):
        result = {
            **about,
            "folder": str(folder.absolute()),
            "rows": {name: len(guids) for name, guids in parts.items()},
            "focus_class": focus,
            "duplicates_separated": separated(split, group_of),
            "offsets": any(candidate.recipe.offsets for candidate in candidates),
            "candidates": entries,
        }
        write_json(draft / "results.json", result)
    return result
