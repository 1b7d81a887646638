"""What a reader of scores should know beside them, said on stderr."""

from collections.abc import Mapping
from typing import Any

from .terminal import note

_FEW = 5  # rows of a class


def note_about(result: Mapping[str, Any]) -> None:
    """Say on stderr what a reader of the scores should know."""
    for said in result.get("notes", ()):
        note(said)
    if result["labels_without_features"]:
        note(f"note: {result['labels_without_features']} labels are of pairs without features; left out")
    if result.get("duplicates_separated"):
        note(
            f"note: {result['duplicates_separated']} validation and test pairs have a copy (same image or same cleaned "
            "text) in another part, which flatters the scores; --group-duplicates keeps copies together"
        )
    for part in ("val", "test"):
        if part in result:
            _note_about_part(part, result[part])
    if result.get("stage2_left_out"):
        note(f"note: --full does not repeat stage 2: this is the head of its stage 1, {result['full_of']}, on all rows")
    if result.get("full"):
        note("note: the scores are of the rows that the head learned from")
    if result.get("offsets") and "val" in result.get("candidates", [result])[0]:
        note("note: the offsets were fitted on the validation rows, whose scores they flatter; look at the test rows")


def _note_about_part(part: str, scores: Mapping[str, Any]) -> None:
    """Say which scores of a part of the split rest on too few rows."""
    per_class = scores["per_class"]
    few = [name for name, each in per_class.items() if 0 < each["groups"] < _FEW]
    if few:
        copies = "" if scores["n_groups"] == scores["n"] else " (copies counted once)"
        note(
            f"note: fewer than {_FEW} {part} rows{copies} of {', '.join(few)}: its F1 is unreliable, and it counts as "
            "much in the macro-F1 as the others"
        )
    only_predicted = [name for name, each in per_class.items() if each["support"] == 0 and each["f1"] is not None]
    if only_predicted:
        note(
            f"note: no {part} row is of class {', '.join(only_predicted)}, but some are predicted as such: its F1 is "
            "0, and it counts as much in the macro-F1 as the others"
        )
    if scores["accuracy"] == 1:
        wrong = 1 - 0.05 ** (1 / scores["n_groups"])
        note(
            f"note: all {part} rows are right, so the intervals have no width: with as many rows, up to {wrong:.1%} of "
            "all pairs may still be wrong (95 % bound)"
        )
