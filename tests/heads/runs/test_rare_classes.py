"""What becomes of classes too rare for three parts, and what commands say about them."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import synthetic_block, write_cache
from mmcli.cache import DataError, FeatureCache, MmcliError, read_labels
from mmcli.heads import RunOptions, evaluate, load_checkpoint, train_full, train_head
from mmcli.heads.evaluation.splits import SplitOptions
from mmcli.heads.experiments import Protocol, Setup, candidates_of, compare
from sklearn.metrics import f1_score
from small_experiments import LEARNS, QUICK, out_of_fold, write_tags


@pytest.fixture
def rare(tmp_path):
    """Two large classes, and three with 3, 4 and 6 rows; the embeddings tell all five."""
    random = np.random.default_rng(0)
    counts = {"cat": 150, "dog": 120, "emu": 3, "fox": 4, "gnu": 6}
    names = random.permutation(np.repeat(list(counts), list(counts.values())))
    block = synthetic_block([str(guid) for guid in range(len(names))], 16)
    for side in ("image", "text"):
        block.columns[side] += 3 * np.eye(5, 16, dtype=np.float32)[[list(counts).index(name) for name in names]]
    labels = write_tags(tmp_path / "labels.csv", {str(guid): name for guid, name in enumerate(names)})
    return write_cache(tmp_path / "features.h5", block), labels


def test_rare_classes_train_only_and_are_not_in_the_macro_f1(rare, tmp_path, cli):
    path, labels = rare
    run = train_head(path, labels, LEARNS, options=RunOptions(tmp_path / "runs"))
    split, tags = load_checkpoint(run.best_pt).split, read_labels(labels)
    assert run.classes == ["cat", "dog", "emu", "fox", "gnu"]
    assert run.rows.rare_classes == {"emu": 3, "fox": 4, "gnu": 6}
    assert (run.rows.rare_classes_need, run.rows.rare_train_only) == (10, ["emu", "fox", "gnu"])
    assert {tags[guid] for guid in (*split.val, *split.test)} == {"cat", "dog"}
    assert run.scores["train"].n + run.scores["val"].n + run.scores["test"].n == 283
    said = [run.classes[row] for row in predicted_of(path, run, split.test)]
    expected = f1_score([tags[g] for g in split.test], said, average="macro", labels=["cat", "dog"])
    assert run.scores["test"].macro_f1 == pytest.approx(expected)
    assert run.scores["test"].per_class["emu"].f1 is None
    assert run.scores["train"].per_class["emu"].f1 > 0.5
    arguments = ("--cache", path, "--labels", labels, "--epochs", "2", "--jobs", "1")
    for command in (
        ("train-head", *arguments),
        ("compare", "--fusions", "concat,linear", "--folds", "5", "--repeats", "1", *arguments),
        ("ablate", "--folds", "4", "--repeats", "1", *arguments),
        ("sweep", "--grid", "dropout=0.2", "--folds", "4", *arguments),
        ("compare", "--fusions", "concat", "--single-split", *arguments),
    ):
        code, _, err = cli(*command)
        assert code == 0, err
        assert "'emu'" in err
    latest = "artifacts/runs/latest"
    assert cli("evaluate", "--from", latest)[0] == 0
    assert cli("train-head", "--full", "--from", latest)[0] == 0


def predicted_of(path, run, guids):
    from mmcli.heads import predict_logits

    with FeatureCache.open(path) as cache:
        return predict_logits(load_checkpoint(run.best_pt).head, cache.features(guids)).argmax(axis=1)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_compare_scores_the_rows_that_a_fold_can_hold(rare, tmp_path):
    path, labels = rare
    setup = Setup(path, labels, out=tmp_path / "experiments", jobs=1)
    result = compare(setup, candidates_of(["concat", "linear"], LEARNS), Protocol(5, 2))
    tags = read_labels(labels)
    assert (result.data.rows.classes_not_scored, result.data.rows.train_only_rows) == (["emu", "fox"], 7)
    assert result.focus_class == "gnu"
    rows = [row for row in out_of_fold(result.folder) if row["candidate"] == "concat"]
    assert {row["guid"] for row in rows} == {guid for guid, tag in tags.items() if tag not in ("emu", "fox")}
    entry = next(each for each in result.candidates if each.name == "concat")
    scores = []
    for repeat in ("0", "1"):
        of_repeat = [row for row in rows if row["repeat"] == repeat]
        said = [max(result.data.classes, key=lambda name, row=row: float(row[name])) for row in of_repeat]
        kept = {"average": "macro", "labels": ["cat", "dog", "gnu"]}
        scores.append(f1_score([row["tag"] for row in of_repeat], said, **kept))
    assert entry.macro_f1 == pytest.approx(np.mean(scores))
    assert entry.per_class["emu"].f1 is None
    low, high = entry.macro_f1_ci
    assert low <= entry.macro_f1 <= high
    with pytest.raises(MmcliError, match="class 'emu' has no row that is scored: choose among cat, dog, gnu"):
        compare(setup, candidates_of(["concat"], QUICK), Protocol(5, 1), focus_class="emu")


@pytest.mark.parametrize("how", ["merge", "drop"])
def test_rare_classes_are_merged_or_dropped(rare, tmp_path, how):
    path, labels = rare
    run = train_head(path, labels, LEARNS, split=SplitOptions(rare=how), options=RunOptions(tmp_path / "runs"))
    merged = how == "merge"
    assert run.classes == (["cat", "dog", "other"] if merged else ["cat", "dog"])
    assert run.rows.rare_left_out == (0 if merged else 13)
    assert run.rows.rare_merged == (["emu", "fox", "gnu"] if merged else [])
    assert sum(run.scores[part].n for part in ("train", "val", "test")) == (283 if merged else 270)
    again = evaluate(run.best_pt, on=("train", "val", "test"))
    assert all(again.scores[part] == run.scores[part] for part in ("train", "val", "test"))
    why = "no new row to be scored on" if merged else "none of the 13 new rows has a label that the head knows"
    with pytest.raises(DataError, match=why):
        evaluate(run.best_pt, on="new")
    assert train_full(run.best_pt, options=RunOptions(tmp_path / "runs")).scores["train"].n == (283 if merged else 270)
    setup = Setup(path, labels, SplitOptions(rare=how), tmp_path / "experiments", jobs=1)
    result = compare(setup, candidates_of(["concat"], QUICK), Protocol(5, 1))
    assert result.data.classes == (["cat", "dog", "gnu", "other"] if merged else ["cat", "dog", "gnu"])


def test_merges_that_cannot_be(rare, tmp_path):
    path, labels = rare
    tags = read_labels(labels)
    write_tags(labels, {guid: "other" if tag == "emu" else tag for guid, tag in tags.items()})
    with pytest.raises(DataError, match="into a class 'other', and the labels file already has that class"):
        train_head(path, labels, QUICK, split=SplitOptions(rare="merge"), options=RunOptions(tmp_path / "runs"))
    write_tags(labels, {guid: tag for guid, tag in tags.items() if tag not in ("emu", "fox")})
    with pytest.raises(DataError, match="needs two rare classes, and only 'gnu' is rare: use --rare train-only"):
        train_head(path, labels, QUICK, split=SplitOptions(rare="merge"), options=RunOptions(tmp_path / "runs"))
    with pytest.raises(MmcliError, match="rare cannot be 'hide': choose one of train-only, merge, drop"):
        train_head(path, labels, QUICK, split=SplitOptions(rare="hide"), options=RunOptions(tmp_path / "runs"))


def test_own_parts_with_a_class_that_only_trains_or_only_tests(rare, tmp_path):
    path, labels = rare
    run = train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs"))
    splits, tags = Path(run.run) / "splits", read_labels(labels)
    again = train_head(path, labels, QUICK, split=SplitOptions(splits), options=RunOptions(tmp_path / "runs"))
    assert again.rows.rare_train_only == ["emu", "fox", "gnu"]
    assert again.classes == run.classes
    train = read_labels(splits / "train_split.csv")
    moved = {guid: tag for guid, tag in train.items() if tag == "emu"}
    one = dict([next(iter(moved.items()))])
    parts = {name: read_labels(splits / f"{name}_split.csv") for name in ("train", "val")}
    write_tags(splits / "train_split.csv", {guid: tag for guid, tag in train.items() if guid not in one})
    write_tags(splits / "val_split.csv", parts["val"] | one)
    held_out = train_head(path, labels, QUICK, split=SplitOptions(splits), options=RunOptions(tmp_path / "runs"))
    assert held_out.rows.rare_train_only == ["fox", "gnu"]
    assert held_out.scores["val"].per_class["emu"].support == 1
    for name, tags_of_part in parts.items():
        write_tags(splits / f"{name}_split.csv", tags_of_part)
    write_tags(splits / "train_split.csv", {guid: tag for guid, tag in train.items() if guid not in moved})
    write_tags(splits / "test_split.csv", read_labels(splits / "test_split.csv") | moved)
    with pytest.raises(DataError, match=r"class 'emu' has 3 row\(s\) in the test part .* or .* --rare drop"):
        train_head(path, labels, QUICK, split=SplitOptions(splits), options=RunOptions(tmp_path / "runs"))
    dropped = train_head(
        path, labels, QUICK, split=SplitOptions(splits, rare="drop"), options=RunOptions(tmp_path / "runs")
    )
    assert dropped.classes == ["cat", "dog"]
    assert dropped.rows.rare_left_out == sum(tag in ("emu", "fox", "gnu") for tag in tags.values())


def test_finetune_of_a_head_without_test_rows_with_rare_classes_and_pairs_that_are_gone(
    sixty, raw_sixty, tmp_path, cli
):
    tags = {guid: "emu" if guid in ("0", "1", "2") else tag for guid, tag in read_labels(raw_sixty[1]).items()}
    labels = write_tags(tmp_path / "labels.csv", tags)
    drawn = train_head(sixty, labels, QUICK, options=RunOptions(tmp_path / "runs"))
    assert drawn.rows.rare_train_only == ["emu"]
    splits = Path(drawn.run) / "splits"
    (splits / "test_split.csv").unlink()
    run = train_head(
        sixty, labels, QUICK, split=SplitOptions(splits, new="none"), options=RunOptions(tmp_path / "runs")
    )
    split = load_checkpoint(run.best_pt).split
    gone = next(guid for guid in split.train if tags[guid] != "emu")
    write_tags(labels, {guid: tag for guid, tag in tags.items() if guid != gone})
    code, out, err = cli("finetune", "--from", run.best_pt, "--epochs", "1", "--runs", tmp_path / "runs")
    assert code == 0, err
    assert f"1 training rows of the split have no label or no features any more; {len(split.train) - 1} of" in err
    assert "on the validation rows" in out
    result = json.loads((tmp_path / "runs" / "latest" / "metrics.json").read_text())
    assert "test" not in result
    assert result["rows_gone"] == {"train": 1, "val": 0}
    code, _, err = cli("evaluate", "--from", tmp_path / "runs" / "latest")
    assert (code, "the split has no labelled test row: not scored" in err) == (0, True)


def test_rows_that_are_dropped_are_not_called_new(rare, tmp_path):
    path, labels = rare
    first = train_head(path, labels, QUICK, SplitOptions(rare="drop"), RunOptions(tmp_path / "runs"))
    split = SplitOptions(Path(first.run) / "splits", rare="drop")
    again = train_head(path, labels, QUICK, split, RunOptions(tmp_path / "runs"))
    assert (again.rows.new_rows, again.rows.rare_left_out) == (0, 13)
    assert again.scores["train"].n == first.scores["train"].n


def test_notes_of_evaluate_say_what_those_of_training_say(rare, tmp_path, cli):
    path, labels = rare
    tags = read_labels(labels)
    held_back = [guid for guid, tag in tags.items() if tag == "cat"][:3]
    early = write_tags(tmp_path / "early.csv", {guid: tag for guid, tag in tags.items() if guid not in held_back})
    recipe = LEARNS.changed(offsets=True)
    best_pt = train_head(path, early, recipe, options=RunOptions(tmp_path / "runs")).best_pt
    code, _, err = cli("evaluate", "--from", best_pt, "--on", "val", "--device", "cpu")
    assert code == 0
    assert "the offsets were fitted on the validation rows" in err
    code, _, err = cli("evaluate", "--from", best_pt, "--on", "new", "--labels", labels, "--device", "cpu")
    assert code == 0
    assert "fewer than 5 new rows of 'cat'" in err
    assert "offsets" not in err
