"""Settings tried on folds of the training and validation rows."""

import numpy as np
import pytest
from conftest import rewrite
from mmcli.cache import MmcliError, read_labels
from mmcli.heads import RunOptions, load_checkpoint, train_head
from mmcli.heads.evaluation.splits import SplitOptions
from mmcli.heads.experiments import Protocol, Setup, grid_of, sweep
from mmcli.heads.experiments.tuning import settings_to_try
from small_experiments import QUICK, out_of_fold


def test_a_sweep_never_sees_the_test_rows(setup, learnable, tmp_path, fitted):
    """Other labels and features of the test rows change nothing, not even which kept fits are used."""
    path, labels = learnable
    split = load_checkpoint(train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs")).best_pt).split
    grid = grid_of(["lr=1e-3,1e-2", "dropout=0.2"])
    first = sweep(setup, QUICK, grid, protocol=Protocol(3, 1))
    assert len(fitted) == 9
    assert {row["guid"] for row in out_of_fold(first.folder)} == {*split.train, *split.val}
    assert first.candidates[0].name in ("current settings", "dropout=0.2 lr=0.001", "dropout=0.2 lr=0.01")
    test = set(split.test)
    guids = list(read_labels(labels))

    def spoil(columns):
        columns["image"][[guid in test for guid in guids]] = 9.0

    rewrite(path, spoil)
    again = sweep(setup, QUICK, grid, protocol=Protocol(3, 1))
    assert len(fitted) == 9
    assert again.candidates == first.candidates
    assert again.best == first.best


def test_a_sweep_leaves_out_the_test_rows_of_a_grouped_split(setup, learnable, tmp_path):
    run = train_head(
        *learnable, QUICK, split=SplitOptions(group_duplicates=True), options=RunOptions(tmp_path / "runs")
    )
    split = load_checkpoint(run.best_pt).split
    there = Setup(setup.cache, setup.labels, SplitOptions(group_duplicates=True), setup.out, jobs=1)
    result = sweep(there, QUICK, grid_of(["lr=1e-3"]), protocol=Protocol(2, 1))
    assert {row["guid"] for row in out_of_fold(result.folder)} == {*split.train, *split.val}


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


def test_settings_without_effect_are_refused_and_equal_ones_tried_once(setup):
    with pytest.raises(MmcliError, match=r"lr_attn has no effect on this head \(concat, mlp\)"):
        sweep(setup, QUICK, grid_of(["lr_attn=1e-3,1e-2"]), protocol=Protocol(2, 1))
    result = sweep(setup, QUICK, grid_of(["loss=ce,focal", "focal_gamma=1,2"]), protocol=Protocol(2, 1))
    assert sorted(entry.name for entry in result.candidates) == [
        "current settings", "focal_gamma=1 loss=focal", "focal_gamma=2 loss=focal",
    ]  # fmt: skip
