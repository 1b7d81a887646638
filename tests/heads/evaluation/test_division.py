"""Which rows a run uses: copies, split folders of last week, rare classes; and what commands say about them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite, synthetic_block, write_cache
from mmcli.cache import DataError, FeatureCache, MmcliError, read_labels
from mmcli.heads import Recipe, evaluate, load_checkpoint, predict, train_full, train_head
from mmcli.heads.evaluation.division import SplitOptions, divide
from mmcli.heads.experiments import Protocol, Setup, candidates_of, compare, grid_of, single_split, sweep
from mmcli.heads.experiments.setup import with_split_of_latest
from sklearn.metrics import f1_score
from sklearn.model_selection import train_test_split
from small_experiments import out_of_fold

QUICK = Recipe(epochs=3, hidden=(8,), lr=5e-3)


def write_tags(path, tags):
    path.write_text("guid,tag\n" + "".join(f"{guid},{tag}\n" for guid, tag in tags.items()))
    return path


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


LEARNS = Recipe(epochs=30, hidden=(32,), lr=1e-2)


def test_copies_are_kept_together_by_default_and_noise_is_not_learned(noise, tmp_path, cli):
    run = train_head(*noise, LEARNS, runs=tmp_path / "runs")
    assert (run["duplicates_together"], run["duplicates_separated"]) == (504, 0)
    assert run["test"]["macro_f1"] < 0.75
    plain = train_head(*noise, LEARNS, runs=tmp_path / "runs", group_duplicates=False)
    assert plain["duplicates_separated"] > 80
    assert plain["test"]["macro_f1"] > 0.9  # what copies across parts do to a score
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
    splits = Path(run["run"]) / "splits"
    code, _, err = cli(*arguments, "--split-dir", splits, "--group-duplicates")
    assert (code, "give one of them" in err) == (2, True)
    code, _, err = cli(*arguments, "--new", "none")
    assert (code, "--new is about rows that --split-dir does not name" in err) == (2, True)


def test_without_copies_the_default_split_is_that_of_scikit_learn(learnable, tmp_path):
    run = train_head(*learnable, QUICK, runs=tmp_path / "runs")
    labels = read_labels(learnable[1])
    guids, tags = list(labels), list(labels.values())
    train, rest, _, rest_tags = train_test_split(guids, tags, train_size=0.8, random_state=42, stratify=tags)
    val, test = train_test_split(rest, test_size=0.5, random_state=42, stratify=rest_tags)
    split = load_checkpoint(run["best_pt"]).split
    assert (split.train, split.val, split.test) == (train, val, test)
    assert run["duplicates_together"] == 0


def test_train_head_compare_and_sweep_make_one_split(noise, tmp_path):
    run = train_head(*noise, QUICK, runs=tmp_path / "runs")
    split = load_checkpoint(run["best_pt"]).split
    setup = Setup(*noise, out=tmp_path / "experiments", jobs=1)
    for result in (
        compare(setup, candidates_of(["concat"], QUICK), Protocol(2, 1, without_test=True)),
        sweep(setup, QUICK, grid_of(["lr=1e-3"]), protocol=Protocol(2, 1)),
    ):
        assert {row["guid"] for row in out_of_fold(result)} == {*split.train, *split.val}
    assert single_split(setup, candidates_of(["concat"], QUICK))["rows"] == {
        name: len(guids) for name, guids in split.named().items()
    }


def test_new_rows_that_are_copies_of_training_rows_are_left_out(noise, tmp_path, cli):
    path, labels = noise
    tags = read_labels(labels)
    first = {guid: tag for guid, tag in tags.items() if int(guid) < 400 or int(guid) >= 480}
    early = {guid: tag for guid, tag in first.items() if int(guid) % 8}
    run = train_head(path, write_tags(tmp_path / "early.csv", early), LEARNS, runs=tmp_path / "runs")
    found = evaluate(run["best_pt"], labels_path=labels, on="new")
    split = load_checkpoint(run["best_pt"]).split
    learned = {int(guid) // 8 for guid in (*split.train, *split.val)}
    new = [guid for guid in tags if guid not in early]
    kept = [guid for guid in new if int(guid) // 8 not in learned]
    assert found["new"]["n"] == len(kept) >= 80
    assert found["duplicates_left_out"] == len(new) - len(kept) > 0
    assert found["new"]["macro_f1"] < 0.75
    code, _, err = cli("evaluate", "--from", run["best_pt"], "--on", "new", "--labels", labels)
    assert (code, f"{len(new) - len(kept)} new pairs are copies" in err) == (0, True)
    only_copies = write_tags(tmp_path / "copies.csv", early | {guid: tags[guid] for guid in new if guid not in kept})
    with pytest.raises(DataError, match="new rows are copies of rows that the head learned from"):
        evaluate(run["best_pt"], labels_path=only_copies, on="new")


def test_evaluate_says_that_copies_are_in_another_part(noise, tmp_path):
    run = train_head(*noise, QUICK, runs=tmp_path / "runs", group_duplicates=False)
    assert evaluate(run["best_pt"])["duplicates_separated"] == run["duplicates_separated"]
    assert evaluate(run["best_pt"], on="train")["duplicates_separated"] == 0


@pytest.fixture
def week(learnable, tmp_path):
    """A run on 350 pairs, and a week later: 3 test rows and 1 training row deleted, 2 relabelled, 50 new."""
    path, labels = learnable
    tags = read_labels(labels)
    early = dict(list(tags.items())[:350])
    run = train_head(path, write_tags(tmp_path / "early.csv", early), QUICK, runs=tmp_path / "runs")
    split = load_checkpoint(run["best_pt"]).split
    gone = [*split.test[:3], split.train[0]]
    other = {"negative": "neutral", "neutral": "positive", "positive": "negative"}
    changed = {guid: other[tags[guid]] for guid in (split.test[3], split.train[1])}
    labels = write_tags(tmp_path / "late.csv", {g: changed.get(g, tag) for g, tag in tags.items() if g not in gone})
    return path, labels, run, split, gone


@pytest.mark.parametrize("new", ["train", "none"])
def test_a_split_is_carried_forward_to_data_that_has_changed(week, tmp_path, new, cli):
    path, labels, run, split, gone = week
    splits = Path(run["run"]) / "splits"
    later = train_head(path, labels, QUICK, splits, runs=tmp_path / "later", new=new)
    now = load_checkpoint(later["best_pt"]).split
    fresh = [str(guid) for guid in range(350, 400)]
    assert now.train == [guid for guid in split.train if guid not in gone] + (fresh if new == "train" else [])
    assert (now.val, now.test) == (split.val, split.test[3:])
    assert (later["new_rows"], later["new_rows_go_to"]) == (50, new)
    assert later["rows_gone"] == {"train": 1, "val": 0, "test": 3}
    assert later["labels_changed"] == {"train": 1, "val": 0, "test": 1}
    assert json.loads((Path(later["run"]) / "config.json").read_text())["split"]["new_rows"] == 50
    today = read_labels(labels)
    with (Path(later["run"]) / "splits" / "test_split.csv").open(newline="") as file:
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
    found = evaluate(run["best_pt"], labels_path=labels)
    assert (found["test"]["n"], found["rows_gone"]) == (32, {"val": 0, "test": 3})
    assert found["labels_changed"] == {"val": 0, "test": 1}
    tags, checkpoint = read_labels(labels), load_checkpoint(run["best_pt"])
    with FeatureCache.open(path) as cache:
        logits = [checkpoint.head(batch) for batch in batches_of(cache, split.test[3:])]
    said = [checkpoint.classes[int(row.argmax())] for each in logits for row in each]
    expected = f1_score([tags[guid] for guid in split.test[3:]], said, average="macro")
    assert found["test"]["macro_f1"] == pytest.approx(expected)
    code, _, err = cli("evaluate", "--from", run["best_pt"], "--labels", labels, "--on", "test")
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
    run = train_head(path, labels, QUICK, splits, runs=tmp_path / "runs", seeds=2, jobs=1)
    assert "test" not in run
    assert set(run["over_seeds"]) == {"val"}
    written = Path(run["run"]) / "splits" / "test_split.csv"
    assert {name.name for name in Path(run["run"]).glob("*.png")} == {"curves.png", "confusion.png"}
    if kind == "unlabelled":
        assert run["test_rows_unlabelled"] == 40
        assert predict(run["best_pt"], ids=written, cache_path=path).guids == guids[360:]
    result = evaluate(run["best_pt"])
    assert (set(result) & {"val", "test"}, result["parts_without_rows"]) == ({"val"}, ["test"])
    with pytest.raises(DataError, match="no test row to be scored on: its split has no labelled test part"):
        evaluate(run["best_pt"], on="test")
    code, out, err = cli("evaluate", "--from", run["best_pt"])
    assert (code, "the split has no labelled test row: not scored" in err, "val" in out) == (0, True, True)
    setup = Setup(path, labels, split_dir=splits, out=tmp_path / "experiments", jobs=1)
    assert sweep(setup, QUICK, grid_of(["lr=1e-3"]), protocol=Protocol(2, 1))["rows"] == 360
    with pytest.raises(MmcliError, match="has no labelled test row: take --without-test"):
        single_split(setup, candidates_of(["concat"], QUICK))
    assert train_full(run["best_pt"], runs=tmp_path / "runs", jobs=1)["train"]["n"] == 360
    if kind == "unlabelled":  # labels that arrive later are of rows that the run has not seen
        write_tags(labels, tags)
        assert evaluate(run["best_pt"], on="new")["new"]["n"] == 40


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
    run = train_head(path, labels, LEARNS, runs=tmp_path / "runs")
    split, tags = load_checkpoint(run["best_pt"]).split, read_labels(labels)
    assert run["classes"] == ["cat", "dog", "emu", "fox", "gnu"]
    assert run["rare_classes"] == {"emu": 3, "fox": 4, "gnu": 6}
    assert (run["rare_classes_need"], run["rare_train_only"]) == (10, ["emu", "fox", "gnu"])
    assert {tags[guid] for guid in (*split.val, *split.test)} == {"cat", "dog"}
    assert run["train"]["n"] + run["val"]["n"] + run["test"]["n"] == 283
    said = [run["classes"][row] for row in predicted_of(path, run, split.test)]
    expected = f1_score([tags[g] for g in split.test], said, average="macro", labels=["cat", "dog"])
    assert run["test"]["macro_f1"] == pytest.approx(expected)
    assert run["test"]["per_class"]["emu"]["f1"] is None
    assert run["train"]["per_class"]["emu"]["f1"] > 0.5
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
        return predict_logits(load_checkpoint(run["best_pt"]).head, cache.features(guids)).argmax(axis=1)


def test_compare_scores_the_rows_that_a_fold_can_hold(rare, tmp_path):
    path, labels = rare
    setup = Setup(path, labels, out=tmp_path / "experiments", jobs=1)
    result = compare(setup, candidates_of(["concat", "linear"], LEARNS), Protocol(5, 2))
    tags = read_labels(labels)
    assert (result["classes_not_scored"], result["train_only_rows"]) == (["emu", "fox"], 7)
    assert result["focus_class"] == "gnu"
    rows = [row for row in out_of_fold(result) if row["candidate"] == "concat"]
    assert {row["guid"] for row in rows} == {guid for guid, tag in tags.items() if tag not in ("emu", "fox")}
    entry = next(each for each in result["candidates"] if each["name"] == "concat")
    scores = []
    for repeat in ("0", "1"):
        of_repeat = [row for row in rows if row["repeat"] == repeat]
        said = [max(result["classes"], key=lambda name, row=row: float(row[name])) for row in of_repeat]
        kept = {"average": "macro", "labels": ["cat", "dog", "gnu"]}
        scores.append(f1_score([row["tag"] for row in of_repeat], said, **kept))
    assert entry["macro_f1"] == pytest.approx(np.mean(scores))
    assert entry["per_class"]["emu"]["f1"] is None
    low, high = entry["macro_f1_ci"]
    assert low <= entry["macro_f1"] <= high
    with pytest.raises(MmcliError, match="class 'emu' has no row that is scored: choose among cat, dog, gnu"):
        compare(setup, candidates_of(["concat"], QUICK), Protocol(5, 1), focus_class="emu")


@pytest.mark.parametrize("how", ["merge", "drop"])
def test_rare_classes_are_merged_or_dropped(rare, tmp_path, how):
    path, labels = rare
    run = train_head(path, labels, LEARNS, runs=tmp_path / "runs", rare=how)
    merged = how == "merge"
    assert run["classes"] == (["cat", "dog", "other"] if merged else ["cat", "dog"])
    assert run["rare_left_out"] == (0 if merged else 13)
    assert run["rare_merged"] == (["emu", "fox", "gnu"] if merged else [])
    assert sum(run[part]["n"] for part in ("train", "val", "test")) == (283 if merged else 270)
    again = evaluate(run["best_pt"], on=("train", "val", "test"))
    assert all(again[part] == run[part] for part in ("train", "val", "test"))
    why = "no new row to be scored on" if merged else "none of the 13 new rows has a label that the head knows"
    with pytest.raises(DataError, match=why):
        evaluate(run["best_pt"], on="new")
    assert train_full(run["best_pt"], runs=tmp_path / "runs")["train"]["n"] == (283 if merged else 270)
    setup = Setup(path, labels, out=tmp_path / "experiments", jobs=1, rare=how)
    result = compare(setup, candidates_of(["concat"], QUICK), Protocol(5, 1))
    assert result["classes"] == (["cat", "dog", "gnu", "other"] if merged else ["cat", "dog", "gnu"])


def test_merges_that_cannot_be(rare, tmp_path):
    path, labels = rare
    tags = read_labels(labels)
    write_tags(labels, {guid: "other" if tag == "emu" else tag for guid, tag in tags.items()})
    with pytest.raises(DataError, match="into a class 'other', and the labels file already has that class"):
        train_head(path, labels, QUICK, runs=tmp_path / "runs", rare="merge")
    write_tags(labels, {guid: tag for guid, tag in tags.items() if tag not in ("emu", "fox")})
    with pytest.raises(DataError, match="needs two rare classes, and only 'gnu' is rare: use --rare train-only"):
        train_head(path, labels, QUICK, runs=tmp_path / "runs", rare="merge")
    with pytest.raises(MmcliError, match="rare cannot be 'hide': choose one of train-only, merge, drop"):
        train_head(path, labels, QUICK, runs=tmp_path / "runs", rare="hide")


def test_own_parts_with_a_class_that_only_trains_or_only_tests(rare, tmp_path):
    path, labels = rare
    run = train_head(path, labels, QUICK, runs=tmp_path / "runs")
    splits, tags = Path(run["run"]) / "splits", read_labels(labels)
    again = train_head(path, labels, QUICK, splits, runs=tmp_path / "runs")
    assert again["rare_train_only"] == ["emu", "fox", "gnu"]
    assert again["classes"] == run["classes"]
    train = read_labels(splits / "train_split.csv")
    moved = {guid: tag for guid, tag in train.items() if tag == "emu"}
    one = dict([next(iter(moved.items()))])
    parts = {name: read_labels(splits / f"{name}_split.csv") for name in ("train", "val")}
    write_tags(splits / "train_split.csv", {guid: tag for guid, tag in train.items() if guid not in one})
    write_tags(splits / "val_split.csv", parts["val"] | one)
    held_out = train_head(path, labels, QUICK, splits, runs=tmp_path / "runs")
    assert held_out["rare_train_only"] == ["fox", "gnu"]
    assert held_out["val"]["per_class"]["emu"]["support"] == 1
    for name, tags_of_part in parts.items():
        write_tags(splits / f"{name}_split.csv", tags_of_part)
    write_tags(splits / "train_split.csv", {guid: tag for guid, tag in train.items() if guid not in moved})
    write_tags(splits / "test_split.csv", read_labels(splits / "test_split.csv") | moved)
    with pytest.raises(DataError, match=r"class 'emu' has 3 row\(s\) in the test part .* or .* --rare drop"):
        train_head(path, labels, QUICK, splits, runs=tmp_path / "runs")
    dropped = train_head(path, labels, QUICK, splits, runs=tmp_path / "runs", rare="drop")
    assert dropped["classes"] == ["cat", "dog"]
    assert dropped["rare_left_out"] == sum(tag in ("emu", "fox", "gnu") for tag in tags.values())


def test_a_class_that_is_all_copies_of_another_trains_only():
    labels = {str(guid): "ab"[guid % 2] for guid in range(60)} | {str(guid): "c" for guid in range(60, 64)}
    groups = {guid: int(guid) if int(guid) < 60 else int(guid) - 60 for guid in labels}
    division = divide(labels, groups, SplitOptions())
    assert division.counts["rare_classes"] == {"c": 4}
    assert {"60", "61", "62", "63", "0", "1", "2", "3"} <= set(division.split.train)


def test_one_group_of_copies_only_names_the_way_out(learnable, tmp_path):
    path, labels = learnable
    rewrite(path, lambda columns: columns["row/image_sha256"].__setitem__(slice(None), 7))
    with pytest.raises(DataError, match="count each copy as a row with --no-group-duplicates"):
        train_head(path, labels, QUICK, runs=tmp_path / "runs")
    assert train_head(path, labels, QUICK, runs=tmp_path / "runs", group_duplicates=False)["test"]["n"] == 40


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
        assert {row["guid"] for row in out_of_fold(result)} == {*split.train, *split.val}
        assert "the test rows that are left out are those of artifacts/runs/" in err
    code, out, err = cli("sweep", "--grid", "dropout=0.2", *arguments, "--jobs", "1", "--split-seed", "7", "--json")
    assert {row["guid"] for row in out_of_fold(json.loads(out))} != {*split.train, *split.val}
    assert "a split drawn with --split-seed 7" in err
    code, _, err = cli("compare", "--fusions", "concat", "--folds", "2", *arguments, "--jobs", "1")
    assert "add --without-test" in err


def test_the_split_of_a_run_of_other_labels_is_not_taken(learnable, tmp_path):
    path, labels = learnable
    setup = Setup(path, labels)
    assert with_split_of_latest(setup, tmp_path / "runs") == setup
    run = train_head(path, labels, QUICK, runs=tmp_path / "runs")
    taken = with_split_of_latest(setup, tmp_path / "runs")
    assert Path(taken.split_dir) == Path(run["run"]) / "splits"
    other = tmp_path / "other.csv"
    other.write_text(labels.read_text())
    assert with_split_of_latest(Setup(path, other), tmp_path / "runs").split_dir is None


def test_finetune_of_a_head_without_test_rows_with_rare_classes_and_pairs_that_are_gone(
    sixty, raw_sixty, tmp_path, cli
):
    tags = {guid: "emu" if guid in ("0", "1", "2") else tag for guid, tag in read_labels(raw_sixty[1]).items()}
    labels = write_tags(tmp_path / "labels.csv", tags)
    drawn = train_head(sixty, labels, QUICK, runs=tmp_path / "runs")
    assert drawn["rare_train_only"] == ["emu"]
    splits = Path(drawn["run"]) / "splits"
    (splits / "test_split.csv").unlink()
    run = train_head(sixty, labels, QUICK, splits, runs=tmp_path / "runs", new="none")
    split = load_checkpoint(run["best_pt"]).split
    gone = next(guid for guid in split.train if tags[guid] != "emu")
    write_tags(labels, {guid: tag for guid, tag in tags.items() if guid != gone})
    code, out, err = cli("finetune", "--from", run["best_pt"], "--epochs", "1", "--runs", tmp_path / "runs")
    assert code == 0, err
    assert f"1 training rows of the split have no label or no features any more; {len(split.train) - 1} of" in err
    assert "on the validation rows" in out
    result = json.loads((tmp_path / "runs" / "latest" / "metrics.json").read_text())
    assert "test" not in result
    assert result["rows_gone"] == {"train": 1, "val": 0}
    code, _, err = cli("evaluate", "--from", tmp_path / "runs" / "latest")
    assert (code, "the split has no labelled test row: not scored" in err) == (0, True)


def test_new_rows_that_are_copies_of_held_out_rows_do_not_train(learnable, tmp_path):
    path, labels = learnable

    def same_picture(columns):
        columns["row/image_sha256"] = np.random.default_rng(1).integers(0, 256, (400, 32), dtype=np.uint8)
        columns["row/image_sha256"][399] = columns["row/image_sha256"][0]

    rewrite(path, same_picture)
    run = train_head(path, labels, QUICK, runs=tmp_path / "runs")
    splits = Path(run["run"]) / "splits"
    parts = {name: read_labels(splits / f"{name}_split.csv") for name in ("train", "val", "test")}
    tags = read_labels(labels)
    for name, part in parts.items():
        write_tags(splits / f"{name}_split.csv", {guid: tag for guid, tag in part.items() if guid not in ("0", "399")})
    test = {guid: tag for guid, tag in parts["test"].items() if guid not in ("0", "399")} | {"0": tags["0"]}
    write_tags(splits / "test_split.csv", test)
    again = train_head(path, labels, QUICK, splits, runs=tmp_path / "runs")
    assert (again["new_rows"], again["new_copies"]) == (1, 1)
    assert again["train"]["n"] + again["val"]["n"] + again["test"]["n"] == 399
    assert again["duplicates_separated"] == 0
