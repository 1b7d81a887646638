"""Notes on stderr: what a reader of scores should know about them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .tables import shown_path
from .terminal import note

_FEW = 5  # rows of a class
_PARTS = {"train": "training", "val": "validation", "test": "test", "new": "new"}


def note_about(result: Mapping[str, Any]) -> None:
    """Print the notes on a result of training, evaluation or an experiment."""
    for text in result.get("notes", ()):
        note(text)
    for text in (*_about_rows(result), *_about_copies(result), *_about_rare_classes(result), *_about_scores(result)):
        note(f"note: {text}")


def _about_rows(result: Mapping[str, Any]) -> Iterator[str]:
    """Say which rows are used, and which are not."""
    if result["labels_without_features"]:
        yield f"{result['labels_without_features']} labels belong to pairs without features: left out"
    if result.get("new_rows"):
        new = result["new_rows"]
        if result["new_rows_go_to"] == "train":
            copies = result["new_copies"]
            but = f", except {copies} copies of validation and test pairs, which are left out" if copies else ""
            yield f"{new} labelled pairs are in no part of --split-dir: they train{but} (--new none leaves them out)"
        else:
            yield f"{new} labelled pairs are in no part of --split-dir: left out (--new train trains on them)"
    for name, gone in result.get("rows_gone", {}).items():
        if gone:
            left = _rows(result, name)
            used = "" if left is None else f"; {left} of {left + gone} are used"
            yield f"{gone} {_PARTS[name]} rows of the split have no label or no features any more{used}"
    for name, unknown in result.get("labels_unknown", {}).items():
        if unknown:
            yield f"{unknown} {_PARTS[name]} rows have a label that the head does not know: not scored"
    for name, changed in result.get("labels_changed", {}).items():
        if changed:
            yield f"{changed} {_PARTS[name]} rows have another label than in the split: today's label counts"
    if result.get("test_rows_unlabelled"):
        yield f"{result['test_rows_unlabelled']} test rows have no label: not scored, kept in test_split.csv"
    absent = [name for name in result.get("parts_without_rows", []) if name in _PARTS]
    if absent:
        yield f"the split has no labelled {' and no '.join(_PARTS[name] for name in absent)} row: not scored"
    if result.get("without_test"):
        where = "a split drawn with --split-seed " + str(result["split_seed"])
        if result["split_dir"] is not None:
            where = shown_path(result["split_dir"])
        yield f"the test rows that are left out are those of {where}"
    elif "without_test" in result:
        yield (
            "all labelled rows are scored, including the test rows of train-head: to choose by these scores and then "
            "report a test score, add --without-test"
        )


def _rows(result: Mapping[str, Any], part: str) -> int | None:
    """Return how many rows of a part were used, where the result says so."""
    if part in result:
        return int(result[part]["n"])
    rows = result.get("rows")
    return int(rows[part]) if isinstance(rows, Mapping) and part in rows else None


def _about_copies(result: Mapping[str, Any]) -> Iterator[str]:
    """Say which rows are copies, and what became of them."""
    if result.get("duplicates_together") and not result.get("duplicates_separated") and "folds" not in result:
        yield (
            f"{result['duplicates_together']} copies (same image or same cleaned text) are kept in one part with their "
            "originals"
        )
    if result.get("duplicates_separated"):
        yield (
            f"{result['duplicates_separated']} validation and test pairs have a copy (same image or same cleaned "
            "text) in another part, which flatters the scores; a split drawn with --group-duplicates keeps copies "
            "together"
        )
    if result.get("duplicates_left_out"):
        yield (
            f"{result['duplicates_left_out']} new pairs are copies (same image or same cleaned text) of rows that the "
            "head learned from: not scored"
        )


def _about_rare_classes(result: Mapping[str, Any]) -> Iterator[str]:
    """Say what became of classes with too few rows."""
    rare = result.get("rare_classes", {})
    listed = ", ".join(f"{name!r} ({count})" for name, count in rare.items())
    if rare and result["rare_classes_need"] is None:
        yield f"classes without a row in some part of --split-dir: {listed}"
    elif rare:
        where = "part of an 8:1:1 split" if "split_dir" in result or "folds" not in result else "fold"
        yield (
            f"to have a row in each {where}, a class needs {result['rare_classes_need']} rows, copies counted once; "
            f"too rare: {listed}"
        )
    if result.get("rare_merged"):
        yield f"{len(result['rare_merged'])} rare classes are merged into one class 'other' (--rare merge)"
    if result.get("rare_left_out"):
        yield f"{result['rare_left_out']} rows of rare classes are left out (--rare drop)"
    not_scored = result.get("classes_not_scored", result.get("rare_train_only", []))
    if not_scored:
        yield (
            f"in training only: {_listed(not_scored)}; the scores say nothing about them (--rare merge and --rare drop "
            "change that)"
        )


def _about_scores(result: Mapping[str, Any]) -> Iterator[str]:
    """Say why scores may be better than they should be, or unreliable."""
    for part in ("val", "test"):
        if part in result:
            yield from _about_part(part, result[part], result.get("rare_train_only", []))
    if result.get("full"):
        yield "the scores are of the rows that the head learned from"
    if result.get("offsets") and "val" in result.get("candidates", [result])[0]:
        yield "the offsets were fitted on the validation rows, so those scores are too high: look at the test rows"


def _about_part(part: str, scores: Mapping[str, Any], train_only: Sequence[str]) -> Iterator[str]:
    """Say which scores of a part of the split rest on too few rows."""
    per_class = scores["per_class"]
    few = [name for name, each in per_class.items() if 0 < each["groups"] < _FEW]
    if few:
        copies = "" if scores["n_groups"] == scores["n"] else " (copies counted once)"
        yield (
            f"fewer than {_FEW} {_PARTS[part]} rows{copies} of {_listed(few)}: the F1 is unreliable, and it counts as "
            "much in the macro-F1 as the others"
        )
    absent = [name for name, each in per_class.items() if each["support"] == 0 and name not in train_only]
    if absent:
        yield f"no {_PARTS[part]} row is of class {_listed(absent)}: not in the macro-F1"
    if scores["accuracy"] == 1:
        wrong = 1 - 0.05 ** (1 / scores["n_groups"])
        yield (
            f"all {_PARTS[part]} rows are right, so the intervals have no width: with this many rows, up to "
            f"{wrong:.1%} of all pairs may still be wrong (95 % bound)"
        )


def _listed(names: Iterable[str]) -> str:
    """Return class names in quotes, since names can hold commas."""
    return ", ".join(repr(name) for name in names)
