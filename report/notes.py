"""Notes on stderr: what a reader of scores should know about them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from .tables import shown_path
from .terminal import note

if TYPE_CHECKING:
    from ..heads.evaluation.metrics import Scores
    from ..heads.experiments.results import Comparison, SplitComparison
    from ..heads.runs.labelled import RowReport
    from ..heads.runs.run_folder import RunResult
    from ..heads.runs.scorer import Evaluation

_FEW = 5  # rows of a class
_PARTS = {"train": "training", "val": "validation", "test": "test", "new": "new"}
_SPLIT = "part of an 8:1:1 split"
_FITTED_OFFSETS = "the offsets were fitted on the validation rows, so those scores are too high: look at the test rows"


def note_about_run(result: "RunResult | Evaluation", offsets: bool = False, full: bool = False) -> None:
    """Print the notes on a result of training or evaluation.

    ``offsets`` says whether offsets were fitted on the validation rows, ``full`` whether the head was trained on all
    rows.
    """
    for text in result.notes:
        note(text)
    rows, scores = result.rows, result.scores
    _print(_about_rows(rows, {part: scores[part].n for part in scores}))
    _print(_about_copies(rows))
    _print(_about_rare_classes(rows, _SPLIT))
    for part in ("val", "test", "new"):
        if part in scores:
            _print(_about_part(part, scores[part], rows.rare_train_only or []))
    if full:
        _print(["the scores are of the rows that the head learned from"])
    if offsets and "val" in scores:
        _print([_FITTED_OFFSETS])


def note_about_folds(result: "Comparison") -> None:
    """Print the notes on a result of an experiment on folds."""
    rows, split = result.data.rows, result.data.split
    _print(_about_rows(rows, {}))
    if split is not None:
        drawn = f"a split drawn with --split-seed {split.seed}"
        where = drawn if split.split_dir is None else shown_path(str(split.split_dir))
        rare = "" if split.rare == "train-only" else f", with --rare {split.rare}"
        _print([f"the test rows that are left out are those of {where}{rare}"])
    else:
        _print(
            [
                "all labelled rows are scored, including the test rows of train-head: to choose by these scores and "
                "then report a test score, add --without-test"
            ]
        )
    _print(_about_rare_classes(rows, "fold" if split is None else _SPLIT))
    counts = zip(result.data.classes, result.data.counts, strict=True)
    _print(_about_few("scored rows", [name for name, count in counts if 0 < count < _FEW]))


def note_about_split(result: "SplitComparison") -> None:
    """Print the notes on candidates that were trained on one split."""
    rows = result.data.rows
    _print(_about_rows(rows, result.n_rows))
    _print(_about_copies(rows))
    _print(_about_rare_classes(rows, _SPLIT))
    for part, scores in (("val", result.candidates[0].val), ("test", result.candidates[0].test)):
        _print(_about_part(part, scores, rows.rare_train_only or []))
    if result.offsets:
        _print([_FITTED_OFFSETS])


def _print(notes: Iterable[str]) -> None:
    for text in notes:
        note(f"note: {text}")


def _about_rows(rows: "RowReport", used: Mapping[str, int]) -> Iterator[str]:
    """Say which rows are not used; ``used`` counts rows by part."""
    if rows.labels_without_features:
        yield f"{rows.labels_without_features} labels belong to pairs without features: left out"
    if rows.new_rows and rows.new_rows_go_to == "train":
        but = f", except {rows.new_copies} copies of validation and test pairs, which are left out"
        yield (
            f"{rows.new_rows} labelled pairs are in no part of --split-dir: they train{but if rows.new_copies else ''} "
            "(--new none leaves them out)"
        )
    elif rows.new_rows:
        yield f"{rows.new_rows} labelled pairs are in no part of --split-dir: left out (--new train trains on them)"
    for part, gone in (rows.rows_gone or {}).items():
        if gone:
            of_all = f"; {used[part]} of {used[part] + gone} are used" if part in used else ""
            yield f"{gone} {_PARTS[part]} rows of the split have no label or no features any more{of_all}"
    for part, unknown in (rows.labels_unknown or {}).items():
        if unknown:
            yield f"{unknown} {_PARTS[part]} rows have a label that the head does not know: not scored"
    for part, changed in (rows.labels_changed or {}).items():
        if changed:
            yield f"{changed} {_PARTS[part]} rows have another label than in the split: today's label counts"
    if rows.test_rows_unlabelled:
        yield f"{rows.test_rows_unlabelled} test rows have no label: not scored, kept in test_split.csv"
    if rows.parts_without_rows:
        absent = " and no ".join(_PARTS[part] for part in rows.parts_without_rows)
        yield f"the split has no labelled {absent} row: not scored"


def _about_copies(rows: "RowReport") -> Iterator[str]:
    """Say which rows are copies, and what became of them."""
    copies = "(same image or same cleaned text)"
    if rows.duplicates_together and not rows.duplicates_separated:
        yield f"{rows.duplicates_together} copies {copies} are kept in one part with their originals"
    if rows.duplicates_separated:
        yield (
            f"{rows.duplicates_separated} validation and test pairs have a copy {copies} in another part, which "
            "flatters the scores; a split drawn with --group-duplicates keeps copies together"
        )
    if rows.duplicates_left_out:
        yield f"{rows.duplicates_left_out} new pairs are copies {copies} of rows that the head learned from: not scored"


def _about_rare_classes(rows: "RowReport", where: str) -> Iterator[str]:
    """Say what became of classes with too few rows for each ``where``."""
    listed = ", ".join(f"{name!r} ({count})" for name, count in (rows.rare_classes or {}).items())
    if listed and rows.rare_classes_need is None:
        yield f"classes without a row in some part of --split-dir: {listed}"
    elif listed:
        yield (
            f"to have a row in each {where}, a class needs {rows.rare_classes_need} rows, copies counted once; too "
            f"rare: {listed}"
        )
    if rows.rare_merged:
        yield f"{len(rows.rare_merged)} rare classes are merged into one class 'other' (--rare merge)"
    if rows.rare_left_out:
        yield f"{rows.rare_left_out} rows of rare classes are left out (--rare drop)"
    not_scored = rows.rare_train_only if rows.classes_not_scored is None else rows.classes_not_scored
    if not_scored:
        yield (
            f"in training only: {_listed(not_scored)}; the scores say nothing about them (--rare merge and --rare drop "
            "change that)"
        )


def _about_part(part: str, scores: "Scores", train_only: Sequence[str]) -> Iterator[str]:
    """Say which scores of a part of the split rest on too few rows."""
    copies = "" if scores.n_groups == scores.n else " (copies counted once)"
    few = [name for name, of_class in scores.per_class.items() if 0 < of_class.groups < _FEW]
    yield from _about_few(f"{_PARTS[part]} rows{copies}", few)
    support = {name: of_class.support for name, of_class in scores.per_class.items() if name not in train_only}
    absent = [name for name, count in support.items() if count == 0]
    if absent:
        yield f"no {_PARTS[part]} row is of class {_listed(absent)}: not in the macro-F1"
    if scores.accuracy == 1:
        wrong = 1 - 0.05 ** (1 / scores.n_groups)
        yield (
            f"all {_PARTS[part]} rows are right, so the intervals have no width: with this many rows, up to "
            f"{wrong:.1%} of all pairs may still be wrong (95 % bound)"
        )


def _about_few(what: str, classes: Sequence[str]) -> Iterator[str]:
    if classes:
        yield (
            f"fewer than {_FEW} {what} of {_listed(classes)}: the F1 is unreliable, and it counts as much in the "
            "macro-F1 as the others"
        )


def _listed(names: Iterable[str]) -> str:
    """Return class names in quotes, since names can hold commas."""
    return ", ".join(repr(name) for name in names)
