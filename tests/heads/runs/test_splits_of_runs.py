"""Which rows a run uses: copies, and split folders of last week; and what commands say about them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite, synthetic_block, write_cache
from mmcli.cache import DataError, FeatureCache, MmcliError, read_labels
from mmcli.finetune import FinetuneOptions, finetune
from mmcli.heads import Recipe, RunOptions, evaluate, load_checkpoint, predict, train_full, train_head
from mmcli.heads.evaluation.splits import SplitOptions
from mmcli.heads.experiments import Protocol, Setup, candidates_of, compare, grid_of, single_split, sweep
from mmcli.heads.experiments.setup import with_split_of_latest
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from small_experiments import LEARNS, QUICK, out_of_fold, write_tags


@pytest.fixture
def noise(tmp_path):
    """Seventy-two pairs of pure noise with labels of pure noise, each with eight copies."""
    random = np.random.default_rng(0)
    block = synthetic_block([str(guid) for guid in range(576)], 16)
    for name, values in block.columns.items():
        if name != "row/text_sha256":
            block.columns[name] = np.repeat(values[:72], 8, axis=0)
    tags = np.repeat(random.choice(["a", "b", "c"], 72), 8)
    labels = write_tags(tmp_path / "labels.csv", {str(guid): tag for guid, tag in enumerate(tags)})
    return write_cache(tmp_path / "features.h5", block), labels


def test_copies_are_kept_together_by_default_and_noise_is_not_learned(noise, tmp_path, cli):
    run = train_head(*noise, LEARNS, options=RunOptions(tmp_path / "runs"))
    assert (run.rows.duplicates_together, run.rows.duplicates_separated) == (504, 0)
    assert run.scores["test"].macro_f1 < 0.75
    plain = train_head(
        *noise, LEARNS, split=SplitOptions(group_duplicates=False), options=RunOptions(tmp_path / "runs")
    )
    assert plain.rows.duplicates_separated > 80
    assert plain.scores["test"].macro_f1 > 0.9  # what copies across parts do to a score
    arguments = ("train-head", "--cache", noise[0], "--labels", noise[1], "--epochs", "1")
    for more, said in (
        ((), "504 copies (same image or same cleaned text) are kept in one part"),
        (("--no-group-duplicates",), "validation and test pairs have a copy"),
        (("--preset", "report"), "validation and test pairs have a copy"),
        (("--preset", "report", "--group-duplicates"), "504 copies (same image or same cleaned text) are kept in one"),
    ):
        code, _, err = cli(*arguments, *more)
        assert (code, said in err) == (0, True), (more, err)
    config = json.loads(Path("artifacts/runs/latest/config.json").read_text())
    assert (config["group_duplicates"], config["rare"]) == (True, "train-only")
    splits = Path(run.run) / "splits"
    code, _, err = cli(*arguments, "--split-dir", splits, "--group-duplicates")
    assert (code, "give one of them" in err) == (2, True)
    code, _, err = cli(*arguments, "--new", "none")
    assert (code, "--new is about rows that --split-dir does not name" in err) == (2, True)


def test_without_copies_the_default_split_is_that_of_scikit_learn(learnable, tmp_path):
    run = train_head(*learnable, QUICK, options=RunOptions(tmp_path / "runs"))
    labels = read_labels(learnable[1])
    guids, tags = list(labels), list(labels.values())
    train, rest, _, rest_tags = train_test_split(guids, tags, train_size=0.8, random_state=42, stratify=tags)
    val, test = train_test_split(rest, test_size=0.5, random_state=42, stratify=rest_tags)
    split = load_checkpoint(run.best_pt).split
    assert (split.train, split.val, split.test) == (train, val, test)
    assert run.rows.duplicates_together == 0


def test_train_head_compare_and_sweep_make_one_split(noise, tmp_path):
    run = train_head(*noise, QUICK, options=RunOptions(tmp_path / "runs"))
    split = load_checkpoint(run.best_pt).split
    setup = Setup(*noise, out=tmp_path / "experiments", jobs=1)
    for result in (
        compare(setup, candidates_of(["concat"], QUICK), Protocol(2, 1, without_test=True)),
        sweep(setup, QUICK, grid_of(["lr=1e-3"]), protocol=Protocol(2, 1)),
    ):
        assert {row["guid"] for row in out_of_fold(result.folder)} == {*split.train, *split.val}
    assert single_split(setup, candidates_of(["concat"], QUICK)).n_rows == {
        name: len(guids) for name, guids in split.named().items()
    }


def test_new_rows_that_are_copies_of_training_rows_are_left_out(noise, tmp_path, cli):
    path, labels = noise
    tags = read_labels(labels)
    first = {guid: tag for guid, tag in tags.items() if int(guid) < 400 or int(guid) >= 480}
    early = {guid: tag for guid, tag in first.items() if int(guid) % 8}
    run = train_head(path, write_tags(tmp_path / "early.csv", early), LEARNS, options=RunOptions(tmp_path / "runs"))
    found = evaluate(run.best_pt, labels_path=labels, on="new")
    split = load_checkpoint(run.best_pt).split
    learned = {int(guid) // 8 for guid in (*split.train, *split.val)}
    new = [guid for guid in tags if guid not in early]
    kept = [guid for guid in new if int(guid) // 8 not in learned]
    assert found.scores["new"].n == len(kept) >= 80
    assert found.rows.duplicates_left_out == len(new) - len(kept) > 0
    assert found.scores["new"].macro_f1 < 0.75
    code, _, err = cli("evaluate", "--from", run.best_pt, "--on", "new", "--labels", labels)
    assert (code, f"{len(new) - len(kept)} new pairs are copies" in err) == (0, True)
    only_copies = write_tags(tmp_path / "copies.csv", early | {guid: tags[guid] for guid in new if guid not in kept})
    with pytest.raises(DataError, match="new rows are copies of rows that the head learned from"):
        evaluate(run.best_pt, labels_path=only_copies, on="new")


def test_evaluate_says_that_copies_are_in_another_part(noise, tmp_path):
    run = train_head(*noise, QUICK, split=SplitOptions(group_duplicates=False), options=RunOptions(tmp_path / "runs"))
    assert evaluate(run.best_pt).rows.duplicates_separated == run.rows.duplicates_separated
    assert evaluate(run.best_pt, on="train").rows.duplicates_separated == 0


@pytest.fixture
def week(learnable, tmp_path):
    """A run on 350 pairs, and a week later: 3 test rows and 1 training row deleted, 2 relabelled, 50 new."""
    path, labels = learnable
    tags = read_labels(labels)
    early = dict(list(tags.items())[:350])
    run = train_head(path, write_tags(tmp_path / "early.csv", early), QUICK, options=RunOptions(tmp_path / "runs"))
    split = load_checkpoint(run.best_pt).split
    gone = [*split.test[:3], split.train[0]]
    other = {"negative": "neutral", "neutral": "positive", "positive": "negative"}
    changed = {guid: other[tags[guid]] for guid in (split.test[3], split.train[1])}
    labels = write_tags(tmp_path / "late.csv", {g: changed.get(g, tag) for g, tag in tags.items() if g not in gone})
    return path, labels, run, split, gone


@pytest.mark.parametrize("new", ["train", "none"])
def test_a_split_is_carried_forward_to_data_that_has_changed(week, tmp_path, new, cli):
    path, labels, run, split, gone = week
    splits = Path(run.run) / "splits"
    later = train_head(path, labels, QUICK, split=SplitOptions(splits, new=new), options=RunOptions(tmp_path / "later"))
    now = load_checkpoint(later.best_pt).split
    fresh = [str(guid) for guid in range(350, 400)]
    assert now.train == [guid for guid in split.train if guid not in gone] + (fresh if new == "train" else [])
    assert (now.val, now.test) == (split.val, split.test[3:])
    assert (later.rows.new_rows, later.rows.new_rows_go_to) == (50, new)
    assert later.rows.rows_gone == {"train": 1, "val": 0, "test": 3}
    assert later.rows.labels_changed == {"train": 1, "val": 0, "test": 1}
    assert json.loads((Path(later.run) / "config.json").read_text())["split"]["new_rows"] == 50
    today = read_labels(labels)
    with (Path(later.run) / "splits" / "test_split.csv").open(newline="") as file:
        assert [(row["guid"], row["tag"]) for row in csv.DictReader(file)] == [(g, today[g]) for g in now.test]
    code, _, err = cli(
        "train-head", "--cache", path, "--labels", labels, "--split-dir", splits, "--new", new, "--epochs", "1"
    )
    assert code == 0
    for said in (
        "50 labelled pairs are in no part of --split-dir: " + ("they train" if new == "train" else "left out"),
        "3 test rows of the split have no label or no features any more; 32 of 35 are used",
        "1 training rows have another label than in the split: today's label counts",
    ):
        assert said in err


def test_evaluate_scores_what_is_left_of_a_part_and_says_so(week, cli):
    path, labels, run, split, _ = week
    found = evaluate(run.best_pt, labels_path=labels)
    assert (found.scores["test"].n, found.rows.rows_gone) == (32, {"val": 0, "test": 3})
    assert found.rows.labels_changed == {"val": 0, "test": 1}
    tags, checkpoint = read_labels(labels), load_checkpoint(run.best_pt)
    with FeatureCache.open(path) as cache:
        logits = [checkpoint.head(batch) for batch in batches_of(cache, split.test[3:])]
    said = [checkpoint.classes[int(row.argmax())] for each in logits for row in each]
    expected = f1_score([tags[guid] for guid in split.test[3:]], said, average="macro")
    assert found.scores["test"].macro_f1 == pytest.approx(expected)
    code, _, err = cli("evaluate", "--from", run.best_pt, "--labels", labels, "--on", "test")
    assert code == 0
    assert "3 test rows of the split have no label or no features any more; 32 of 35 are used" in err


def batches_of(cache, guids):
    from mmcli.heads.model.inputs import batches

    return batches(cache.features(guids), False, "cpu")


@pytest.mark.parametrize("kind", ["absent", "unlabelled"])
def test_a_run_without_a_labelled_test_part(learnable, tmp_path, kind, cli):
    path, labels = learnable
    tags = read_labels(labels)
    guids = list(tags)
    known = {guid: tags[guid] for guid in guids[:360]}
    write_tags(labels, known)
    splits = tmp_path / "parts"
    splits.mkdir()
    write_tags(splits / "train_split.csv", {guid: tags[guid] for guid in guids[:300]})
    write_tags(splits / "val_split.csv", {guid: tags[guid] for guid in guids[300:360]})
    if kind == "unlabelled":
        write_tags(splits / "test_split.csv", dict.fromkeys(guids[360:], ""))
    run = train_head(
        path, labels, QUICK, split=SplitOptions(splits), options=RunOptions(tmp_path / "runs", seeds=2, jobs=1)
    )
    assert "test" not in run.scores
    assert set(run.over_seeds) == {"val"}
    written = Path(run.run) / "splits" / "test_split.csv"
    assert {name.name for name in Path(run.run).glob("*.png")} == {"curves.png", "confusion.png"}
    if kind == "unlabelled":
        assert run.rows.test_rows_unlabelled == 40
        assert predict(run.best_pt, ids=written, cache_path=path).guids == guids[360:]
    result = evaluate(run.best_pt)
    assert (set(result.scores), result.rows.parts_without_rows) == ({"val"}, ["test"])
    with pytest.raises(DataError, match="no test row to be scored on: its split has no labelled test part"):
        evaluate(run.best_pt, on="test")
    code, out, err = cli("evaluate", "--from", run.best_pt)
    assert (code, "the split has no labelled test row: not scored" in err, "val" in out) == (0, True, True)
    setup = Setup(path, labels, SplitOptions(splits), tmp_path / "experiments", jobs=1)
    assert sweep(setup, QUICK, grid_of(["lr=1e-3"]), protocol=Protocol(2, 1)).data.n_rows == 360
    with pytest.raises(MmcliError, match="has no labelled test row: take --without-test"):
        single_split(setup, candidates_of(["concat"], QUICK))
    assert train_full(run.best_pt, options=RunOptions(tmp_path / "runs", jobs=1)).scores["train"].n == 360
    if kind == "unlabelled":  # labels that arrive later are of rows that the run has not seen
        write_tags(labels, tags)
        assert evaluate(run.best_pt, on="new").scores["new"].n == 40


def test_one_group_of_copies_only_names_the_way_out(learnable, tmp_path):
    path, labels = learnable
    rewrite(path, lambda columns: columns["row/image_sha256"].__setitem__(slice(None), 7))
    with pytest.raises(DataError, match="count each copy as a row with --no-group-duplicates"):
        train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs"))
    assert (
        train_head(
            path, labels, QUICK, split=SplitOptions(group_duplicates=False), options=RunOptions(tmp_path / "runs")
        )
        .scores["test"]
        .n
        == 40
    )


def test_a_sweep_leaves_out_the_test_rows_of_the_latest_run(noise, tmp_path, cli):
    path, labels = noise
    arguments = ("--cache", path, "--labels", labels, "--epochs", "1")
    assert cli("train-head", *arguments, "--no-group-duplicates", "--split-seed", "7")[0] == 0
    split = load_checkpoint("artifacts/runs/latest").split
    assert cli("train-head", "--full")[0] == 0  # a run on all rows stands for the run that it repeats
    for command in (
        ("sweep", "--grid", "dropout=0.2", "--folds", "2"),
        ("compare", "--fusions", "concat", "--without-test", "--folds", "2", "--repeats", "1"),
    ):
        code, out, err = cli(*command, *arguments, "--jobs", "1", "--json")
        assert code == 0, err
        result = json.loads(out)
        assert {row["guid"] for row in out_of_fold(result["folder"])} == {*split.train, *split.val}
        assert "the test rows that are left out are those of artifacts/runs/" in err
    code, out, err = cli("sweep", "--grid", "dropout=0.2", *arguments, "--jobs", "1", "--split-seed", "7", "--json")
    assert {row["guid"] for row in out_of_fold(json.loads(out)["folder"])} != {*split.train, *split.val}
    assert "a split drawn with --split-seed 7" in err
    code, _, err = cli("compare", "--fusions", "concat", "--folds", "2", *arguments, "--jobs", "1")
    assert "add --without-test" in err


def test_the_split_of_a_run_of_other_labels_is_not_taken(learnable, tmp_path):
    path, labels = learnable
    setup = Setup(path, labels)
    assert with_split_of_latest(setup, tmp_path / "runs") == setup
    run = train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs"))
    taken = with_split_of_latest(setup, tmp_path / "runs")
    assert Path(taken.split.split_dir) == Path(run.run) / "splits"
    other = tmp_path / "other.csv"
    other.write_text(labels.read_text())
    assert with_split_of_latest(Setup(path, other), tmp_path / "runs").split.split_dir is None


def test_a_stage_2_stands_for_its_stage_1(sixty, tmp_path):
    """Classes that stage 1 dropped stay dropped in experiments that take the split of the latest run, a stage 2."""
    with FeatureCache.open(sixty) as cache:
        rows = read_labels(cache.header.dataset["labels"])
    labels = write_tags(tmp_path / "labels.csv", {**rows, "0": "odd", "1": "odd"})
    options = RunOptions(tmp_path / "runs")
    split = SplitOptions(group_duplicates=False, rare="drop")
    first = train_head(sixty, labels, Recipe(epochs=1, hidden=(4,)), split, options)
    finetune(first.best_pt, {"epochs": 1}, options=FinetuneOptions(tmp_path / "runs"))
    taken = with_split_of_latest(Setup(sixty, labels), tmp_path / "runs")
    assert (taken.split.rare, taken.split.split_dir) == ("drop", Path(first.run) / "splits")


def test_new_rows_that_are_copies_of_held_out_rows_do_not_train(learnable, tmp_path):
    path, labels = learnable

    def same_picture(columns):
        columns["row/image_sha256"] = np.random.default_rng(1).integers(0, 256, (400, 32), dtype=np.uint8)
        columns["row/image_sha256"][399] = columns["row/image_sha256"][0]

    rewrite(path, same_picture)
    run = train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs"))
    splits = Path(run.run) / "splits"
    parts = {name: read_labels(splits / f"{name}_split.csv") for name in ("train", "val", "test")}
    tags = read_labels(labels)
    for name, part in parts.items():
        write_tags(splits / f"{name}_split.csv", {guid: tag for guid, tag in part.items() if guid not in ("0", "399")})
    test = {guid: tag for guid, tag in parts["test"].items() if guid not in ("0", "399")} | {"0": tags["0"]}
    write_tags(splits / "test_split.csv", test)
    again = train_head(path, labels, QUICK, split=SplitOptions(splits), options=RunOptions(tmp_path / "runs"))
    assert (again.rows.new_rows, again.rows.new_copies) == (1, 1)
    assert again.scores["train"].n + again.scores["val"].n + again.scores["test"].n == 399
    assert again.rows.duplicates_separated == 0


def test_the_splits_of_a_run_on_all_rows_are_not_enough(learnable, tmp_path):
    path, labels = learnable
    options = RunOptions(tmp_path / "runs", jobs=1)
    full = train_full(train_head(path, labels, QUICK, options=options).best_pt, options=options)
    with pytest.raises(DataError, match=r"val_split.csv names no pair.*give the splits of the run that it repeats"):
        train_head(path, labels, QUICK, SplitOptions(Path(full.run) / "splits"), options)


def test_labels_of_other_pairs_are_named_where_too_few_are_left(learnable, tmp_path):
    path, _ = learnable
    labels = write_tags(tmp_path / "other.csv", {"1": "a", "2": "b"} | {f"other-{guid}": "a" for guid in range(50)})
    with pytest.raises(DataError, match=r"; 50 more labels belong to pairs that .* does not hold"):
        train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs"))
