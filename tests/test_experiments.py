"""compare, ablate, sweep and the single split: from a cache to result folders."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import synthetic_block, write_cache
from mmcli.cache import DataError, FeatureCache, MmcliError, read_labels
from mmcli.heads import Recipe, load_checkpoint, train_head
from mmcli.heads.experiments import (
    Protocol,
    Setup,
    candidates_of,
    compare,
    grid_of,
    modalities_of,
    single_split,
    sweep,
)
from mmcli.heads.experiments import fits as fits_module
from mmcli.heads.experiments.sweep import settings_to_try
from mmcli.heads.fusions import FUSIONS
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, recall_score

QUICK = Recipe(epochs=3, hidden=(8,), lr=5e-3)
POOLED = [name for name, fusion in FUSIONS.items() if not fusion.needs_tokens]
SMALL = Protocol(folds=3, repeats=2)


@pytest.fixture
def setup(learnable, tmp_path):
    path, labels = learnable
    return Setup(path, labels, out=tmp_path / "experiments", jobs=1)


@pytest.fixture
def fitted(monkeypatch):
    """Count the fits that are really made."""
    names = []
    original = fits_module._fit_one

    def spy(name, *rest):
        names.append(name)
        return original(name, *rest)

    monkeypatch.setattr(fits_module, "_fit_one", spy)
    return names


def out_of_fold(result):
    with (Path(result["folder"]) / "out_of_fold.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_scores_are_those_of_scikit_learn_on_the_written_probabilities(setup):
    result = compare(setup, candidates_of(["concat", "late", "linear"], QUICK), SMALL)
    rows = out_of_fold(result)
    assert len(rows) == 3 * 2 * 400
    tags = read_labels(setup.labels)
    for entry in result["candidates"]:
        scores = []
        for repeat in ("0", "1"):
            of_repeat = [row for row in rows if (row["candidate"], row["repeat"]) == (entry["name"], repeat)]
            assert [row["guid"] for row in of_repeat] == list(tags)
            true = [row["tag"] for row in of_repeat]
            assert true == list(tags.values())
            said = [max(result["classes"], key=lambda name, row=row: float(row[name])) for row in of_repeat]
            scores.append(
                (
                    f1_score(true, said, average="macro"),
                    accuracy_score(true, said),
                    *f1_score(true, said, average=None),
                    *recall_score(true, said, average=None),
                )
            )
            folds = [
                f1_score(*zip(*[(t, s) for t, s, row in zip(true, said, of_repeat, strict=True) if row["fold"] == fold],
                              strict=True), average="macro")
                for fold in ("0", "1", "2")
            ]  # fmt: skip
            assert entry["fold_macro_f1"][3 * int(repeat) : 3 * int(repeat) + 3] == pytest.approx(folds)
        macro, accuracy, *by_class = np.mean(scores, axis=0)
        assert entry["macro_f1"] == pytest.approx(macro)
        assert entry["accuracy"] == pytest.approx(accuracy)
        found = [entry["per_class"][name][what] for what in ("f1", "recall") for name in result["classes"]]
        assert found == pytest.approx(by_class)
        assert entry["macro_f1_ci"][0] < entry["macro_f1"] < entry["macro_f1_ci"][1]
        if entry["difference"]:
            best = result["candidates"][0]
            assert entry["difference"]["macro_f1"] == pytest.approx(entry["macro_f1"] - best["macro_f1"])


def test_a_result_folder_holds_everything(setup):
    result = compare(setup, candidates_of(["concat", "film"], QUICK), SMALL)
    folder = Path(result["folder"])
    assert folder.name.endswith("-compare")
    assert (setup.out / "latest").resolve() == folder.resolve()
    assert {path.name for path in folder.iterdir()} == {
        "results.json", "results.csv", "results.png", "out_of_fold.csv",
    }  # fmt: skip
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(result))
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["candidate"] for row in rows] == [entry["name"] for entry in result["candidates"]]
    assert float(rows[1]["difference"]) == pytest.approx(result["candidates"][1]["difference"]["macro_f1"], abs=1e-6)
    assert (rows[0]["difference"], rows[0]["against"], rows[1]["against"]) == ("", "", rows[0]["candidate"])
    with Image.open(folder / "results.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_both_modalities_are_better_than_either_where_both_are_needed(setup):
    recipe = Recipe(epochs=15, hidden=(16,), lr=5e-3)
    result = compare(setup, modalities_of(recipe), SMALL, against="both", what="ablate")
    assert result["candidates"][0]["name"] == "both"
    for entry in result["candidates"][1:]:
        assert entry["difference"]["high"] < 0
        assert entry["difference"]["p_bootstrap_holm"] < 0.05
    assert result["focus_class"] == min(
        result["classes"], key=lambda name: result["counts"][result["classes"].index(name)]
    )


def test_finished_fits_are_kept_and_shared(setup, fitted):
    first = compare(setup, candidates_of(["concat", "film"], QUICK), SMALL)
    assert len(fitted) == 12
    again = compare(setup, candidates_of(["concat", "film", "late"], QUICK), SMALL)
    assert fitted[12:] == ["late"] * 6
    old, new = ({each["name"]: each["macro_f1"] for each in result["candidates"]} for result in (first, again))
    assert {name: new[name] for name in old} == old
    compare(setup, modalities_of(QUICK), SMALL, what="ablate")
    assert fitted[18:] == ["text"] * 6 + ["image"] * 6  # `both` is concat


@pytest.mark.parametrize("change", ["recipe", "labels", "features", "folds", "seed"])
def test_a_kept_fit_is_used_only_where_nothing_that_it_depends_on_has_changed(setup, fitted, change, learnable):
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    recipe, protocol = QUICK, SMALL
    if change == "recipe":
        recipe = QUICK.changed(dropout=0.1)
    elif change == "labels":
        lines = setup.labels.read_text().splitlines()
        swapped = [lines[0], lines[1].split(",")[0] + "," + lines[2].split(",")[1], *lines[2:]]
        assert swapped != lines
        setup.labels.write_text("\n".join(swapped) + "\n")
    elif change == "features":
        with FeatureCache.open(learnable[0]) as cache:
            image, text = cache.embeddings()
            block = synthetic_block(cache.guids, image.shape[1])
        image[0, 0] += 0.01
        block.columns |= {"image": image, "text": text}
        write_cache(learnable[0], block)
    elif change == "folds":
        protocol = Protocol(folds=4, repeats=1)
    else:
        recipe = QUICK.changed(seed=7)
    before = len(fitted)
    compare(setup, candidates_of(["concat"], recipe), protocol)
    assert len(fitted) - before == protocol.folds * protocol.repeats


def test_a_damaged_kept_fit_is_made_again(setup, fitted):
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    kept = sorted((setup.out / "fits").glob("*.npz"))
    assert len(kept) == 6
    kept[0].write_bytes(b"broken")
    kept[1].write_bytes(kept[1].read_bytes()[:100])
    compare(setup, candidates_of(["concat"], QUICK), SMALL)
    assert len(fitted) == 8


def test_the_result_does_not_depend_on_the_number_of_processes(setup, tmp_path):
    results = []
    for jobs in (1, 2):
        there = Setup(setup.cache, setup.labels, out=tmp_path / f"jobs{jobs}", jobs=jobs)
        results.append(compare(there, candidates_of(["concat", "late"], QUICK), SMALL))
    first, second = ([(each["name"], each["macro_f1"]) for each in result["candidates"]] for result in results)
    assert first == second
    assert out_of_fold(results[0]) == out_of_fold(results[1])


def test_killed_in_the_middle_an_experiment_goes_on_where_it_was(setup, fitted):
    code = (
        "import sys\n"
        "from mmcli.heads import Recipe\n"
        "from mmcli.heads.experiments import *\n"
        "show = lambda done, n: print(done, flush=True)\n"
        "setup = Setup(sys.argv[1], sys.argv[2], out=sys.argv[3], jobs=1, on_fit=show)\n"
        "recipe = Recipe(epochs=3, hidden=(8,), lr=5e-3)\n"
        "compare(setup, candidates_of(['concat', 'film'], recipe), Protocol(3, 2))\n"
    )
    command = [sys.executable, "-c", code, str(setup.cache), str(setup.labels), str(setup.out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.strip() == "5":
                os.kill(process.pid, signal.SIGKILL)
    kept = len(list((setup.out / "fits").glob("*.npz")))
    assert 5 <= kept < 12
    compare(setup, candidates_of(["concat", "film"], QUICK), SMALL)
    assert len(fitted) == 12 - kept


def test_the_seed_differs_from_fold_to_fold_and_is_the_same_for_all_candidates(setup, monkeypatch):
    seeds = {}
    original = fits_module.fit

    def spy(recipe, *rest, **more):
        seeds.setdefault(recipe.fusion, []).append(recipe.seed)
        return original(recipe, *rest, **more)

    monkeypatch.setattr(fits_module, "fit", spy)
    compare(setup, candidates_of(["concat", "gated"], QUICK), SMALL)
    assert sorted(seeds["concat"]) == sorted(seeds["gated"]) == list(range(42, 48))


def test_a_sweep_never_sees_the_test_rows(setup, learnable, tmp_path, fitted):
    """Other labels and features of the test rows change nothing, not even which kept fits are used."""
    path, labels = learnable
    split = load_checkpoint(train_head(path, labels, QUICK, runs=tmp_path / "runs")["best_pt"]).split
    grid = grid_of(["lr=1e-3,1e-2", "dropout=0.2"])
    first = sweep(setup, QUICK, grid, protocol=Protocol(3, 1))
    assert len(fitted) == 9
    assert {row["guid"] for row in out_of_fold(first)} == {*split.train, *split.val}
    assert first["candidates"][0]["name"] in ("as it is", "dropout=0.2 lr=0.001", "dropout=0.2 lr=0.01")
    test = set(split.test)
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        guids = cache.guids
    block = synthetic_block(guids, image.shape[1])
    image[[guid in test for guid in guids]] = 9.0
    block.columns |= {"image": image, "text": text}
    write_cache(path, block)
    again = sweep(setup, QUICK, grid, protocol=Protocol(3, 1))
    assert len(fitted) == 9
    assert again["candidates"] == first["candidates"]
    assert again["best"] == first["best"]


def test_without_test_the_test_rows_are_left_out_of_compare(setup, learnable, tmp_path):
    run = train_head(*learnable, QUICK, runs=tmp_path / "runs", split_seed=5)
    split = load_checkpoint(run["best_pt"]).split
    there = Setup(setup.cache, setup.labels, split_seed=5, out=setup.out, jobs=1)
    result = compare(there, candidates_of(["concat"], QUICK), Protocol(3, 1, without_test=True))
    assert {row["guid"] for row in out_of_fold(result)} == {*split.train, *split.val}


def test_the_single_split_is_that_of_train_head(setup, learnable, tmp_path):
    run = train_head(*learnable, QUICK, runs=tmp_path / "runs")
    result = single_split(setup, candidates_of(["concat", "film"], QUICK))
    entry = result["candidates"][0]
    assert result["rows"] == {"train": 320, "val": 40, "test": 40}
    for part in ("val", "test"):
        assert entry[part]["macro_f1"] == pytest.approx(run[part]["macro_f1"])
    assert entry["gap"] == pytest.approx(run["val"]["macro_f1"] - run["test"]["macro_f1"])
    assert entry["parameters"] == run["parameters"]


@pytest.mark.parametrize("name", POOLED)
def test_every_pooled_fusion_and_the_linear_heads_can_be_compared(setup, name):
    names = [name, f"{name}:linear"] if name in ("concat", "product", "late") else [name]
    result = compare(setup, candidates_of(names, QUICK), Protocol(2, 1))
    assert all(entry["macro_f1"] > 0.3 for entry in result["candidates"])


def test_decision_offsets_are_fitted_on_the_rows_to_stop_by(setup, monkeypatch):
    sizes = []
    original = fits_module.fit_offsets

    def spy(logits, classes):
        sizes.append(len(classes))
        return original(logits, classes)

    monkeypatch.setattr(fits_module, "fit_offsets", spy)
    compare(setup, candidates_of(["concat"], QUICK.changed(offsets=True)), Protocol(2, 1))
    assert sizes == [pytest.approx(20, abs=2)] * 2


def test_settings_of_a_sweep():
    grid = grid_of(["lr=1e-4,3e-4", "hidden=64,256x64", "offsets=true,false", "class-weights=none,sqrt"])
    assert grid == {
        "lr": [1e-4, 3e-4],
        "hidden": [(64,), (256, 64)],
        "offsets": [True, False],
        "class_weights": ["none", "sqrt"],
    }
    assert len(settings_to_try(grid, None, 0)) == 16
    assert len(settings_to_try(grid, 5, 0)) == 5
    drawn = settings_to_try(grid_of(["lr=1e-5:1e-2", "batch_size=16:18", "dropout=0.1:0.6"]), 40, 0)
    assert len(drawn) == 40
    rates = np.log10([each["lr"] for each in drawn])
    assert -5 <= rates.min() < -4
    assert -3 < rates.max() <= -2
    assert {each["batch_size"] for each in drawn} == {16, 17, 18}
    assert all(isinstance(value, int | float) for each in drawn for value in each.values())


@pytest.mark.parametrize(
    ("settings", "trials", "words"),
    [
        (["rate=1,2"], None, "no setting of a head is called 'rate': choose among fusion, modality"),
        (["lr"], None, "'lr' names no value: write lr=a,b,c"),
        (["lr=fast"], None, "lr cannot be 'fast': it is a number"),
        (["batch_size=1.5"], None, "batch_size cannot be '1.5': it is a whole number"),
        (["hidden=a"], None, "widths such as 256x64"),
        (["offsets=maybe"], None, "true or false"),
        (["lr=1e-4", "lr=1e-3"], None, "lr is given twice"),
        (["lr=1e-4:1e-2"], None, "lr is a range: say with --trials"),
        (["lr=1e-2:1e-4"], 3, "is not a range"),
        (["lr=0:1"], 3, "is not a range"),
        (["loss=ce:focal"], 3, "loss is not a number, so it has no range"),
        (["lr=1e-3"], 0, "trials must be 1 or more"),
        (["loss=hinge"], None, "unknown loss 'hinge'"),
    ],
)
def test_sweeps_that_cannot_be(setup, settings, trials, words):
    with pytest.raises(MmcliError, match=words):
        sweep(setup, QUICK, grid_of(settings), trials, Protocol(2, 1))


@pytest.mark.parametrize(
    ("names", "protocol", "words"),
    [
        (["concat", "magic"], SMALL, "unknown fusion 'magic'"),
        (["concat", "concat"], SMALL, "a name is given twice"),
        ([], SMALL, "name at least one"),
        (["cross_attn"], SMALL, r"holds no token states: run `mmcli featurize .* --tokens`"),
        (
            ["gated:linear"],
            Protocol(2, 1),
            "the linear head cannot learn the weights of gated",
        ),
        (["concat:forest"], SMALL, "unknown head 'forest'"),
        (["concat"], Protocol(1, 1), "at least 2 folds"),
        (["concat"], Protocol(3, 0), "1 repeat"),
        (["concat"], Protocol(200, 1), "fewer than the 200 folds"),
    ],
)
def test_comparisons_that_cannot_be(setup, names, protocol, words):
    with pytest.raises(MmcliError, match=words):
        compare(setup, candidates_of(names, QUICK), protocol)


def test_features_that_are_not_finite_are_named(setup, learnable):
    path, _ = learnable
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        block = synthetic_block(cache.guids, image.shape[1])
    text[17, 3] = np.nan
    block.columns |= {"image": image, "text": text}
    write_cache(path, block)
    with pytest.raises(MmcliError, match=r"1 rows of .* have text embeddings that are not finite, the first is '17'"):
        compare(setup, candidates_of(["concat"], QUICK), SMALL)
    with pytest.raises(MmcliError, match="not finite"):
        train_head(path, setup.labels, QUICK, runs=setup.out)


def test_one_class_only(setup):
    lines = setup.labels.read_text().splitlines()
    setup.labels.write_text("\n".join([lines[0], *(line.split(",")[0] + ",same" for line in lines[1:])]))
    with pytest.raises(DataError, match="all 400 labelled pairs are 'same': two classes are needed"):
        compare(setup, candidates_of(["concat"], QUICK), SMALL)


def test_on_the_command_line(cli, learnable, tmp_path):
    path, labels = learnable
    shared = ("--cache", path, "--labels", labels, "--epochs", "2", "--hidden", "8", "--jobs", "1")
    folds = ("--folds", "2", "--repeats", "1")
    code, out, err = cli("compare", "--fusions", "concat,linear", *folds, *shared)
    assert code == 0, err
    assert "differences from" in out
    assert "out_of_fold.csv" in out
    other = next(name for name in ("concat", "linear") if f"differences from {name}" not in out)
    assert f": {other}." in out.splitlines()[-2]  # the verdict names it
    code, out, _ = cli("compare", *folds, *shared, "--json")
    assert {entry["name"] for entry in json.loads(out)["candidates"]} == {*POOLED, "linear"}
    assert json.loads(out)["recipes"]["concat"]["hidden"] == [8]
    code, out, _ = cli("ablate", "--focus-class", "positive", *folds, *shared)
    assert (code, "rows of class positive" in out) == (0, True)
    code, out, _ = cli("ablate", "--single-split", *shared)
    assert (code, "one split: 320 train, 40 val, 40 test rows" in out) == (0, True)
    code, out, _ = cli("compare", "--single-split", "--fusions", "concat", "--preset", "report", *shared, "--json")
    assert json.loads(out)["candidates"][0]["name"] == "concat"
    code, out, err = cli("sweep", "--grid", "lr=1e-3,1e-2", "--folds", "2", *shared)
    assert (code, "lr=0.001" in out, "--lr" in err or "as they are" in err) == (0, True, True)
    for arguments, words in (
        (("compare", "--folds", "0"), "at least 2 folds"),
        (("ablate", "--repeats", "0"), "1 repeat"),
        (("ablate", "--focus-class", "angry"), "no class is called 'angry': choose among negative, neutral, positive"),
        (("sweep", "--grid", "colour=red"), "no setting of a head is called 'colour'"),
        (("train-head", "--seeds", "0"), "seeds must be 1 or more"),
        (("train-head", "--fusion", "cross_attn"), "--tokens"),
        (("train-head", "--views"), "--views 4"),
        (("train-head", "--hidden", "256y64"), "widths such as 256x64"),
        (("compare", "--jobs", "0"), "jobs must be 1 or more"),
    ):
        more = list(shared[:4])
        if arguments[0] != "train-head" and "--jobs" not in arguments:
            more += ["--jobs", "1"]
        code, out, err = cli(*arguments, *more)
        assert (code, out) == (1, ""), (arguments, err)
        assert words in err.splitlines()[-1], (arguments, err)
    for arguments in (
        ("compare", "--single-split", "--folds", "3"),
        ("compare", "--max-memory", "much"),
        ("train-head", "--full", "--preset", "report"),
        ("train-head", "--full", "--seeds", "3"),
        ("train-head", "--head", "linear", "--lr", "1e-3"),
        ("ablate", "--focal-gamma", "1", *shared[:4]),
        ("sweep",),
    ):
        assert cli(*arguments)[0] == 2


def test_several_seeds_make_one_ensemble(learnable, tmp_path):
    path, labels = learnable
    run = train_head(path, labels, QUICK.changed(offsets=True), runs=tmp_path / "runs", seeds=3, jobs=1)
    checkpoint = load_checkpoint(run["best_pt"])
    assert checkpoint.seeds == [42, 43, 44]
    assert len(checkpoint.head.heads) == 3
    assert run["offsets"] == dict(zip(checkpoint.classes, checkpoint.head.offsets.tolist(), strict=True))
    of_each = [each["test"]["macro_f1"] for each in run["seeds"]]
    assert run["over_seeds"]["test"]["macro_f1"]["mean"] == pytest.approx(np.mean(of_each))
    assert run["over_seeds"]["test"]["macro_f1"]["sd"] == pytest.approx(np.std(of_each, ddof=1))
    for seed, scores in zip((42, 43), of_each, strict=False):
        alone = train_head(path, labels, QUICK.changed(offsets=True, seed=seed), runs=tmp_path / "runs")
        assert alone["test"]["macro_f1"] == pytest.approx(scores)
    history = (Path(run["run"]) / "history.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in history[1:]} == {"42", "43", "44"}
    from mmcli.heads import train_full

    full = load_checkpoint(train_full(run["best_pt"], runs=tmp_path / "runs", jobs=1)["best_pt"])
    assert full.seeds == [42, 43, 44]
    assert np.array_equal(full.head.offsets, checkpoint.head.offsets)
    assert full.best_epochs == [each["best_epoch"] for each in run["seeds"]]


def test_a_linear_head_is_the_logistic_regression_of_scikit_learn(learnable, tmp_path):
    from mmcli.heads import predict_logits
    from mmcli.heads.losses import class_weights
    from sklearn.linear_model import LogisticRegression

    path, labels = learnable
    run = train_head(path, labels, Recipe(head="linear"), runs=tmp_path / "runs")
    checkpoint, tags = load_checkpoint(run["best_pt"]), read_labels(labels)
    with open(Path(run["run"]) / "history.csv", newline="") as file:
        chosen = float(next(csv.DictReader(file))["C"])

    def inputs(cache, guids):
        halves = []
        for rows in cache.embeddings(guids):
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            halves.append(unit)
        return np.hstack(halves).astype(np.float64)

    with FeatureCache.open(path) as cache:
        train, test = (inputs(cache, guids) for guids in (checkpoint.split.train, checkpoint.split.test))
        mean, deviation = train.mean(axis=0), train.std(axis=0)
        classes = np.array([checkpoint.classes.index(tags[guid]) for guid in checkpoint.split.train])
        weights = dict(enumerate(class_weights(np.bincount(classes), "sqrt").tolist()))
        model = LogisticRegression(C=chosen, class_weight=weights, max_iter=1000, tol=1e-8)
        theirs = model.fit((train - mean) / deviation, classes).predict_proba((test - mean) / deviation)
        logits = predict_logits(checkpoint.head, cache.features(checkpoint.split.test)).astype(np.float64)
    ours = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(ours, theirs, atol=0.02)  # ours stops at a tolerance of 1e-4
    assert run["test"]["macro_f1"] > 0.6


def test_a_linear_head_of_two_classes(learnable, tmp_path):
    path, labels = learnable
    labels.write_text(labels.read_text().replace("neutral", "negative"))
    run = train_head(path, labels, Recipe(head="linear"), runs=tmp_path / "runs")
    assert run["classes"] == ["negative", "positive"]
    assert run["test"]["macro_f1"] > 0.8


def test_a_plain_split_says_how_many_copies_it_separates(learnable, tmp_path, cli):
    path, labels = learnable
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        block = synthetic_block(cache.guids, image.shape[1])
    block.columns |= {"image": image, "text": text}
    block.columns["row/image_sha256"][:120] = np.repeat(block.columns["row/image_sha256"][:40], 3, axis=0)
    write_cache(path, block)
    plain = train_head(path, labels, QUICK, runs=tmp_path / "runs")
    assert plain["duplicates_separated"] > 5
    grouped = train_head(path, labels, QUICK, runs=tmp_path / "runs", group_duplicates=True)
    assert grouped["duplicates_separated"] == 0
    assert sum(grouped[part]["n"] for part in ("train", "val", "test")) == 400
    code, _, err = cli("train-head", "--cache", path, "--labels", labels, "--epochs", "1")
    assert (code, f"{plain['duplicates_separated']} validation and test pairs have a copy" in err) == (0, True)
    with pytest.raises(MmcliError, match="give one of them"):
        train_head(path, labels, QUICK, Path(plain["run"]) / "splits", runs=tmp_path / "runs", group_duplicates=True)


def test_a_process_that_is_killed_is_one_clear_error():
    from mmcli.heads.parallel import each_of

    with pytest.raises(
        MmcliError, match="killed, most likely for lack of memory: run the same command again with --jobs 1"
    ):
        list(each_of(os._exit, [(9,), (9,)], jobs=2))


def test_an_interrupted_experiment_says_so_and_exits_with_130(cli, learnable, monkeypatch):
    path, labels = learnable
    original, made = fits_module._fit_one, []

    def interrupt_at_third(*task):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(original(*task))
        return made[-1]

    monkeypatch.setattr(fits_module, "_fit_one", interrupt_at_third)
    shared = ("--cache", path, "--labels", labels, "--epochs", "2", "--hidden", "8", "--jobs", "1")
    code, out, err = cli("compare", "--fusions", "concat", "--folds", "2", *shared)
    assert (code, out) == (130, "")
    assert "run the same command again to go on" in err
    monkeypatch.setattr(fits_module, "_fit_one", original)
    code, _, err = cli("compare", "--fusions", "concat", "--folds", "2", *shared)
    assert (code, "fit: 2/4 fits" in err) == (0, True)


def test_interrupted_train_head_does_not_say_that_anything_was_kept(cli, learnable, monkeypatch):
    from mmcli.heads import run

    def interrupt(*task):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "_fit_one", interrupt)
    code, out, err = cli("train-head", "--cache", learnable[0], "--labels", learnable[1])
    assert (code, out, err.strip()) == (130, "", "interrupted: nothing was written")


def test_what_compare_takes_by_default_fits_the_rest_of_the_recipe(cli, learnable, tmp_path):
    path, labels = learnable
    shared = ("--cache", path, "--labels", labels, "--folds", "2", "--repeats", "1", "--jobs", "1", "--json")
    code, out, err = cli("compare", "--head", "linear", *shared)
    assert code == 0, err
    assert {entry["name"] for entry in json.loads(out)["candidates"]} == {"concat", "product", "late"}
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        block = synthetic_block(cache.guids, image.shape[1])
    block.columns |= {"image": image, "text": text, "image_views": np.repeat(image[:, None], 2, axis=1)}
    write_cache(path, block)
    code, out, err = cli("compare", "--views", "--epochs", "1", "--hidden", "4", *shared)
    assert code == 0, err
    assert {entry["name"] for entry in json.loads(out)["candidates"]} == set(POOLED)


def test_differences_from_the_best_allow_for_every_pair(setup):
    names = ["concat", "film", "late", "product"]
    best = compare(setup, candidates_of(names, QUICK), SMALL)
    assert best["differences_tested"] == 6
    fixed = compare(setup, candidates_of(names, QUICK), SMALL, against=best["against"])
    assert fixed["differences_tested"] == 3
    for one, other in zip(best["candidates"], fixed["candidates"], strict=True):
        if one["difference"]:
            assert one["difference"]["p_bootstrap"] == other["difference"]["p_bootstrap"]
            assert one["difference"]["p_bootstrap_holm"] >= other["difference"]["p_bootstrap_holm"]


def test_a_sweep_leaves_out_the_test_rows_of_a_grouped_split(setup, learnable, tmp_path):
    run = train_head(*learnable, QUICK, runs=tmp_path / "runs", group_duplicates=True)
    split = load_checkpoint(run["best_pt"]).split
    there = Setup(setup.cache, setup.labels, group_duplicates=True, out=setup.out, jobs=1)
    result = sweep(there, QUICK, grid_of(["lr=1e-3"]), protocol=Protocol(2, 1))
    assert {row["guid"] for row in out_of_fold(result)} == {*split.train, *split.val}


def test_settings_without_effect_are_refused_and_equal_ones_tried_once(setup):
    with pytest.raises(MmcliError, match=r"lr_attn has no effect on this head \(concat, mlp\)"):
        sweep(setup, QUICK, grid_of(["lr_attn=1e-3,1e-2"]), protocol=Protocol(2, 1))
    result = sweep(setup, QUICK, grid_of(["loss=ce,focal", "focal_gamma=1,2"]), protocol=Protocol(2, 1))
    assert sorted(entry["name"] for entry in result["candidates"]) == [
        "as it is", "focal_gamma=1 loss=focal", "focal_gamma=2 loss=focal",
    ]  # fmt: skip


def test_a_single_split_of_some_classes_only_and_its_notes(setup, learnable, tmp_path, cli):
    run = train_head(*learnable, QUICK, runs=tmp_path / "runs")
    seen = load_checkpoint(run["best_pt"]).split
    path, labels = learnable
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        block = synthetic_block([*cache.guids, "400"], image.shape[1])
    block.columns |= {"image": np.vstack([image, image[:1]]), "text": np.vstack([text, text[:1]])}
    block.columns["row/image_sha256"][seen_rows(seen.train[:5])] = block.columns["row/image_sha256"][
        seen_rows(seen.test[:5])
    ]
    write_cache(path, block)
    labels.write_text(labels.read_text() + "400,furious\n")
    there = Setup(path, labels, split_dir=Path(run["run"]) / "splits", out=setup.out, jobs=1)
    result = single_split(there, candidates_of(["concat"], QUICK.changed(offsets=True)))
    assert result["classes"] == ["negative", "neutral", "positive"]
    assert (result["duplicates_separated"], result["offsets"]) == (5, True)
    arguments = ("--cache", path, "--labels", labels, "--split-dir", Path(run["run"]) / "splits", "--epochs", "1")
    code, _, err = cli("compare", "--single-split", "--fusions", "concat", "--offsets", "--jobs", "1", *arguments)
    assert code == 0, err
    assert "5 validation and test pairs have a copy" in err
    assert "the offsets were fitted on the validation rows" in err


def seen_rows(guids):
    return [int(guid) for guid in guids]


def test_the_largest_seeds_there_are(setup):
    recipe = QUICK.changed(seed=2**32 - 1)
    assert compare(setup, candidates_of(["concat"], recipe), Protocol(2, 2, seed=2**32 - 1))["repeats"] == 2


def test_cached_rows_that_are_not_finite_are_not_predicted(learnable, tmp_path):
    from mmcli.heads import predict

    path, labels = learnable
    run = train_head(path, labels, QUICK, runs=tmp_path / "runs")
    with FeatureCache.open(path) as cache:
        image, text = cache.embeddings()
        block = synthetic_block(cache.guids, image.shape[1])
    image[119, 2] = np.inf
    block.columns |= {"image": image, "text": text}
    write_cache(path, block)
    (tmp_path / "ids.csv").write_text("guid\n3\n119\n")
    with pytest.raises(MmcliError, match="image embeddings that are not finite, the first is '119'"):
        predict(run["best_pt"], ids=tmp_path / "ids.csv")


def test_workers_leave_when_the_process_that_started_them_is_killed(setup):
    code = (
        "import os, sys, time\n"
        "from mmcli.heads.parallel import each_of\n"
        "print(*each_of(os.getpid, [()] * 4, jobs=2), flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        workers = {int(number) for number in process.stdout.readline().split()}
        assert workers
        assert process.pid not in workers
        process.kill()
    for _ in range(200):  # each looks once a second
        if not any(alive(worker) for worker in workers):
            return
        time.sleep(0.1)
    raise AssertionError("workers are still there")


def alive(pid):
    """Whether a process runs; one that has ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
