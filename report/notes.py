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
        few = [name for name, each in result.get(part, {}).get("per_class", {}).items() if 0 < each["support"] < _FEW]
        if few:
            note(
                f"note: fewer than {_FEW} {part} rows of {', '.join(few)}: its scores say little, and bend the macro-F1"
            )
    if result.get("stage2_left_out"):
        note(f"note: --full does not repeat stage 2: this is the head of its stage 1, {result['full_of']}, on all rows")
    if result.get("full"):
        note("note: the scores are of the rows that the head learned from")
    if result.get("offsets") and "val" in result.get("candidates", [result])[0]:
        note("note: the offsets were fitted on the validation rows, whose scores they flatter; look at the test rows")
