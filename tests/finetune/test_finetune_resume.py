"""An interrupted stage 2 goes on after its last finished epoch, and ends as if it had never stopped."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from mmcli.featurize import featurize
from mmcli.finetune import FinetuneOptions, Watch, finetune
from mmcli.heads import load_checkpoint
from mmcli.heads.runs.checkpoint import FORMAT
from small_finetune import LEARNS, interrupt_at, read_best_pt


@pytest.mark.usefixtures("kept_whatever")
@pytest.mark.parametrize("killed_in", [2, 3, 5])
def test_resumed_equals_uninterrupted(stage1, tmp_path, killed_in):
    """Two models of three epochs, killed in the middle of an epoch: of the first model, of the second."""
    settings, best_pt = LEARNS | {"epochs": 3}, stage1(seeds=2)
    whole = finetune(best_pt, settings, options=FinetuneOptions(tmp_path / "whole"))

    steps = 3 * (killed_in - 1) + 2

    def killer(done, total):
        if done == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(best_pt, settings, watch=Watch(on_step=killer), options=FinetuneOptions(tmp_path / "runs"))
    assert list((tmp_path / "runs").glob(".fits/*.pt"))
    notes, seen = [], []
    watch = Watch(on_note=notes.append, on_step=lambda done, _: seen.append(done))
    result = finetune(best_pt, settings, watch=watch, options=FinetuneOptions(tmp_path / "runs"))
    assert "going on" in notes[0]
    assert seen[0] == 3 * (killed_in - 1) + 1
    assert not list((tmp_path / "runs").glob(".fits/*.pt"))
    for name in ("history.csv", "best.pt"):
        assert (Path(result.run) / name).exists()
    assert (Path(result.run) / "history.csv").read_text() == (Path(whole.run) / "history.csv").read_text()
    assert result.scores["test"] == whole.scores["test"]
    one, other = (read_best_pt(run.best_pt)[0] for run in (whole, result))
    assert one["format"] == other["format"] == FORMAT
    assert len(one["changed"]) == 2
    for name, tensor in one["tensors"].items():
        assert torch.equal(other["tensors"][name], tensor), name
    for mine, theirs in zip(one["changed"], other["changed"], strict=True):
        assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())


@pytest.fixture
def interrupted(stage1, tmp_path):
    """Train stage 1, interrupt stage 2 in its fifth step, and return stage 1's best.pt."""
    best_pt = stage1()
    with pytest.raises(KeyboardInterrupt):
        finetune(best_pt, LEARNS, watch=Watch(on_step=interrupt_at(5)), options=FinetuneOptions(tmp_path / "runs"))
    return best_pt


def test_the_same_command_typed_again_goes_on_and_restart_begins_anew(interrupted, tmp_path):
    notes = []
    result = finetune(
        interrupted, LEARNS, watch=Watch(on_note=notes.append), options=FinetuneOptions(tmp_path / "runs", restart=True)
    )
    assert not notes
    assert len((Path(result.run) / "history.csv").read_text().splitlines()) == 3


def test_a_damaged_record_of_progress_is_made_anew(interrupted, tmp_path):
    whole = finetune(interrupted, LEARNS, options=FinetuneOptions(tmp_path / "whole"))
    (left,) = (tmp_path / "runs").glob(".fits/*.pt")
    left.write_bytes(left.read_bytes()[:300])
    notes = []
    result = finetune(
        interrupted, LEARNS, watch=Watch(on_note=notes.append), options=FinetuneOptions(tmp_path / "runs")
    )
    assert not notes
    assert result.scores["test"] == whole.scores["test"]


def test_a_neighbour_that_ends_leaves_the_progress_of_others(interrupted, tmp_path):
    (left,) = (tmp_path / "runs").glob(".fits/*.pt")
    finetune(interrupted, LEARNS | {"epochs": 1}, options=FinetuneOptions(tmp_path / "runs"))
    assert left.exists()


def test_an_edited_pair_makes_another_run_of_it(interrupted, sixty, raw_sixty, tmp_path):
    """Interrupted, then featurized again with another text: there is nothing to go on with."""
    best_pt = interrupted
    shutil.copytree(raw_sixty[0], tmp_path / "data")
    guid = load_checkpoint(best_pt).split.train[0]
    (tmp_path / "data" / f"{guid}.txt").write_text("something else")
    featurize(tmp_path / "data", raw_sixty[1], sixty)
    notes = []
    finetune(best_pt, LEARNS, watch=Watch(on_note=notes.append), options=FinetuneOptions(tmp_path / "runs"))
    assert not notes


def test_old_progress_is_not_thrown_away_before_it_is_asked_for(interrupted, tmp_path):
    best_pt = interrupted
    (left,) = (tmp_path / "runs").glob(".fits/*.pt")
    os.utime(left, (0, 0))
    notes = []
    finetune(best_pt, LEARNS, watch=Watch(on_note=notes.append), options=FinetuneOptions(tmp_path / "runs"))
    assert "going on" in notes[0]
