"""`mmcli finetune`, and what is done with its best.pt."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcli.cache import BackboneError, CacheError, CheckpointError, DataError, FeatureCache, MmcliError
from mmcli.featurize import featurize
from mmcli.finetune import FinetuneRecipe, Watch, finetune, open_best_pt
from mmcli.finetune import run as run_module
from mmcli.finetune.outcome import overfitting
from mmcli.finetune.use import TrainedStage2
from mmcli.heads import evaluate, load_checkpoint, predict
from mmcli.heads.checkpoint import FINETUNED, read_best_pt
from small_finetune import QUICK

LEARNS = QUICK | {"lr_backbone": 3e-4}


@pytest.fixture
def tuned(stage1, tmp_path):
    """Return a function that does both stages and returns the result of the second."""

    def make(settings=None, seeds=None, of_stage1=1, **recipe):
        best_pt = stage1(seeds=of_stage1, **recipe)
        return finetune(best_pt, LEARNS | (settings or {}), runs=tmp_path / "runs", seeds=seeds)

    return make


@pytest.fixture
def kept_whatever(monkeypatch):
    """Keep stage 2 even where it is no better, so that its best.pt can be looked at."""
    original = run_module.Outcome.__init__

    def better(self, *arguments):
        original(self, *arguments)
        self.is_better = True

    monkeypatch.setattr(run_module.Outcome, "__init__", better)


def test_the_run_folder(tuned):
    result = tuned()
    folder = Path(result["run"])
    names = {"best.pt", "metrics.json", "config.json", "history.csv", "curves.png", "confusion.png", "splits"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "metrics.json").read_text()) == result
    assert (folder.parent / "latest").resolve() == folder
    config = json.loads((folder / "config.json").read_text())
    assert config["finetune"] == FinetuneRecipe().changed(**LEARNS).to_dict()
    with (folder / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert {"train_loss", "train_macro_f1", "val_loss", "val_macro_f1", "lr"} <= history[0].keys()


def test_both_stages_stand_side_by_side(tuned):
    result = tuned()
    alone = evaluate(result["stage1"]["best_pt"], on=("train", "val", "test"))
    for part in ("train", "val", "test"):
        assert result["stage1"][part] == alone[part]
    kept = {"stage 1": "stage1", "stage 2": "stage2"}[result["kept"]]
    assert result["val"] == result[kept]["val"]
    better = result["stage2"]["val"]["macro_f1"] > result["stage1"]["val"]["macro_f1"]
    assert (result["kept"] == "stage 2") == better
    for part in ("val", "test"):
        found = result["difference"][part]
        assert found["macro_f1"] == result["stage2"][part]["macro_f1"] - result["stage1"][part]["macro_f1"]
        assert found["low"] <= found["high"]
    for stage in ("stage1", "stage2"):
        gap = result[stage]["train"]["macro_f1"] - result[stage]["val"]["macro_f1"]
        assert result[stage]["gap"] == gap


def test_where_stage_2_is_no_better_best_pt_holds_stage_1(stage1, tmp_path):
    best_pt = stage1(epochs=60, patience=30)
    ruined = {"lr_backbone": 1.0, "lr_head": 1.0}
    result = finetune(best_pt, LEARNS | ruined, runs=tmp_path / "runs")
    assert result["kept"] == "stage 1"
    before, after = load_checkpoint(best_pt), load_checkpoint(result["best_pt"])
    for name, tensor in before.head.state_dict().items():
        assert torch.equal(after.head.state_dict()[name], tensor)
    assert result["test"] == result["stage1"]["test"]
    assert result["parameters"] == before.head.n_parameters()


@pytest.mark.usefixtures("kept_whatever")
def test_best_pt_holds_the_changed_layers_only(tuned, tiny_clip):
    result = tuned()
    stored = read_best_pt(result["best_pt"])
    (changed,) = stored.content["changed"]
    assert sorted(changed) == result["unfrozen"]["names"]
    assert all(name.startswith(("text_model.encoder.layers.2.", "text_model.final_layer_norm.")) for name in changed)
    assert result["unfrozen"]["parameters"] == sum(tensor.numel() for tensor in changed.values())
    assert Path(result["best_pt"]).stat().st_size < (tiny_clip / "model.safetensors").stat().st_size / 2
    assert stored.header()["backbone"]["name"] == str(tiny_clip)
    from transformers import AutoModel

    weights = AutoModel.from_pretrained(tiny_clip).state_dict()
    assert any(not torch.equal(weights[name], tensor) for name, tensor in changed.items())


CASES = {
    "concat": ({}, {}),
    "both towers": ({}, {"unfreeze_text_layers": 2, "unfreeze_vision_layers": 1}),
    "late": ({"fusion": "late"}, {}),
    "gated": ({"fusion": "gated"}, {"unfreeze_text_layers": 0, "unfreeze_vision_layers": 2}),
    "cross_attn": ({"fusion": "cross_attn"}, {}),
    "cross_attn, vision": ({"fusion": "cross_attn"}, {"unfreeze_text_layers": 0, "unfreeze_vision_layers": 1}),
    "cross_attn, both towers": ({"fusion": "cross_attn"}, {"unfreeze_vision_layers": 1}),
    "text": ({"modality": "text"}, {}),
    "image": ({"modality": "image"}, {}),
    "linear": ({"head": "linear"}, {}),
    "offsets": ({"offsets": True}, {}),
}


@pytest.mark.usefixtures("kept_whatever")
@pytest.mark.parametrize("case", CASES)
def test_scores_predictions_of_cached_pairs_and_of_raw_pairs_agree(tuned, case, sixty, raw_sixty, tmp_path):
    """The scores of the run, of `evaluate`, and probabilities from cache, from folder, and of a single pair."""
    recipe, settings = CASES[case]
    result = tuned(settings, **recipe)
    again = evaluate(open_best_pt(result["best_pt"]), on=("val", "test"))
    assert again["val"] == result["stage2"]["val"]
    assert again["test"] == result["stage2"]["test"]
    ids = tmp_path / "ids.csv"
    guids = [str(guid) for guid in range(0, 60, 7)]
    ids.write_text("guid\n" + "\n".join(guids) + "\n")
    of_cache = predict(open_best_pt(result["best_pt"]), ids=ids, device="cpu")
    same = predict(open_best_pt(result["best_pt"]), ids=ids, data=raw_sixty[0], device="cpu")
    np.testing.assert_allclose(of_cache.probs, same.probs, atol=2e-3)  # tokens in the cache are in half precision
    elsewhere = shutil.copytree(raw_sixty[0], tmp_path / "elsewhere")
    for guid in guids:
        for suffix in (".jpg", ".txt"):
            (elsewhere / f"{guid}{suffix}").rename(elsewhere / f"new-{guid}{suffix}")
    ids.write_text("guid\n" + "\n".join(f"new-{guid}" for guid in guids) + "\n")
    of_raw = predict(open_best_pt(result["best_pt"]), ids=ids, data=elsewhere, device="cpu")
    np.testing.assert_allclose(of_cache.probs, of_raw.probs, atol=2e-3)
    mixed = predict(open_best_pt(result["best_pt"]), data=elsewhere, device="cpu")  # some cached, some new
    assert len(mixed.guids) == 60
    of_new = [mixed.guids.index(f"new-{guid}") for guid in guids]
    np.testing.assert_allclose(mixed.probs[of_new], of_raw.probs, atol=2e-3)
    pair = (elsewhere / "new-7.jpg", (elsewhere / "new-7.txt").read_text())
    alone = predict(open_best_pt(result["best_pt"]), pair=pair, device="cpu")
    np.testing.assert_allclose(alone.probs[0], of_cache.probs[1], atol=2e-3)


@pytest.mark.usefixtures("kept_whatever")
def test_it_differs_from_stage_1_and_is_what_the_whole_model_would_say(tuned, raw_sixty, tiny_clip):
    from small_finetune import whole_clip

    result = tuned({"lr_backbone": 3e-3})
    embed, unfrozen, _ = whole_clip(tiny_clip, raw_sixty[0], 1, 0)
    (changed,) = read_best_pt(result["best_pt"]).content["changed"]
    with torch.no_grad():
        for name, tensor in changed.items():
            unfrozen[name].copy_(tensor)
        model = open_best_pt(result["best_pt"])
        guids = model.checkpoint.split.test
        expected = model.checkpoint.head(embed(guids))
    with FeatureCache.open(model.checkpoint.made_from["cache"]) as cache:
        np.testing.assert_allclose(model.of_rows(cache, guids), expected, atol=1e-4)
        before = load_checkpoint(result["stage1"]["best_pt"])
        features = cache.features(guids)
        assert np.abs(before.head(_batch(features)).detach().numpy() - expected.numpy()).max() > 0.05


def _batch(features):
    from mmcli.heads.inputs import Batch

    return Batch(torch.from_numpy(features.image), torch.from_numpy(features.text))


@pytest.mark.usefixtures("kept_whatever")
def test_a_backbone_that_was_moved_is_found_where_it_is_now(tuned, tiny_clip, sixty, cli, tmp_path):
    result = tuned()
    shutil.rmtree(f"{sixty}.states")
    there = shutil.copytree(tiny_clip, tmp_path / "moved")
    stored = read_best_pt(result["best_pt"])
    header = stored.header() | {"backbone": {"name": str(tmp_path / "gone"), "revision": None}}
    best_pt = tmp_path / "best.pt"
    torch.save(stored.content | {"header": json.dumps(header)}, best_pt)
    code, _, err = cli("evaluate", "--from", best_pt, "--device", "cpu")
    assert (code, "no such backbone folder" in err) == (1, True)
    code, out, err = cli("evaluate", "--from", best_pt, "--backbone", there, "--device", "cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["macro_f1"] == result["stage2"]["test"]["macro_f1"]


@pytest.mark.usefixtures("kept_whatever")
def test_several_seeds_are_an_ensemble(tuned):
    result = tuned(seeds=2)
    assert [each["seed"] for each in result["seeds"]] == [42, 43]
    model = open_best_pt(result["best_pt"])
    assert len(model.found.changed) == 2
    assert evaluate(model, on="test")["test"] == result["stage2"]["test"]
    of_two = tuned(of_stage1=2)
    assert [each["seed"] for each in of_two["seeds"]] == [42, 43]


@pytest.mark.usefixtures("kept_whatever")
def test_rows_of_a_folder_that_cannot_be_read_are_left_out(tuned, raw_sixty, tmp_path):
    folder = shutil.copytree(raw_sixty[0], tmp_path / "some")
    (folder / "3.jpg").write_bytes(b"no picture")
    (folder / "4.txt").unlink()
    model = open_best_pt(tuned()["best_pt"])
    assert isinstance(model, TrainedStage2)
    found = predict(model, data=folder, device="cpu")
    assert {reject.guid for reject in found.rejects} == {"3", "4"}
    assert len(found.guids) == 58


@pytest.mark.usefixtures("kept_whatever")
@pytest.mark.parametrize("killed_in", [2, 3, 5])
def test_resumed_equals_uninterrupted(stage1, tmp_path, monkeypatch, killed_in):
    """Two models of three epochs, killed in the middle of an epoch: of the first model, of the second."""
    settings, best_pt = LEARNS | {"epochs": 3}, stage1(seeds=2)
    whole = finetune(best_pt, settings, runs=tmp_path / "whole")

    steps = 3 * (killed_in - 1) + 2

    def killer(done, total):
        if done == steps:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(best_pt, settings, runs=tmp_path / "runs", watch=Watch(on_step=killer))
    assert list((tmp_path / "runs").glob(".finetune-*.pt"))
    notes, seen = [], []
    watch = Watch(on_note=notes.append, on_step=lambda done, _: seen.append(done))
    result = finetune(best_pt, settings, runs=tmp_path / "runs", resume=True, watch=watch)
    assert "going on" in notes[0]
    assert seen[0] == 3 * (killed_in - 1) + 1
    assert not list((tmp_path / "runs").glob(".finetune-*.pt"))
    for name in ("history.csv", "best.pt"):
        assert (Path(result["run"]) / name).exists()
    assert (Path(result["run"]) / "history.csv").read_text() == (Path(whole["run"]) / "history.csv").read_text()
    assert result["test"] == whole["test"]
    one, other = (read_best_pt(each["best_pt"]).content for each in (whole, result))
    assert one["format"] == other["format"] == FINETUNED
    assert len(one["changed"]) == 2
    for name, tensor in one["tensors"].items():
        assert torch.equal(other["tensors"][name], tensor), name
    for mine, theirs in zip(one["changed"], other["changed"], strict=True):
        assert all(torch.equal(theirs[name], tensor) for name, tensor in mine.items())


def test_resume_with_nothing_there_begins_anew(stage1, tmp_path):
    notes = []
    best_pt = stage1()
    finetune(best_pt, LEARNS, runs=tmp_path / "runs", resume=True, watch=Watch(on_note=notes.append))
    assert "nothing to resume" in notes[0]


def test_a_damaged_record_of_progress(stage1, tmp_path):
    best_pt = stage1()
    with pytest.raises(KeyboardInterrupt):
        finetune(best_pt, LEARNS, runs=tmp_path / "runs", watch=Watch(on_step=_interrupt_at(5)))
    (left,) = (tmp_path / "runs").glob(".finetune-*.pt")
    left.write_bytes(left.read_bytes()[:300])
    with pytest.raises(CheckpointError, match="leave --resume out"):
        finetune(best_pt, LEARNS, runs=tmp_path / "runs", resume=True)
    notes = []
    finetune(best_pt, LEARNS, runs=tmp_path / "runs", watch=Watch(on_note=notes.append))
    assert "--resume would go on" in notes[0]


def _interrupt_at(step):
    def on_step(done, total):
        if done == step:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.usefixtures("kept_whatever")
def test_finetune_of_a_finetuned_best_pt_begins_again_from_stage_1(tuned, tmp_path):
    first = tuned()
    notes = []
    second = finetune(first["best_pt"], LEARNS, runs=tmp_path / "runs", watch=Watch(on_note=notes.append))
    assert "beginning again from its stage 1" in notes[0]
    assert second["stage1"] == first["stage1"]
    assert second["stage2"] == first["stage2"]
    with pytest.raises(CheckpointError, match=r"is of stage 2 .* give the best.pt that it was made from"):
        load_checkpoint(first["best_pt"])
    Path(first["stage1"]["best_pt"]).unlink()
    with pytest.raises(CheckpointError, match="is gone: give a best"):
        finetune(first["best_pt"], LEARNS, runs=tmp_path / "runs")


def test_best_pt_missing_or_of_another_dataset(stage1, learnable, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        finetune(tmp_path / "nothing.pt", runs=tmp_path / "runs")
    best_pt = stage1()
    with pytest.raises(CheckpointError, match="this head was trained on features of"):
        finetune(best_pt, cache_path=learnable[0], runs=tmp_path / "runs")
    labels = tmp_path / "others.csv"
    labels.write_text("guid,tag\n1,neutral\n2,positive\n")
    with pytest.raises(DataError, match=r"\d+ of 48 train rows have no label or no features here"):
        finetune(best_pt, labels_path=labels, runs=tmp_path / "runs")


def test_the_cache_or_the_backbone_is_not_at_hand(stage1, sixty, tmp_path):
    best_pt = stage1()
    with pytest.raises(BackboneError, match="no such backbone folder"):
        finetune(best_pt, backbone=str(tmp_path / "gone"), runs=tmp_path / "runs")
    Path(sixty).unlink()
    with pytest.raises(CacheError, match="no feature cache at"):
        finetune(best_pt, runs=tmp_path / "runs")


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ({}, {"unfreeze_text_layers": 9}, "has 3 layers, 9 are to be unfrozen"),
        ({}, {"unfreeze_text_layers": 0}, "no layer is to be unfrozen"),
        ({}, {"unfreeze_text_layers": -2}, "must be 0 or more"),
        ({"modality": "text"}, {"unfreeze_vision_layers": 1}, "unfreeze_vision_layers has no effect"),
        ({"modality": "image"}, {"unfreeze_text_layers": 1}, "unfreeze_text_layers has no effect"),
        ({}, {"lr_backbone": float("nan")}, "lr_backbone must be above 0"),
        ({}, {"warmup": 1.0}, "warmup must be in"),
        ({}, {"learning_rate": 1.0}, "no setting of stage 2 is called 'learning_rate'"),
        ({}, {"lr_backbone": 1e30, "lr_head": 1e30}, "diverged"),
    ],
)
def test_settings_that_cannot_be(stage1, tmp_path, recipe, settings, message):
    with pytest.raises(MmcliError, match=message):
        finetune(stage1(**recipe), QUICK | settings, runs=tmp_path / "runs")
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.endswith("-finetune")]


def test_all_layers_can_be_asked_for(cli, stage1):
    options = ["--unfreeze-text-layers", "all", "--unfreeze-vision-layers", "all", "--epochs", "1", "--device", "cpu"]
    code, out, err = cli("finetune", "--from", stage1(), *options, "--json")
    assert code == 0, err
    assert json.loads(out)["unfrozen"]["layers"] == {"text": 3, "image": 3}


def test_a_head_of_all_rows_has_none_to_stop_by(stage1, tmp_path):
    from mmcli.heads import train_full

    full = train_full(stage1(), runs=tmp_path / "full")
    with pytest.raises(CheckpointError, match="was trained on all rows"):
        finetune(full["best_pt"], runs=tmp_path / "runs")


def _tampered(best_pt, path, change):
    stored = read_best_pt(best_pt)
    content = dict(stored.content)
    header = stored.header()
    change(content, header)
    torch.save(content | {"header": json.dumps(header)}, path)
    return path


def _shape(content, header):
    content["changed"][0]["text_model.final_layer_norm.bias"] = torch.zeros(1)


def _name(content, header):
    content["changed"][0]["text_model.something"] = content["changed"][0].pop("text_model.final_layer_norm.bias")


def _nan(content, header):
    content["changed"][0]["text_model.final_layer_norm.bias"].fill_(float("nan"))


def _text(content, header):
    content["changed"] = ["x"]


def _tensor(content, header):
    content["changed"] = [torch.zeros(2)]


def _too_few(content, header):
    content["changed"] = []


def _no_layers(content, header):
    header["finetune"]["unfreeze_text_layers"] = 0


def _half_a_layer(content, header):
    header["finetune"]["unfreeze_text_layers"] = 1.5


def _other_layers(content, header):
    header["finetune"]["unfreeze_text_layers"] = 2


@pytest.mark.usefixtures("kept_whatever")
def test_a_best_pt_from_a_stranger(tuned, cli, tmp_path):
    best_pt = tuned()["best_pt"]
    ways = (_shape, _name, _nan, _text, _tensor, _too_few, _no_layers, _half_a_layer, _other_layers)
    for number, change in enumerate(ways):
        code, _, err = cli(
            "evaluate", "--from", _tampered(best_pt, tmp_path / f"{number}.pt", change), "--device", "cpu"
        )
        assert (code, err.count("\n"), err[:6]) == (1, 1, "error:"), f"{change.__name__}: {err}"


@pytest.mark.parametrize("better", [True, False])
def test_all_rows_after_stage_2_is_the_head_of_its_stage_1(stage1, sixty, tmp_path, monkeypatch, better):
    """`train-head --full` from the latest run: whichever stage that holds, what is repeated is stage 1."""
    from mmcli.heads import train_full

    original = run_module.Outcome.__init__

    def decided(self, *arguments):
        original(self, *arguments)
        self.is_better = better

    monkeypatch.setattr(run_module.Outcome, "__init__", decided)
    best_pt = stage1(seeds=2)
    result = finetune(best_pt, LEARNS, runs=tmp_path / "runs", seeds=1)
    expected = train_full(best_pt, runs=tmp_path / "one", jobs=1)
    found = train_full(result["best_pt"], runs=tmp_path / "two", jobs=1)
    assert found["train"] == expected["train"]
    assert found["stage2_left_out"]
    assert not expected["stage2_left_out"]
    one, two = (load_checkpoint(each["best_pt"]).head.state_dict() for each in (expected, found))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.mark.usefixtures("kept_whatever")
def test_where_raw_pairs_and_backbone_were_moved_to_is_remembered(stage1, raw_sixty, tiny_clip, tmp_path):
    data, there = shutil.copytree(raw_sixty[0], tmp_path / "data"), shutil.copytree(tiny_clip, tmp_path / "clip")
    result = finetune(stage1(), LEARNS, data=data, backbone=str(there), runs=tmp_path / "runs")
    header = read_best_pt(result["best_pt"]).header()
    assert header["backbone"]["name"] == str(there)
    assert header["made_from"]["data"] == str(data)


def test_an_edited_pair_makes_another_run_of_it(stage1, sixty, raw_sixty, tmp_path):
    """Interrupted, then featurized again with another text: there is nothing to go on with."""
    best_pt = stage1()
    with pytest.raises(KeyboardInterrupt):
        finetune(best_pt, LEARNS, runs=tmp_path / "runs", watch=Watch(on_step=_interrupt_at(5)))
    shutil.copytree(raw_sixty[0], tmp_path / "data")
    guid = load_checkpoint(best_pt).split.train[0]
    (tmp_path / "data" / f"{guid}.txt").write_text("something else")
    featurize(tmp_path / "data", raw_sixty[1], sixty)
    notes = []
    finetune(best_pt, LEARNS, runs=tmp_path / "runs", resume=True, watch=Watch(on_note=notes.append))
    assert "nothing to resume" in notes[0]


def test_old_progress_is_not_thrown_away_before_it_is_asked_for(stage1, tmp_path):
    best_pt = stage1()
    with pytest.raises(KeyboardInterrupt):
        finetune(best_pt, LEARNS, runs=tmp_path / "runs", watch=Watch(on_step=_interrupt_at(5)))
    (left,) = (tmp_path / "runs").glob(".finetune-*.pt")
    os.utime(left, (0, 0))
    notes = []
    finetune(best_pt, LEARNS, runs=tmp_path / "runs", resume=True, watch=Watch(on_note=notes.append))
    assert "going on" in notes[0]


def test_options_that_stage_1_has_no_use_for(cli, stage1, tmp_path):
    best_pt = stage1()
    code, _, err = cli("evaluate", "--from", best_pt, "--backbone", "somewhere")
    assert (code, "--backbone has no effect" in err) == (2, True)
    code, _, err = cli("finetune", "--from", best_pt, "--unfreeze-text-layers=-1")
    assert (code, "it is a number of layers, or all" in err) == (1, True)


def test_the_rates_rise_then_fall():
    recipe = FinetuneRecipe(warmup=0.2)
    factors = [recipe.factor(step, 10) for step in range(10)]
    assert factors == [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert FinetuneRecipe(warmup=0.0).factor(0, 10) == 1.0


def test_overfitting_is_called_so():
    def history(*losses):
        return [
            {"epoch": number, "train_loss": train, "val_loss": val} for number, (train, val) in enumerate(losses, 1)
        ]

    found = overfitting(history((1.0, 0.9), (0.8, 0.8), (0.6, 0.85), (0.5, 0.9)))
    assert found == {"since": 2, "val_loss": 0.8, "train_loss": 0.8, "val_loss_end": 0.9, "train_loss_end": 0.5}
    assert overfitting(history((1.0, 0.9), (0.8, 0.8), (0.7, 0.805))) is None  # hardly a rise
    assert overfitting(history((0.5, 0.8), (0.6, 0.9))) is None  # both rise: that is another trouble
    assert overfitting(history((1.0, 0.9))) is None


def test_on_the_command_line(cli, stage1):
    best_pt = stage1()
    options = ["--epochs", "2", "--lr-backbone", "3e-4", "--lr-head", "1e-3", "--device", "cpu"]
    code, out, err = cli("finetune", "--from", best_pt, *options, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert {"run", "best_pt", "train", "val", "test", "seconds", "kept", "stage1", "stage2"} <= result.keys()
    assert "frozen part: 60/60 pairs" in err
    code, out, err = cli("finetune", "--from", best_pt, *options)
    assert code == 0, err
    assert "frozen part" not in err  # it is kept
    for text in (
        "macro-F1, stage 1",
        "macro-F1, stage 2",
        "Macro-F1 of training less validation rows",
        "best.pt holds",
    ):
        assert text in out
    assert cli("evaluate", "--on", "test")[0] == 0
    code, _, err = cli("finetune", "--from", best_pt, "--unfreeze-text-layers", "7")
    assert (code, err.count("\n")) == (1, 1)
    assert "has 3 layers" in err
    assert cli("finetune", "--batch-size", "1")[0] == 2
