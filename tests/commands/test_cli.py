"""The commands as a user types them, and what they say when the input is bad."""

import json

import pytest
import torch
from conftest import interrupt_at_third, write_pair


@pytest.fixture
def featurized(cli, pairs, tiny_clip):
    """Featurize 60 pairs into the default place; return the data folder and its labels."""
    folder, labels = pairs(60)
    code, out, err = cli("featurize", folder, "--labels", labels, "--backbone", tiny_clip)
    assert code == 0, err
    return folder, labels, out


def one_line(err):
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_the_whole_job_by_default_places(cli, featurized, tmp_path):
    folder, _, out = featurized
    assert "60 (60 labelled, 0 without a label)" in out
    assert "mmcli train-head --fusion concat" in out
    code, out, _ = cli("train-head", "--epochs", "3")
    assert code == 0
    assert "macro-F1" in out
    assert "test" in out
    code, out, _ = cli("evaluate", "--json")
    result = json.loads(out)
    of_rows = {"rows_gone", "labels_unknown", "labels_changed", "parts_without_rows", "duplicates_separated"}
    about = {"best_pt", "classes", "fusion", "modality", "labels_without_features"} | of_rows
    assert set(result) == about | {"val", "test"}
    assert result["rows_gone"] == {"val": 0, "test": 0}
    ids = tmp_path / "ids.txt"
    ids.write_text("guid,tag\n5,null\n2,null\n")
    code, out, _ = cli("predict", "--ids", ids, "--out", "submission.txt", "--probs")
    assert (code, "2 predictions" in out) == (0, True)
    header, first, second = (tmp_path / "submission.txt").read_text().splitlines()
    assert header == "guid,tag,negative,neutral,positive"
    assert (first.split(",")[0], second.split(",")[0]) == ("5", "2")
    code, out, _ = cli("predict", "--image", folder / "1.jpg", "--text", "a good day")
    assert code == 0
    assert out.split()[0] in ("negative", "neutral", "positive")
    code, out, _ = cli("predict", "--data", folder)
    assert len(out.splitlines()) == 61
    code, out, _ = cli("train-head", "--full", "--json")
    assert json.loads(out)["train"]["n"] == 60


def test_json_is_one_object_on_stdout(cli, featurized, tmp_path):
    folder, labels, _ = featurized
    _, out, _ = cli("train-head", "--modality", "text", "--epochs", "2", "--json")
    result = json.loads(out)
    assert {"run", "best_pt", "train", "val", "test", "seconds"} <= set(result)
    assert {"macro_f1", "accuracy", "per_class", "confusion", "macro_f1_ci"} <= set(result["val"])
    _, out, _ = cli("featurize", folder, "--labels", labels, "--backbone", result_backbone(cli), "--json")
    assert json.loads(out)["computed"] == 0
    _, out, _ = cli("predict", "--data", folder, "--json")
    assert len(json.loads(out)["predictions"]) == 60


def result_backbone(cli):
    _, out, _ = cli("cache", "info", "--json")
    return json.loads(out)["backbone"]["name"]


def test_cache_commands(cli, featurized, tmp_path):
    folder, _, _ = featurized
    code, out, _ = cli("cache", "info")
    assert (code, "utf-8 60" in out) == (0, True)
    code, out, _ = cli("cache", "verify", "--json")
    assert (code, json.loads(out)["sound"]) == (0, True)
    code, out, _ = cli("cache", "export", "--npy", "exported")
    assert code == 0
    assert (tmp_path / "exported" / "image.npy").is_file()
    (folder / "1.txt").write_text("changed")
    (folder / "2.jpg").unlink()
    code, out, err = cli("cache", "verify")
    assert code == 1
    assert "rows that do not agree" in one_line(err)
    shown = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert (shown["changed"], shown["gone"]) == (["1:", "1"], ["1:", "2"])


BAD = [
    (("featurize", "nowhere", "--backbone", "offline"), "no such folder or manifest"),
    (("featurize", "data", "--labels", "none.csv"), "no such file: "),
    (("featurize", "data", "--labels", "wrong.csv"), "expected the header guid,tag, found name,kind"),
    (("featurize", "data", "--labels", "twice.csv"), "guid '1' occurs twice, in lines 2 and 3"),
    (("featurize", "data", "--backbone", "./no-folder"), "no such backbone folder"),
    (("featurize", "data", "--backbone", "CLIP", "--out", "text.h5"), "not a readable HDF5 file"),
    (("featurize", "data", "--backbone", "CLIP", "--no-clean-text"), "text.cleaning (--no-clean-text): 2, not 0"),
    (
        ("featurize", "data", "--backbone", "CLIP", "--dtype", "float32", "--resize", "70"),
        "resize (--resize): absent, not 70",
    ),
    (("featurize", "data", "--backbone", "CLIP", "--out", "data"), "data is a folder: give --out a file"),
    (("featurize", "data", "--backbone", "CLIP", "--out", "text.h5/f.h5"), "a file is in its place"),
    (("train-head", "--cache", "none.h5"), "no feature cache at none.h5"),
    (("train-head", "--cache", "text.h5"), "not a readable HDF5 file"),
    (("train-head", "--labels", "foreign.csv"), "none of the 1 labels"),
    (("train-head", "--labels", "lone.csv"), "two classes with at least 10 rows each are needed"),
    (("train-head", "--fusion", "magic"), "unknown fusion 'magic'"),
    (("train-head", "--split-dir", "nowhere"), "no such file: nowhere/train_split.csv"),
    (("train-head", "--full", "--from", "none.pt"), "no such checkpoint: none.pt"),
    (("evaluate", "--from", "none.pt"), "no such checkpoint: none.pt"),
    (("evaluate", "--from", "code.pt"), "could run code"),
    (("predict", "--from", "text.h5", "--ids", "twice.csv"), "not a best.pt of mmcli, or is damaged"),
    (("cache", "info", "none.h5"), "no feature cache at none.h5"),
]


def test_bad_input_is_one_clear_line_and_exit_code_1(cli, featurized, tiny_clip, tmp_path):
    labels = featurized[1].read_text().splitlines()
    files = {
        "wrong.csv": "name,kind\n1,a\n",
        "twice.csv": "guid,tag\n1,a\n1,b\n",
        "foreign.csv": "guid,tag\n999,a\n",
        "text.h5": "this is text",
    }
    rare = [line for line in labels if line.endswith(("neutral", "negative"))]
    files["lone.csv"] = "\n".join([line for line in labels if line not in rare] + rare[:3])
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    torch.save({"x": CodeInside()}, tmp_path / "code.pt")
    before = (tmp_path / "artifacts" / "features.h5").read_bytes()
    for arguments, words in BAD:
        code, out, err = cli(*(str(tiny_clip) if word == "CLIP" else word for word in arguments))
        assert code == 1, (arguments, out, err)
        assert words in one_line(err), arguments
        assert out == ""
    assert (tmp_path / "artifacts" / "features.h5").read_bytes() == before


class CodeInside:
    pass


@pytest.mark.parametrize(
    "arguments",
    [
        ("train-head", "--epochs", "0"),
        ("train-head", "--modality", "smell"),
        ("train-head", "--full", "--lr", "0.1"),
        ("train-head", "--from", "x.pt"),
        ("train-head", "--max-memory", "0"),
        ("predict",),
        ("predict", "--image", "a.jpg"),
        ("predict", "--image", "a.jpg", "--text", "a", "--ids", "b"),
        ("cache", "export"),
        ("featurize",),
        ("fly",),
    ],
)
def test_usage_errors_exit_with_2(cli, arguments):
    code, out, err = cli(*arguments)
    assert code == 2
    assert out == ""
    assert "Usage" in err or "usage" in err


def test_an_interrupt_keeps_what_is_done_and_exits_with_130(cli, pairs, tiny_clip, monkeypatch, tmp_path):
    from mmcli.featurize import pipeline, plan

    folder, _ = pairs(20)
    monkeypatch.setattr(plan, "BLOCK_ROWS", 5)
    restore = interrupt_at_third(monkeypatch, pipeline, "write_part")
    code, _, err = cli("featurize", folder, "--backbone", tiny_clip)
    assert code == 130
    assert "run the same command again" in err
    restore()
    code, out, _ = cli("featurize", folder, "--backbone", tiny_clip, "--json")
    assert (json.loads(out)["resumed"], json.loads(out)["computed"]) == (10, 10)


def test_a_corrupt_pair_is_counted_and_listed(cli, pairs, tiny_clip, tmp_path):
    folder, labels = pairs(40)
    (folder / "7.jpg").write_bytes(b"broken")
    code, out, _ = cli("featurize", folder, "--labels", labels, "--backbone", tiny_clip)
    assert code == 0
    assert "features.h5.rejects.csv" in out
    assert "7,not an image," in (tmp_path / "artifacts" / "features.h5.rejects.csv").read_text()
    code, _, err = cli("train-head", "--epochs", "1")
    assert (code, "note: 1 labels belong to pairs without features" in err) == (0, True)


def test_labels_of_rows_that_the_run_has_seen_are_not_new(cli, featurized, tmp_path):
    assert cli("train-head", "--epochs", "1")[0] == 0
    write_pair(featurized[0], 61)
    (tmp_path / "new.csv").write_text("guid,tag\n3,furious\n")
    code, _, err = cli("evaluate", "--on", "new", "--labels", "new.csv")
    assert code == 1
    assert "has no new row" in one_line(err)


def test_a_single_head_tells_its_epochs_and_what_memory_cannot_be_kept(cli, featurized):
    code, _, err = cli("train-head", "--epochs", "3", "--max-memory", "300MB")
    assert code == 0
    assert "train: 0/3 epochs" in err
    assert "train: 3/3 epochs" in err
    assert "--max-memory 300MB cannot be kept: a process takes about 700 MB by itself" in err
    assert "epochs" not in cli("train-head", "--head", "linear")[2]


def test_where_featurize_was_interrupted_that_is_said(cli, pairs, tiny_clip, tmp_path):
    (tmp_path / "f.h5.parts").mkdir()
    code, _, err = cli("train-head", "--cache", "f.h5")
    assert code == 1
    assert "beside it what an interrupted `mmcli featurize` had finished: run the same command again" in one_line(err)


def test_recorded_labels_that_are_of_other_data_are_said_to_be_so(cli, featurized, pairs, tiny_clip):
    other, _ = pairs(3, "other")
    for path in sorted(other.iterdir()):
        path.rename(path.with_name(f"z{path.name}"))
    code, _, err = cli("featurize", other, "--backbone", tiny_clip)
    assert code == 1
    assert "records this labels file" in one_line(err)
    assert "give --labels for " in one_line(err)
