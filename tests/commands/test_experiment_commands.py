"""compare, ablate, sweep and train-head as a user types them."""

import json

import numpy as np
import pytest
from conftest import interrupt_at_third, rewrite
from mmcli.heads.experiments import fits as fits_module
from mmcli.heads.runs import fit_store
from small_experiments import POOLED


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
    assert (code, "lr=0.001" in out, "--lr" in err or "the current settings" in err) == (0, True, True)
    for arguments, words in (
        (("compare", "--folds", "0"), "at least 2 folds"),
        (("ablate", "--repeats", "0"), "1 repeat"),
        (("ablate", "--focus-class", "angry"), "no class is called 'angry': choose among negative, neutral, positive"),
        (("sweep", "--grid", "colour=red"), "no setting of a head is called 'colour'"),
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
        ("train-head", "--seeds", "0"),
        ("train-head", "--head", "linear", "--lr", "1e-3"),
        ("ablate", "--focal-gamma", "1", *shared[:4]),
        ("sweep",),
    ):
        assert cli(*arguments)[0] == 2


def test_what_compare_takes_by_default_fits_the_rest_of_the_recipe(cli, learnable, tmp_path):
    path, labels = learnable
    shared = ("--cache", path, "--labels", labels, "--folds", "2", "--repeats", "1", "--jobs", "1", "--json")
    code, out, err = cli("compare", "--head", "linear", *shared)
    assert code == 0, err
    assert {entry["name"] for entry in json.loads(out)["candidates"]} == {"concat", "product", "late"}
    rewrite(path, lambda columns: columns.update(image_views=np.repeat(columns["image"][:, None], 2, axis=1)))
    code, out, err = cli("compare", "--views", "--epochs", "1", "--hidden", "4", *shared)
    assert code == 0, err
    assert {entry["name"] for entry in json.loads(out)["candidates"]} == set(POOLED)


def test_an_interrupted_experiment_says_so_and_exits_with_130(cli, learnable, monkeypatch):
    path, labels = learnable
    restore = interrupt_at_third(monkeypatch, fits_module, "_fit_fold")
    shared = ("--cache", path, "--labels", labels, "--epochs", "2", "--hidden", "8", "--jobs", "1")
    code, out, err = cli("compare", "--fusions", "concat", "--folds", "2", *shared)
    assert (code, out) == (130, "")
    assert "run the same command again to go on" in err
    restore()
    code, _, err = cli("compare", "--fusions", "concat", "--folds", "2", *shared)
    assert (code, "fit: 2/4 fits" in err) == (0, True)


def test_interrupted_train_head_does_not_say_that_anything_was_kept(cli, learnable, monkeypatch):
    def interrupt(*task):
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_store, "_fit_and_keep", interrupt)
    train = ("train-head", "--cache", learnable[0], "--labels", learnable[1])
    code, out, err = cli(*train)
    assert (code, out, err.splitlines()[-1]) == (130, "", "interrupted: nothing was written")
    code, out, err = cli(*train, "--seeds", "2", "--jobs", "1")
    assert (code, out, "run the same command again" in err.splitlines()[-1]) == (130, "", True)


@pytest.mark.parametrize("option", [("--split-seed", "7"), ("--no-group-duplicates",)])
def test_options_of_a_split_are_refused_where_no_split_is_made(cli, option):
    code, _, err = cli("compare", *option)
    assert (code, f"{option[0].replace('--no-', '--')} needs --without-test or --single-split" in err) == (2, True)
