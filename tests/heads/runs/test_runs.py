"""Run folders and checkpoints: what train-head leaves, and what evaluate and predict make of it."""

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import header, synthetic_block, write_cache
from mmcli.cache import CheckpointError, DataError, FeatureCache, MmcliError, read_labels
from mmcli.heads import (
    Recipe,
    RunOptions,
    evaluate,
    load_checkpoint,
    predict,
    predict_logits,
    train_full,
    train_head,
    write_split,
)
from mmcli.heads.evaluation.splits import SplitOptions
from mmcli.heads.runs import fit_store
from PIL import Image
from sklearn.metrics import f1_score

QUICK = Recipe(epochs=12, hidden=(16,), lr=5e-3)


@pytest.fixture
def run(learnable, tmp_path):
    path, labels = learnable
    return train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs"))


def test_a_run_folder_holds_everything(run, tmp_path):
    folder = tmp_path / "runs" / "latest"
    assert folder.resolve() == (tmp_path / "runs" / run.run).resolve()
    assert folder.resolve().name.endswith("-concat")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "best.pt", "config.json", "metrics.json", "history.csv", "curves.png", "confusion.png",
        "splits/train_split.csv", "splits/val_split.csv", "splits/test_split.csv",
    }  # fmt: skip
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(run.to_dict()))
    assert json.loads((folder / "config.json").read_text())["recipe"] == QUICK.to_dict()
    history = list(csv.DictReader((folder / "history.csv").open()))
    assert len(history) == run.epochs
    for name in ("curves.png", "confusion.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20  # something is drawn
    assert [path.name for path in (tmp_path / "runs").glob(".*")] == [".fits"]
    assert not list((tmp_path / "runs" / ".fits").iterdir())


def test_the_scores_are_those_of_the_written_best_pt(run, learnable):
    path, labels = learnable
    checkpoint, tags = load_checkpoint(run.best_pt), read_labels(labels)
    with FeatureCache.open(path) as cache:
        for part, guids in checkpoint.split.named().items():
            predicted = predict_logits(checkpoint.head, cache.features(guids)).argmax(axis=1)
            names = [checkpoint.classes[index] for index in predicted]
            expected = f1_score([tags[guid] for guid in guids], names, average="macro")
            assert run.scores[part].macro_f1 == pytest.approx(expected)
    assert run.scores["test"].macro_f1 > 0.6


def test_evaluate_repeats_the_scores(run, tmp_path, cli):
    again = evaluate(run.best_pt)
    assert json.loads(cli("evaluate", "--from", run.best_pt, "--json")[1]) == json.loads(json.dumps(again.to_dict()))
    assert (again.scores["val"], again.scores["test"]) == (run.scores["val"], run.scores["test"])
    extra = tmp_path / "extra.csv"
    held_out = {*load_checkpoint(run.best_pt).split.val, *load_checkpoint(run.best_pt).split.test}
    other = next(str(guid) for guid in range(400) if str(guid) not in held_out)
    extra.write_text(f"guid,tag\n{other},neutral\n")
    with pytest.raises(DataError, match="none of the 40 val rows has a label and features here, the first is"):
        evaluate(run.best_pt, labels_path=extra)
    with pytest.raises(DataError, match="no new row to be scored"):
        evaluate(run.best_pt, on=["new"])


def test_new_labels_are_scored_on_rows_that_the_run_has_not_seen(learnable, tmp_path):
    path, labels = learnable
    lines = labels.read_text().splitlines(keepends=True)
    some = tmp_path / "some.csv"
    some.write_text("".join(lines[:301]))
    run = train_head(path, some, QUICK, options=RunOptions(tmp_path / "runs"))
    assert evaluate(run.best_pt, on=["new"], labels_path=labels).scores["new"].n == 100
    labels.write_text("".join(lines).replace("399,", "399,other"))
    found = evaluate(run.best_pt, on=["new"], labels_path=labels)
    assert (found.scores["new"].n, found.rows.labels_unknown) == (99, {"new": 1})
    labels.write_text("".join([*lines[:301], *(line.replace(",", ",other") for line in lines[301:])]))
    with pytest.raises(DataError, match=r"none of the 100 new rows has a label that the head knows: '\d+' is 'other"):
        evaluate(run.best_pt, on=["new"], labels_path=labels)


def test_a_split_is_reused(run, learnable, tmp_path):
    path, labels = learnable
    again = train_head(
        path,
        labels,
        Recipe(epochs=1),
        split=SplitOptions(f"{run.run}/splits"),
        options=RunOptions(tmp_path / "runs"),
    )
    first, second = (load_checkpoint(each.best_pt).split for each in (run, again))
    assert first == second


def test_the_same_seed_writes_the_same_best_pt(run, learnable, tmp_path):
    path, labels = learnable
    again = train_head(path, labels, QUICK, options=RunOptions(tmp_path / "more"))
    with open(run.best_pt, "rb") as first, open(again.best_pt, "rb") as second:
        assert first.read() == second.read()


def test_full_trains_on_all_rows_with_the_recipe_and_epochs_of_a_run(run, learnable, tmp_path):
    path, labels = learnable
    full = train_full(run.best_pt, path, labels, options=RunOptions(tmp_path / "runs"))
    checkpoint = load_checkpoint(full.best_pt)
    assert full.epochs == run.best_epoch
    assert full.scores["train"].n == 400
    assert full.scores.keys() == {"train"}
    assert checkpoint.split.train == [str(guid) for guid in range(400)]
    first, second = (Path(each.run, "history.csv").read_text().splitlines()[1:] for each in (run, full))
    assert [row.split(",")[2] for row in second] == [row.split(",")[2] for row in first[: run.best_epoch]]
    with pytest.raises(DataError, match="it learned from all rows"):
        evaluate(full.best_pt)
    with pytest.raises(CheckpointError, match="itself trained on all rows"):
        train_full(full.best_pt, path, labels, options=RunOptions(tmp_path / "runs"))


def test_labels_of_pairs_that_are_not_there(learnable, tmp_path):
    path, labels = learnable
    labels.write_text(labels.read_text() + "9999,neutral\n")
    assert (
        train_head(path, labels, Recipe(epochs=1), options=RunOptions(tmp_path / "runs")).rows.labels_without_features
        == 1
    )
    labels.write_text("guid,tag\n9998,neutral\n9999,positive\n")
    with pytest.raises(DataError, match="none of the 2 labels"):
        train_head(path, labels, options=RunOptions(tmp_path / "runs"))
    with pytest.raises(DataError, match="give --labels FILE"):
        train_head(path, None, options=RunOptions(tmp_path / "runs"))


def test_a_failed_run_leaves_no_folder(learnable, tmp_path, monkeypatch):
    path, labels = learnable
    monkeypatch.setattr("mmcli.report.figures.confusion", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_head(path, labels, Recipe(epochs=1), options=RunOptions(tmp_path / "runs"))
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".fits"]  # the fit itself is kept


def test_predictions_of_listed_rows_come_from_the_cache(run, learnable, tmp_path):
    ids = tmp_path / "ids.csv"
    ids.write_text("guid,tag\n7,null\n3,null\n250,null\n")
    found = predict(run.best_pt, ids=ids)
    assert found.guids == ["7", "3", "250"]
    assert np.allclose(found.probs.sum(axis=1), 1, atol=1e-6)
    found.write(tmp_path / "submission.txt")
    lines = (tmp_path / "submission.txt").read_text().splitlines()
    assert lines[0] == "guid,tag"
    assert [line.split(",")[0] for line in lines[1:]] == ["7", "3", "250"]
    with_probs = found.to_csv(with_probs=True).splitlines()
    assert with_probs[0] == "guid,tag,negative,neutral,positive"
    checkpoint = load_checkpoint(run.best_pt)
    with FeatureCache.open(learnable[0]) as cache:
        logits = torch.from_numpy(predict_logits(checkpoint.head, cache.features(found.guids)))
    expected = torch.softmax(logits, dim=1).numpy()
    assert np.allclose(found.probs, expected, atol=1e-5)
    assert found.labels == [checkpoint.classes[index] for index in expected.argmax(axis=1)]


class Exploit:
    def __reduce__(self):
        return print, ("code of a stranger was run",)


def test_checkpoints_of_strangers(run, tmp_path, capsys):
    path = tmp_path / "x.pt"
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_checkpoint(path)
    torch.save({"format": "mmcli head 2", "header": Exploit()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Exploit()))
    with pytest.raises(CheckpointError, match=r"not a best.pt of mmcli"):
        load_checkpoint(path)
    assert "stranger" not in capsys.readouterr().out
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match=r"not a best.pt of mmcli"):
        load_checkpoint(path)
    for size in (0, 20, 3000):
        with open(run.best_pt, "rb") as file:
            path.write_bytes(file.read()[:size])
        with pytest.raises(CheckpointError, match="cut off"):
            load_checkpoint(path)
    torch.save({"format": "mmcli head 1", "header": "{}", "tensors": {}}, path)
    with pytest.raises(CheckpointError, match="written by an older mmcli: train the head again"):
        load_checkpoint(path)
    content = torch.load(run.best_pt, weights_only=True)
    content["tensors"].popitem()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="content does not fit"):
        load_checkpoint(path)


def test_a_head_refuses_features_of_another_backbone(run, learnable, tmp_path):
    other = write_cache(tmp_path / "other.h5", synthetic_block(["0", "1"], 16), header(dtype="bfloat16"))
    ids = tmp_path / "ids.csv"
    ids.write_text("guid\n0\n")
    with pytest.raises(CheckpointError, match=r"dtype.*: bfloat16, not float32"):
        evaluate(run.best_pt, other)
    with pytest.raises(CheckpointError, match=r"dtype.*: bfloat16, not float32"):
        predict(run.best_pt, ids=ids, cache_path=other)
    with pytest.raises(CheckpointError, match=r"dtype.*: bfloat16, not float32"):
        train_full(run.best_pt, other, learnable[1], options=RunOptions(tmp_path / "runs"))


def test_the_test_rows_decide_nothing(run, learnable, tmp_path):
    """Other labels and other features of the test rows leave every weight and the best epoch as they were."""
    path, labels = learnable
    split = load_checkpoint(run.best_pt).split
    tags = read_labels(labels)
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        guids = cache.guids
    block = synthetic_block(guids, image.shape[1])
    block.columns |= {"image": image.copy(), "text": text.copy()}
    rotated = dict(zip(split.test, split.test[1:] + split.test[:1], strict=True))
    for guid, other in rotated.items():
        block.columns["image"][guids.index(guid)] = -image[guids.index(other)]
    changed = write_cache(tmp_path / "changed.h5", block)
    lines = [f"{guid},{tags[rotated.get(guid, guid)]}" for guid in tags]
    (tmp_path / "changed.csv").write_text("guid,tag\n" + "\n".join(lines) + "\n")
    folder = tmp_path / "same-split"
    write_split(folder, split, {guid: tags[rotated.get(guid, guid)] for guid in tags})
    again = train_head(
        changed, tmp_path / "changed.csv", QUICK, split=SplitOptions(folder), options=RunOptions(tmp_path / "runs")
    )
    first, second = (load_checkpoint(each.best_pt).head.state_dict() for each in (run, again))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert again.best_epoch == run.best_epoch
    assert again.scores["test"] != run.scores["test"]


def test_full_uses_the_cache_and_labels_of_its_run(run, learnable, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train_full(run.run, options=RunOptions(tmp_path / "runs")).scores["train"].n == 400


def test_runs_of_one_second_do_not_take_each_others_name(learnable, tmp_path):
    path, labels = learnable
    quick = Recipe(epochs=1, hidden=(4,))
    made = {train_head(path, labels, quick, options=RunOptions(tmp_path / "runs")).run for _ in range(4)}
    assert len(made) == 4
    assert all(Path(folder, "best.pt").is_file() for folder in made)


def test_class_names_that_look_like_markup(learnable, tmp_path, capsys):
    from mmcli.report.tables import score_tables
    from mmcli.report.terminal import print_parts

    path, labels = learnable
    odd = {"negative": "$10k_$20k", "neutral": "[/neg]", "positive": ":smile: 好"}
    text = labels.read_text()
    for plain, name in odd.items():
        text = text.replace(plain, name)
    labels.write_text(text)
    made = train_head(path, labels, Recipe(epochs=1), options=RunOptions(tmp_path / "runs"))
    print_parts(*score_tables({"test": made.scores["test"]}, made.classes))
    out = capsys.readouterr().out
    assert all(name in out for name in odd.values())


def test_a_disk_that_fills_up_while_a_run_is_written(learnable, tmp_path):
    """The kernel refuses files above 20 kB, as a full disk would: one clear error, and no half run."""
    path, labels = learnable
    code = (
        "import resource, sys\n"
        "from mmcli.cache import DiskFullError\n"
        "from mmcli.heads import Recipe, RunOptions, train_head\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try: train_head(sys.argv[1], sys.argv[2], Recipe(epochs=1), options=RunOptions(sys.argv[3]))\n"
        "except DiskFullError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(path), str(labels), str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "not enough disk space to write" in done.stdout
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".fits"]  # the fit itself is kept


def test_a_recipe_with_a_stage_2_is_not_half_done(learnable, tmp_path):
    with pytest.raises(MmcliError, match="train_head trains stage 1 only"):
        train_head(*learnable, Recipe().with_finetune(), options=RunOptions(tmp_path / "runs"))


def test_killed_between_two_heads_the_same_command_trains_the_other_alone(learnable, tmp_path, monkeypatch):
    """The first head comes from the disk, and the ensemble is the one that was never interrupted."""
    whole = train_head(*learnable, QUICK, options=RunOptions(tmp_path / "whole", seeds=2, jobs=1))
    original, seeds = fit_store.fit, []

    def spy(recipe, *rest):
        seeds.append(recipe.seed)
        if len(seeds) == 2:
            raise KeyboardInterrupt
        return original(recipe, *rest)

    monkeypatch.setattr(fit_store, "fit", spy)
    with pytest.raises(KeyboardInterrupt):
        train_head(*learnable, QUICK, options=RunOptions(tmp_path / "runs", seeds=2, jobs=1))
    again = train_head(*learnable, QUICK, options=RunOptions(tmp_path / "runs", seeds=2, jobs=1))
    assert seeds == [42, 43, 43]
    one, other = (load_checkpoint(each.best_pt).head.state_dict() for each in (whole, again))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert not list((tmp_path / "runs" / ".fits").iterdir())


def test_several_seeds_make_one_ensemble(learnable, tmp_path):
    path, labels = learnable
    run = train_head(path, labels, QUICK.changed(offsets=True), options=RunOptions(tmp_path / "runs", seeds=3, jobs=1))
    checkpoint = load_checkpoint(run.best_pt)
    assert checkpoint.seeds == [42, 43, 44]
    assert len(checkpoint.head.heads) == 3
    assert run.offsets == dict(zip(checkpoint.classes, checkpoint.head.offsets.tolist(), strict=True))
    of_each = [each.scores["test"]["macro_f1"] for each in run.seeds]
    assert run.over_seeds["test"]["macro_f1"].mean == pytest.approx(np.mean(of_each))
    assert run.over_seeds["test"]["macro_f1"].sd == pytest.approx(np.std(of_each, ddof=1))
    for seed, scores in zip((42, 43), of_each, strict=False):
        alone = train_head(path, labels, QUICK.changed(offsets=True, seed=seed), options=RunOptions(tmp_path / "runs"))
        assert alone.scores["test"].macro_f1 == pytest.approx(scores)
    history = (Path(run.run) / "history.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in history[1:]} == {"42", "43", "44"}
    full = load_checkpoint(train_full(run.best_pt, options=RunOptions(tmp_path / "runs", jobs=1)).best_pt)
    assert full.seeds == [42, 43, 44]
    assert np.array_equal(full.head.offsets, checkpoint.head.offsets)
    assert full.best_epochs == [each.best_epoch for each in run.seeds]


def test_a_run_has_at_least_one_seed(tmp_path):
    with pytest.raises(MmcliError, match="seeds must be 1 or more, found 0"):
        RunOptions(tmp_path / "runs", seeds=0)
