"""What stage 2 refuses: settings that cannot be, files that do not fit, a best.pt from a stranger."""

import json
from pathlib import Path

import pytest
import torch
from mmcli.cache import BackboneError, CacheError, CheckpointError, DataError, MmcliError
from mmcli.finetune import FinetuneOptions, finetune
from mmcli.heads import RunOptions, evaluate, open_best_pt
from small_finetune import QUICK, read_best_pt


def test_best_pt_missing_or_of_another_dataset(stage1, learnable, tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        finetune(tmp_path / "nothing.pt", options=FinetuneOptions(tmp_path / "runs"))
    best_pt = stage1()
    with pytest.raises(CheckpointError, match="this head was trained on features of"):
        finetune(best_pt, cache_path=learnable[0], options=FinetuneOptions(tmp_path / "runs"))
    labels = tmp_path / "others.csv"
    labels.write_text("guid,tag\n1,neutral\n2,positive\n")
    with pytest.raises(DataError, match=r"none of the \d+ \w+ rows has a label and features here"):
        finetune(best_pt, labels_path=labels, options=FinetuneOptions(tmp_path / "runs"))


def test_the_cache_or_the_backbone_is_not_at_hand(stage1, sixty, tmp_path):
    best_pt = stage1()
    with pytest.raises(BackboneError, match="no such backbone folder"):
        finetune(best_pt, options=FinetuneOptions(tmp_path / "runs", backbone=str(tmp_path / "gone")))
    Path(sixty).unlink()
    with pytest.raises(CacheError, match="no feature cache at"):
        finetune(best_pt, options=FinetuneOptions(tmp_path / "runs"))


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ({}, {"unfreeze_text_layers": 9}, "cannot unfreeze 9 layers: the text tower of this backbone has 3 layers"),
        ({}, {"unfreeze_text_layers": 0}, "no layer is unfrozen"),
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
        finetune(stage1(**recipe), QUICK | settings, options=FinetuneOptions(tmp_path / "runs"))
    assert not [path for path in (tmp_path / "runs").iterdir() if path.name.endswith("-finetune")]


def test_a_head_of_all_rows_has_none_to_stop_by(stage1, tmp_path):
    from mmcli.heads import train_full

    full = train_full(stage1(), options=RunOptions(tmp_path / "full"))
    with pytest.raises(CheckpointError, match="was trained on all rows"):
        finetune(full.best_pt, options=FinetuneOptions(tmp_path / "runs"))


def _tampered(best_pt, path, change):
    content, header = read_best_pt(best_pt)
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
    header["recipe"]["finetune"]["unfreeze_text_layers"] = 0


def _half_a_layer(content, header):
    header["recipe"]["finetune"]["unfreeze_text_layers"] = 1.5


def _other_layers(content, header):
    header["recipe"]["finetune"]["unfreeze_text_layers"] = 2


@pytest.mark.usefixtures("kept_whatever")
def test_a_best_pt_from_a_stranger(tuned, cli, tmp_path):
    best_pt = tuned().best_pt
    ways = (_shape, _name, _nan, _text, _tensor, _too_few, _no_layers, _half_a_layer, _other_layers)
    for number, change in enumerate(ways):
        code, _, err = cli(
            "evaluate", "--from", _tampered(best_pt, tmp_path / f"{number}.pt", change), "--device", "cpu"
        )
        assert (code, err.count("\n"), err[:6]) == (1, 1, "error:"), f"{change.__name__}: {err}"


@pytest.mark.usefixtures("kept_whatever")
def test_layers_of_one_head_that_do_not_fit_are_an_error_every_time(tuned, tmp_path):
    """The first head's layers fit, and must not make a second try believe that all are attached."""
    content = torch.load(tuned(seeds=2).best_pt, weights_only=True)
    content["changed"][1]["text_model.something"] = content["changed"][1].pop("text_model.final_layer_norm.bias")
    torch.save(content, tmp_path / "best.pt")
    model = open_best_pt(tmp_path / "best.pt")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="do not fit"):
            evaluate(model)


def test_options_that_stage_1_has_no_use_for(cli, stage1, tmp_path):
    best_pt = stage1()
    code, _, err = cli("evaluate", "--from", best_pt, "--backbone", "somewhere")
    assert (code, "--backbone has no effect" in err) == (2, True)
    code, _, err = cli("finetune", "--from", best_pt, "--unfreeze-text-layers=-1")
    assert (code, "it is a number of layers, or all" in err) == (1, True)
