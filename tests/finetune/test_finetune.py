"""`mmcli finetune`, and what is done with its best.pt."""

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from mmcli.cache import CheckpointError, DataError, FeatureCache, MmcliError
from mmcli.finetune import FinetuneOptions, Watch, finetune
from mmcli.heads import FinetuneRecipe, Predictor, RunOptions, evaluate, load_checkpoint, open_best_pt, train_full
from mmcli.heads.evaluation.statistics import paired_bootstrap
from mmcli.heads.runs import stages
from mmcli.heads.runs.stages import Overfitting, find_overfitting
from mmcli.report.stage2_tables import stages_tables
from small_finetune import LEARNS, read_best_pt


def test_the_run_folder(tuned):
    result = tuned()
    folder = Path(result.run)
    names = {"best.pt", "metrics.json", "config.json", "history.csv", "curves.png", "confusion.png", "splits"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(result.to_dict()))
    assert (folder.parent / "latest").resolve() == folder
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"]["finetune"] == asdict(FinetuneRecipe().changed(**LEARNS))
    with (folder / "history.csv").open() as file:
        history = list(csv.DictReader(file))
    assert [row["epoch"] for row in history] == ["1", "2"]
    assert {"train_loss", "train_macro_f1", "val_loss", "val_macro_f1", "lr"} <= history[0].keys()


def test_both_stages_stand_side_by_side(tuned):
    result = tuned()
    alone = evaluate(result.stages.stage1_best_pt, on=("train", "val", "test"))
    for part in ("train", "val", "test"):
        assert result.stages.scores["stage1"][part] == alone.scores[part]
    kept = {"stage 1": "stage1", "stage 2": "stage2"}[result.stages.kept]
    assert result.scores["val"] == result.stages.scores[kept]["val"]
    better = result.stages.scores["stage2"]["val"].macro_f1 > result.stages.scores["stage1"]["val"].macro_f1
    assert (result.stages.kept == "stage 2") == better
    for part in ("val", "test"):
        found = result.stages.difference[part]
        first, second = (result.stages.scores[stage][part].macro_f1 for stage in ("stage1", "stage2"))
        assert found.macro_f1 == second - first
        assert found.low <= found.high
    for stage in ("stage1", "stage2"):
        scores = result.stages.scores[stage]
        gap = scores["train"].macro_f1 - scores["val"].macro_f1
        assert result.stages.gap(stage) == gap
        assert result.to_dict()[stage]["gap"] == gap


def test_intervals_of_both_stages_and_of_their_difference_draw_copies_together(tuned, sixty, monkeypatch):
    with h5py.File(sixty, "r+") as file:  # guids 0 to 11 are one text, as are 12 to 23, ...
        sixes = np.array([int(guid) // 12 for guid in file["guid"][:]])
        file["row/cleaned_sha256"][:] = np.repeat(sixes[:, None] + 1, 32, axis=1)
    groups_drawn = []

    def spy(*arguments, groups, **more):
        groups_drawn.append(groups)
        return paired_bootstrap(*arguments, groups=groups, **more)

    monkeypatch.setattr(stages, "paired_bootstrap", spy)
    result = tuned()
    parts = load_checkpoint(Path(result.stages.stage1_best_pt)).split.named()
    for part, guids in parts.items():
        expected = len({int(guid) // 12 for guid in guids})
        assert [result.stages.scores[stage][part].n_groups for stage in ("stage1", "stage2")] == [expected] * 2
        assert expected < len(guids)
    for drawn, part in zip(groups_drawn, ("val", "test"), strict=True):
        twelve = [int(guid) // 12 for guid in parts[part]]
        assert [[one == other for other in drawn] for one in drawn] == [[a == b for b in twelve] for a in twelve]
    assert "copies drawn together" in stages_tables(result.stages, result.classes)[0].title


def test_where_stage_2_is_no_better_best_pt_holds_stage_1(stage1, tmp_path):
    best_pt = stage1(epochs=60, patience=30)
    ruined = {"lr_backbone": 1.0, "lr_head": 1.0}
    result = finetune(best_pt, LEARNS | ruined, options=FinetuneOptions(tmp_path / "runs"))
    assert result.stages.kept == "stage 1"
    before, after = load_checkpoint(best_pt), load_checkpoint(result.best_pt)
    for name, tensor in before.head.state_dict().items():
        assert torch.equal(after.head.state_dict()[name], tensor)
    assert result.scores["test"] == result.stages.scores["stage1"]["test"]
    assert result.parameters == before.head.n_parameters()


@pytest.mark.usefixtures("kept_whatever")
def test_best_pt_holds_the_changed_layers_only(tuned, tiny_clip):
    result = tuned()
    content, header = read_best_pt(result.best_pt)
    (changed,) = content["changed"]
    assert sorted(changed) == result.stages.names
    assert all(name.startswith(("text_model.encoder.layers.2.", "text_model.final_layer_norm.")) for name in changed)
    assert result.stages.parameters == sum(tensor.numel() for tensor in changed.values())
    assert Path(result.best_pt).stat().st_size < (tiny_clip / "model.safetensors").stat().st_size / 2
    assert header["backbone"]["name"] == str(tiny_clip)
    from transformers import AutoModel

    weights = AutoModel.from_pretrained(tiny_clip).state_dict()
    assert any(not torch.equal(weights[name], tensor) for name, tensor in changed.items())


CASES = {
    "concat": ({}, {}),
    "both towers": ({}, {"unfreeze_text_layers": 2, "unfreeze_vision_layers": 1}),
    "late": ({"fusion": "late"}, {}),
    "gated": ({"fusion": "gated"}, {"unfreeze_text_layers": 0, "unfreeze_vision_layers": 2}),
    "film": ({"fusion": "film"}, {}),
    "product": ({"fusion": "product"}, {}),
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
    again = evaluate(result.best_pt, on=("val", "test"))
    assert again.scores["val"] == result.stages.scores["stage2"]["val"]
    assert again.scores["test"] == result.stages.scores["stage2"]["test"]
    ids = tmp_path / "ids.csv"
    guids = [str(guid) for guid in range(0, 60, 7)]
    ids.write_text("guid\n" + "\n".join(guids) + "\n")
    of_cache = Predictor.open(result.best_pt, device="cpu").predict(ids)
    same = Predictor.open(open_best_pt(result.best_pt), device="cpu").predict(ids, raw_sixty[0])
    np.testing.assert_allclose(of_cache.probs, same.probs, atol=2e-3)  # tokens in the cache are in half precision
    elsewhere = shutil.copytree(raw_sixty[0], tmp_path / "elsewhere")
    for guid in guids:
        for suffix in (".jpg", ".txt"):
            (elsewhere / f"{guid}{suffix}").rename(elsewhere / f"new-{guid}{suffix}")
    ids.write_text("guid\n" + "\n".join(f"new-{guid}" for guid in guids) + "\n")
    of_raw = Predictor.open(result.best_pt, device="cpu").predict(ids, elsewhere)
    np.testing.assert_allclose(of_cache.probs, of_raw.probs, atol=2e-3)
    mixed = Predictor.open(open_best_pt(result.best_pt), device="cpu").predict(data=elsewhere)  # some cached, some new
    assert len(mixed.guids) == 60
    of_new = [mixed.guids.index(f"new-{guid}") for guid in guids]
    np.testing.assert_allclose(mixed.probs[of_new], of_raw.probs, atol=2e-3)
    pair = (elsewhere / "new-7.jpg", (elsewhere / "new-7.txt").read_text())
    alone = Predictor.open(open_best_pt(result.best_pt), device="cpu").predict(pairs=[pair])
    np.testing.assert_allclose(alone.probs[0], of_cache.probs[1], atol=2e-3)


@pytest.mark.usefixtures("kept_whatever")
def test_it_differs_from_stage_1_and_is_what_the_whole_model_would_say(tuned, raw_sixty, tiny_clip):
    from small_finetune import whole_clip

    result = tuned({"lr_backbone": 3e-3})
    whole = whole_clip(tiny_clip, raw_sixty[0], 1, 0)
    (changed,) = read_best_pt(result.best_pt)[0]["changed"]
    with torch.no_grad():
        for name, tensor in changed.items():
            whole.unfrozen[name].copy_(tensor)
        model = open_best_pt(result.best_pt)
        guids = model.checkpoint.split.test
        expected = model.checkpoint.head(whole.embed(guids))
    with FeatureCache.open(model.checkpoint.made_from["cache"]) as cache:
        np.testing.assert_allclose(model.of_rows(cache, guids), expected, atol=1e-4)
        before = load_checkpoint(result.stages.stage1_best_pt)
        features = cache.features(guids)
        assert np.abs(before.head(_batch(features)).detach().numpy() - expected.numpy()).max() > 0.05


def _batch(features):
    from mmcli.heads.model.inputs import Batch

    return Batch(torch.from_numpy(features.image), torch.from_numpy(features.text))


@pytest.mark.usefixtures("kept_whatever")
def test_a_backbone_that_was_moved_is_found_where_it_is_now(tuned, tiny_clip, sixty, cli, tmp_path):
    result = tuned()
    shutil.rmtree(f"{sixty}.states")
    there = shutil.copytree(tiny_clip, tmp_path / "moved")
    content, header = read_best_pt(result.best_pt)
    header |= {"backbone": {"name": str(tmp_path / "gone"), "revision": None}}
    best_pt = tmp_path / "best.pt"
    torch.save(content | {"header": json.dumps(header)}, best_pt)
    code, _, err = cli("evaluate", "--from", best_pt, "--device", "cpu")
    assert (code, "no such backbone folder" in err) == (1, True)
    code, out, err = cli("evaluate", "--from", best_pt, "--backbone", there, "--device", "cpu", "--json")
    assert code == 0, err
    assert json.loads(out)["test"]["macro_f1"] == result.stages.scores["stage2"]["test"].macro_f1


@pytest.mark.usefixtures("kept_whatever")
def test_files_of_the_earlier_formats_are_read(tuned, tmp_path):
    result = tuned()
    first, second = result.stages.stage1_best_pt, result.best_pt
    content = torch.load(first, weights_only=True)
    del content["changed"]
    torch.save(content | {"format": "mmcli head 2"}, tmp_path / "head.pt")
    assert evaluate(tmp_path / "head.pt", on="test").scores["test"] == result.stages.scores["stage1"]["test"]
    content, header = torch.load(second, weights_only=True), read_best_pt(second)[1]
    header["finetune"] = header["recipe"].pop("finetune")
    torch.save(content | {"format": "mmcli finetune 1", "header": json.dumps(header)}, tmp_path / "tuned.pt")
    assert evaluate(tmp_path / "tuned.pt", on="test").scores["test"] == result.stages.scores["stage2"]["test"]


@pytest.mark.usefixtures("kept_whatever")
def test_several_seeds_are_an_ensemble(tuned):
    result = tuned(seeds=2)
    assert [each.seed for each in result.seeds] == [42, 43]
    model = open_best_pt(result.best_pt)
    assert len(model.checkpoint.changed) == 2
    for part in ("val", "test"):  # each model alone, and both together
        scores = [each.scores[part]["macro_f1"] for each in result.seeds]
        assert result.over_seeds[part]["macro_f1"].mean == pytest.approx(np.mean(scores))
    assert evaluate(model, on="test").scores["test"] == result.stages.scores["stage2"]["test"]
    of_two = tuned(of_stage1=2)
    assert [each.seed for each in of_two.seeds] == [42, 43]


@pytest.mark.usefixtures("kept_whatever")
def test_rows_of_a_folder_that_cannot_be_read_are_left_out(tuned, raw_sixty, tmp_path):
    folder = shutil.copytree(raw_sixty[0], tmp_path / "some")
    (folder / "3.jpg").write_bytes(b"no picture")
    (folder / "4.txt").unlink()
    model = open_best_pt(tuned().best_pt)
    found = Predictor.open(model, device="cpu").predict(data=folder)
    assert {reject.guid for reject in found.rejects} == {"3", "4"}
    assert len(found.guids) == 58


@pytest.mark.usefixtures("kept_whatever")
def test_finetune_of_a_finetuned_best_pt_begins_again_from_stage_1(tuned, tmp_path):
    first = tuned()
    notes = []
    second = finetune(
        first.best_pt, LEARNS, watch=Watch(on_note=notes.append), options=FinetuneOptions(tmp_path / "runs")
    )
    assert "was written by `mmcli finetune`: starting again from" in notes[0]
    assert second.stages.scores == first.stages.scores
    assert second.stages.stage1_best_pt == first.stages.stage1_best_pt
    Path(first.stages.stage1_best_pt).unlink()
    with pytest.raises(CheckpointError, match="is gone: give a best"):
        finetune(first.best_pt, LEARNS, options=FinetuneOptions(tmp_path / "runs"))


def test_all_layers_can_be_asked_for(cli, stage1):
    options = ["--unfreeze-text-layers", "all", "--unfreeze-vision-layers", "all", "--epochs", "1", "--device", "cpu"]
    code, out, err = cli("finetune", "--from", stage1(), *options, "--json")
    assert code == 0, err
    assert json.loads(out)["unfrozen"]["layers"] == {"text": 3, "image": 3}


def test_all_rows_where_stage_1_was_kept_is_the_head_of_stage_1(stage1, tmp_path, decide):
    decide(False)
    best_pt = stage1(seeds=2)
    result = finetune(best_pt, LEARNS, options=FinetuneOptions(tmp_path / "runs", seeds=1))
    expected = train_full(best_pt, options=RunOptions(tmp_path / "one", jobs=1))
    repeated = train_full(result.best_pt, options=RunOptions(tmp_path / "two", jobs=1))
    assert repeated.scores["train"] == expected.scores["train"]
    one, two = (load_checkpoint(each.best_pt).head.state_dict() for each in (expected, repeated))
    assert all(torch.equal(two[name], tensor) for name, tensor in one.items())


@pytest.mark.usefixtures("kept_whatever")
def test_all_rows_after_stage_2_repeats_both_stages(stage1, tmp_path, raw_sixty):
    """Two models from one head of stage 1, each for the epochs that were found best; the result predicts raw pairs."""
    result = finetune(stage1(), LEARNS | {"epochs": 3}, options=FinetuneOptions(tmp_path / "runs", seeds=2))
    full = train_full(result.best_pt, options=RunOptions(tmp_path / "full", jobs=1))
    model = open_best_pt(full.best_pt)
    assert model.checkpoint.recipe.finetune == load_checkpoint(result.best_pt).recipe.finetune
    assert len(model.checkpoint.split.train) == 60
    assert [each.epochs for each in full.seeds] == [each.best_epoch for each in result.seeds]
    assert model.layers == {"text": 1}
    first = load_checkpoint(
        train_full(result.stages.stage1_best_pt, options=RunOptions(tmp_path / "first", jobs=1)).best_pt
    )
    own = first.head.heads[0].state_dict()
    assert any(not torch.equal(model.checkpoint.head.heads[0].state_dict()[name], each) for name, each in own.items())
    predictions = Predictor.open(full.best_pt, device="cpu").predict(data=raw_sixty[0])
    with FeatureCache.open(model.checkpoint.made_from["cache"]) as cache:
        logits = model.of_rows(cache, predictions.guids)
    assert [model.checkpoint.classes[number] for number in logits.argmax(axis=1)] == predictions.labels


@pytest.mark.usefixtures("kept_whatever")
def test_the_epochs_of_a_repeated_stage_2_are_those_of_the_whole_schedule(stage1, tmp_path):
    """Repeated on the rows of the run itself, the same rates in the same epochs give the same losses."""
    from mmcli.heads.runs.run_folder import read_schedules

    result = finetune(stage1(), LEARNS | {"epochs": 3}, options=FinetuneOptions(tmp_path / "runs"))
    with (Path(result.run) / "history.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file)]
    (schedule,) = read_schedules(load_checkpoint(result.best_pt))
    assert schedule == rates[: result.best_epoch]


@pytest.mark.usefixtures("kept_whatever")
def test_where_raw_pairs_and_backbone_were_moved_to_is_remembered(stage1, raw_sixty, tiny_clip, tmp_path):
    data, there = shutil.copytree(raw_sixty[0], tmp_path / "data"), shutil.copytree(tiny_clip, tmp_path / "clip")
    result = finetune(stage1(), LEARNS, options=FinetuneOptions(tmp_path / "runs", data=data, backbone=str(there)))
    for run in (result, train_full(result.best_pt, options=RunOptions(tmp_path / "full", jobs=1))):
        _, header = read_best_pt(run.best_pt)
        assert header["backbone"]["name"] == str(there)
        assert header["made_from"]["data"] == str(data)


@pytest.mark.usefixtures("kept_whatever")
def test_stage_2_trains_on_views_of_a_frozen_image_tower(tuned, sixty):
    """Views that are the image itself change nothing, others do; layers of the image tower see the image itself."""

    def with_views(noise, **settings):
        with h5py.File(sixty, "r+") as file:
            image = file["image"][:]
            random = np.random.default_rng(0).normal(size=(len(image), 2, image.shape[1]))
            if "image_views" in file:
                del file["image_views"]
            file["image_views"] = (image[:, None] + noise * random).astype(image.dtype)
        layers = open_best_pt(tuned(settings, views=True).best_pt).checkpoint.changed[0]
        return torch.cat([tensor.flatten() for tensor in layers.values()])

    plain = open_best_pt(tuned().best_pt).checkpoint.changed[0]
    plain = torch.cat([tensor.flatten() for tensor in plain.values()])
    assert torch.equal(with_views(0.0), plain)
    assert not torch.equal(with_views(0.3), plain)
    vision = {"unfreeze_text_layers": 0, "unfreeze_vision_layers": 1}
    assert torch.isfinite(with_views(0.3, **vision)).all()


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

    found = find_overfitting(history((1.0, 0.9), (0.8, 0.8), (0.6, 0.85), (0.5, 0.9)))
    assert found == Overfitting(since=2, val_loss=0.8, train_loss=0.8, val_loss_end=0.9, train_loss_end=0.5)
    assert find_overfitting(history((1.0, 0.9), (0.8, 0.8), (0.7, 0.805))) is None  # hardly a rise
    assert find_overfitting(history((0.5, 0.8), (0.6, 0.9))) is None  # both rise: that is another trouble
    assert find_overfitting(history((1.0, 0.9))) is None


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
        "Macro-F1 on training rows minus",
        "best.pt holds",
    ):
        assert text in out
    assert cli("evaluate", "--on", "test")[0] == 0
    code, _, err = cli("finetune", "--from", best_pt, "--unfreeze-text-layers", "7")
    assert (code, err.count("\n")) == (1, 1)
    assert "has 3 layers" in err
    assert cli("finetune", "--batch-size", "1")[0] == 2


@pytest.mark.usefixtures("kept_whatever")
def test_raw_pairs_are_predicted_after_the_folder_of_the_training_is_gone(stage1, raw_sixty, tmp_path):
    data = shutil.copytree(raw_sixty[0], tmp_path / "data")
    result = finetune(stage1(), LEARNS, options=FinetuneOptions(tmp_path / "runs", data=data))
    pair = (raw_sixty[0] / "7.jpg", (raw_sixty[0] / "7.txt").read_text())
    expected = Predictor.open(result.best_pt, device="cpu").predict(pairs=[pair]).probs
    moved = data.rename(tmp_path / "moved")
    assert np.array_equal(Predictor.open(result.best_pt, device="cpu").predict(pairs=[pair]).probs, expected)
    (states,) = tmp_path.glob("*.states")
    shutil.rmtree(states)
    with pytest.raises(DataError, match="no such folder or manifest"):
        train_full(result.best_pt, options=RunOptions(tmp_path / "full", jobs=1))
    assert not list((tmp_path / "full").glob("*/best.pt"))
    full = train_full(open_best_pt(result.best_pt, data=moved), options=RunOptions(tmp_path / "full", jobs=1))
    assert load_checkpoint(full.best_pt).made_from["data"] == str(moved)


@pytest.mark.usefixtures("kept_whatever")
@pytest.mark.parametrize(("modality", "frozen"), [("both", ("image",)), ("text", ())])
def test_a_tuned_tower_is_not_encoded_as_a_whole_as_well(tuned, raw_sixty, tmp_path, monkeypatch, modality, frozen):
    from mmcli.featurize import source, state_store

    best_pt = tuned({"unfreeze_text_layers": 1}, modality=modality).best_pt
    encoded = []

    def spy(original):
        def call(blocks, encoder, options, *others):
            encoded.append((options.towers, options.below))
            return original(blocks, encoder, options, *others)

        return call

    for module in (source, state_store):
        monkeypatch.setattr(module, "encode_blocks", spy(module.encode_blocks))
    pair = (raw_sixty[0] / "7.jpg", (raw_sixty[0] / "7.txt").read_text())
    Predictor.open(best_pt, cache=None, device="cpu").predict(pairs=[pair])
    assert encoded == [(frozen, 0), (("text",), 1)]


@pytest.mark.usefixtures("kept_whatever")
def test_a_pair_whose_states_are_not_finite_is_left_out_alone(tuned, raw_sixty, tmp_path, monkeypatch):
    from mmcli.featurize import encode

    model = open_best_pt(tuned().best_pt)
    folder = tmp_path / "new"
    folder.mkdir()
    for guid in range(5):
        shutil.copy(raw_sixty[0] / f"{guid}.jpg", folder / f"new-{guid}.jpg")
        (folder / f"new-{guid}.txt").write_text(f"word{guid} love tree")
    whole = Predictor.open(model, device="cpu").predict(data=folder)
    original = encode.is_sound
    calls = []

    def third_is_unsound(output, tower):
        sound = original(output, tower)
        if tower == "text" and "text_ids" in output:
            calls.append(output)
            return sound and len(calls) != 3
        return sound

    monkeypatch.setattr(encode, "is_sound", third_is_unsound)
    found = Predictor.open(model, device="cpu").predict(data=folder)
    assert len(calls) == 5
    (reject,) = found.rejects
    assert "not finite" in reject.reason
    kept = [whole.guids.index(guid) for guid in found.guids]
    assert len(kept) == 4
    np.testing.assert_allclose(found.probs, whole.probs[kept], atol=1e-5)


@pytest.mark.usefixtures("kept_whatever")
def test_options_that_mean_nothing_are_refused(stage1, tmp_path):
    best_pt = stage1()
    with pytest.raises(MmcliError, match="leave jobs out"):
        finetune(best_pt, options=FinetuneOptions(tmp_path / "runs", jobs=2))
    with pytest.raises(MmcliError, match="leave seeds out"):
        train_full(best_pt, options=RunOptions(tmp_path / "runs", seeds=2))
