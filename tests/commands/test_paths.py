"""A path where something else is expected: one line that says what was expected, whatever command and option."""

import subprocess
import sys
from pathlib import Path

import pytest

KINDS = ("current", "root", "folder", "text", "empty", "dangling", "none", "cache", "best_pt")

# Command, option, and the kinds of path that it takes. DATA stands for the argument of the command.
INPUTS = [
    (("featurize", "PATH", "--backbone", "offline", "--out", "new.h5"), ()),
    (("featurize", "data", "--labels", "PATH", "--backbone", "offline", "--out", "new.h5"), ()),
    (("featurize", "data", "--backbone", "./PATH", "--out", "new.h5"), ()),
    (("cache", "info", "PATH"), ("cache",)),
    (("cache", "verify", "PATH"), ()),
    (("cache", "verify", "f.h5", "--data", "PATH"), ("current",)),  # holds a text, so it is a folder of pairs
    (("cache", "export", "PATH", "--npy", "out"), ("cache",)),
    (("train-head", "--cache", "PATH", "--labels", "l.csv", "--fusion", "none"), ()),
    (("train-head", "--cache", "f.h5", "--labels", "PATH"), ()),
    (("train-head", "--cache", "f.h5", "--labels", "l.csv", "--split-dir", "PATH"), ()),
    (("train-head", "--full", "--from", "PATH", "--labels", "nowhere"), ()),
    (("evaluate", "--from", "PATH", "--on", "new"), ()),
    (("evaluate", "--from", "run", "--cache", "PATH", "--labels", "l.csv"), ("cache",)),
    (("evaluate", "--from", "run", "--labels", "PATH"), ()),
    (("predict", "--from", "PATH", "--ids", "ids.csv"), ("best_pt",)),
    (("predict", "--from", "run", "--ids", "PATH"), ()),
    (("predict", "--from", "run", "--data", "PATH"), ()),
    (("predict", "--from", "run", "--image", "PATH", "--text", "x"), ()),
    (("predict", "--from", "run", "--ids", "ids.csv", "--cache", "PATH"), ("cache",)),
    (("predict", "--from", "run", "--image", "data/1.jpg", "--text", "x", "--backbone", "./PATH"), ()),
    (("finetune", "--from", "PATH", "--labels", "nowhere"), ()),
    (("finetune", "--from", "run", "--cache", "PATH", "--labels", "nowhere"), ()),
    (("compare", "--cache", "PATH", "--labels", "nowhere"), ()),
    (("compare", "--cache", "f.h5", "--labels", "PATH"), ()),
    (("compare", "--cache", "f.h5", "--labels", "l.csv", "--split-dir", "PATH", "--single-split"), ()),
    (("ablate", "--cache", "PATH", "--labels", "nowhere"), ()),
    (("sweep", "--cache", "PATH", "--labels", "nowhere", "--grid", "lr=1e-3"), ()),
    (("fusions", "--cache", "PATH"), ("cache",)),
]
OUTPUTS = [  # what is there already and must stay
    (("featurize", "data", "--backbone", "CLIP", "--out", "PATH"), ("current", "root", "folder", "text", "best_pt")),
    (("train-head", "--cache", "f.h5", "--labels", "l.csv", "--runs", "PATH"), ("text", "cache", "best_pt", "empty")),
    (("finetune", "--from", "run", "--runs", "PATH"), ("text", "cache", "best_pt", "empty")),
    (("compare", "--cache", "f.h5", "--labels", "l.csv", "--out", "PATH"), ("text", "cache", "best_pt", "empty")),
    (("predict", "--from", "run", "--ids", "ids.csv", "--out", "PATH"), (*KINDS[:4], "cache", "best_pt")),
    (("cache", "export", "f.h5", "--npy", "PATH"), ("text", "cache", "best_pt", "empty")),
    (("cache", "export", "f.h5", "--parquet", "PATH"), (*KINDS[:4], "cache", "best_pt")),
    (("demo", "--out", "PATH"), ("text", "cache", "best_pt", "empty")),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_clip):
    """A folder with a cache, labels, a run, pairs, and one path of each kind."""
    from conftest import synthetic_block, write_cache, write_pair
    from mmcli.heads import Recipe, RunOptions, train_head

    folder = tmp_path_factory.mktemp("place")
    write_cache(folder / "f.h5", synthetic_block([str(guid) for guid in range(60)]))
    (folder / "l.csv").write_text("guid,tag\n" + "".join(f"{guid},{'abc'[guid % 3]}\n" for guid in range(60)))
    (folder / "ids.csv").write_text("guid\n3\n")
    write_pair(folder / "data", 1)
    run = train_head(
        folder / "f.h5", folder / "l.csv", Recipe(epochs=1, hidden=(4,)), options=RunOptions(folder / "runs")
    ).run
    (folder / "run").symlink_to(run)
    (folder / "a_folder").mkdir()
    (folder / "text.txt").write_text("this is text")
    (folder / "empty").write_text("")
    (folder / "dangling").symlink_to("nothing")
    return folder


PLACES = {
    "current": ".", "root": "/", "folder": "a_folder", "text": "text.txt", "empty": "empty", "dangling": "dangling",
    "none": "none", "cache": "f.h5", "best_pt": "run/best.pt",
}  # fmt: skip


def refused(cli, arguments, kind, tiny_clip):
    path = {"current": ".", "root": "/"}.get(kind, PLACES[kind])
    words = [str(tiny_clip) if word == "CLIP" else word.replace("./PATH", f"./{path}").replace("PATH", path)
             for word in arguments]  # fmt: skip
    code, out, err = cli(*words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, len(lines), out) == (1, 1, ""), (words, code, err, out)
    assert "Traceback" not in err
    assert len(lines[0]) > 20
    return lines[0]


@pytest.mark.parametrize("number", range(len(INPUTS)), ids=lambda number: " ".join(INPUTS[number][0]))
def test_an_input_that_is_something_else(cli, monkeypatch, place, tiny_clip, number):
    arguments, taken = INPUTS[number]
    monkeypatch.chdir(place)
    for kind in KINDS:
        if kind not in taken:
            refused(cli, arguments, kind, tiny_clip)
    assert not (place / "new.h5").exists()


@pytest.mark.parametrize("number", range(len(OUTPUTS)), ids=lambda number: " ".join(OUTPUTS[number][0]))
def test_an_output_where_something_else_is(cli, monkeypatch, place, tiny_clip, number):
    arguments, kinds = OUTPUTS[number]
    monkeypatch.chdir(place)
    before = {kind: Path(place, PLACES[kind]).read_bytes() for kind in ("text", "cache", "best_pt", "empty")}
    for kind in kinds:
        refused(cli, arguments, kind, tiny_clip)
    assert before == {kind: Path(place, PLACES[kind]).read_bytes() for kind in before}


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--from", "run", "--image", "nope.jpg", "--text", "x"],
        ["predict", "--from", "run", "--ids", "nope.csv"],
        ["predict", "--from", "run", "--data", "nope"],
        ["predict", "--from", "nope", "--ids", "ids.csv"],
        ["evaluate", "--from", "nope"],
        ["finetune", "--from", "nope"],
        ["train-head"],
        ["train-head", "--cache", "f.h5", "--labels", "nope"],
        ["train-head", "--full"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_before_torch_is_imported(place, words):
    code = (
        "import sys\nsys.modules['torch'] = None\nsys.argv = ['mmcli', *sys.argv[1:]]\n"
        "from mmcli.cli import main\nmain()\n"
    )
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no ")


def test_a_demo_leaves_a_users_files_alone(tmp_path):
    from mmcli.cache import DataError
    from mmcli.featurize.pairs.sample import make_sample

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "1.jpg").write_text("a picture of value")
    with pytest.raises(DataError, match="exists and is not from a demo"):
        make_sample(tmp_path, 3)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "1.jpg"]
    (tmp_path / "data" / "1.jpg").unlink()
    (tmp_path / "labels.csv").write_text("guid,tag\n1,mine\n")
    with pytest.raises(DataError, match=r"labels.csv exists and is not from a demo"):
        make_sample(tmp_path, 3)
    assert (tmp_path / "labels.csv").read_text() == "guid,tag\n1,mine\n"
    (tmp_path / "labels.csv").unlink()
    make_sample(tmp_path, 3)
    first = (tmp_path / "data" / "1.jpg").read_bytes()
    make_sample(tmp_path, 5, seed=1)  # the earlier demo's own files are written again
    assert (tmp_path / "data" / "1.jpg").read_bytes() != first
