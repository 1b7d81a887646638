"""A best.pt, or the progress of stage 2, that is not what was written is never used, and takes no memory."""

import io
import json
import zipfile
from pathlib import Path
from random import Random

import pytest
import torch
from mmcli.cache import CheckpointError
from mmcli.heads import Recipe, RunOptions, evaluate, load_checkpoint, predict, train_head
from mmcli.heads.runs.fit_store import FitStore
from mmcli.heads.runs.tensor_file import TensorFileError, read_tensor_file, write_tensor_file


@pytest.fixture
def best_pt(learnable, tmp_path):
    path, labels = learnable
    recipe = Recipe(epochs=2, hidden=(8,))
    return train_head(path, labels, recipe, options=RunOptions(tmp_path / "runs", seeds=2, jobs=1)).best_pt


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("seed", range(4))
def test_a_flipped_bit_or_byte_is_refused_or_changes_nothing(tmp_path, seed):
    path, random = tmp_path / "x.pt", Random(seed)
    content = {"format": "x", "header": "{}", "tensors": {"a": torch.arange(600.0), "b": torch.ones(3)}}
    write_tensor_file(path, content)
    whole = path.read_bytes()
    refused = 0
    for _ in range(150):
        place = random.randrange(len(whole))
        flipped = whole[place] ^ (1 << random.randrange(8)) if seed % 2 else random.randrange(256)
        path.write_bytes(whole[:place] + bytes([flipped]) + whole[place + 1 :])
        try:
            assert same(read_tensor_file(path), content), place
        except TensorFileError:
            refused += 1
    assert refused > 75


def test_a_flipped_bit_of_a_weight_is_refused_by_every_command(best_pt, learnable, tmp_path, cli):
    weights = load_checkpoint(best_pt).head.state_dict()["heads.1.mlps.0.0.weight"].numpy().tobytes()
    whole = Path(best_pt).read_bytes()
    assert whole.count(weights) == 1
    place = whole.index(weights) + 5
    Path(best_pt).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    (tmp_path / "ids.csv").write_text("guid\n1\n")
    for words in (["evaluate"], ["predict", "--ids", "ids.csv"], ["train-head", "--full"], ["finetune"]):
        code, out, err = cli(*words, "--from", best_pt)
        assert (code, out, err.count("\n")) == (1, "", 1), err
        assert "is damaged: the checksum of" in err


def test_a_kept_fit_with_a_flipped_bit_counts_as_none(tmp_path):
    store = FitStore(tmp_path)
    store.keep("a", {"weights": torch.arange(300.0), "history": [{}]})
    assert torch.equal(store.load("a")["weights"], torch.arange(300.0))
    whole = (tmp_path / "a.pt").read_bytes()
    place = whole.index(torch.arange(300.0).numpy().tobytes()) + 100
    (tmp_path / "a.pt").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert store.load("a") is None


def rewritten(best_pt, path, change):
    content = torch.load(best_pt, weights_only=True)
    header = json.loads(content["header"])
    header = change(content, header) or header
    torch.save(content | {"header": json.dumps(header)}, path)
    return path


def put(*names, value):
    def change(content, header):
        place = header
        for name in names[:-1]:
            place = place[name]
        place[names[-1]] = value

    return change


def tensor(name, make):
    def change(content, header):
        content["tensors"][name] = make(content["tensors"][name])

    return change


def many_seeds(content, header):
    header["seeds"] = header["best_epochs"] = list(range(100_000))


def no_tensors(content, header):
    content["tensors"] = []


WEIGHT = "heads.0.mlps.0.0.weight"
WRONG = {
    "backbone is text": (put("backbone", value="clip"), "content does not fit"),
    "no backbone": (put("backbone", "name", value=None), "backbone.name cannot be 'None'"),
    "identity is a list": (put("identity", value=[]), "content does not fit"),
    "resize is text": (put("identity", "image", value={"resize": "big"}), "identity.image.resize"),
    "made_from is a list": (put("made_from", value=[1]), "content does not fit"),
    "labels are a number": (put("made_from", "labels", value=5), "made_from.labels cannot be '5'"),
    "a guid is a number": (put("split", "train", value=[5]), "train is no list of names"),
    "the split is text": (put("split", value="all"), "content does not fit"),
    "the header is a list": (lambda content, header: [header], "the header is no object"),
    "a class twice": (put("classes", value=["a", "a", "b"]), "classes are missing or given twice"),
    "classes are numbers": (put("classes", value=[1, 2, 3]), "classes is no list of names"),
    "another class": (put("classes", value=["a", "b", "c", "d"]), r"is .*3.*, not .*4"),
    "a seed is text": (put("seeds", value=["a", "b"]), "seeds is no list of whole numbers"),
    "many seeds": (many_seeds, "the numbers of heads and of seeds differ"),
    "huge": (put("sizes", "image", value=10**12), r"heads.0.*is .*, not .*1000000000000"),
    "beyond any number": (put("sizes", "image", value=10**40), "content does not fit"),
    "negative": (put("sizes", "image", value=-5), "content does not fit"),
    "nested": (put("recipe", value={}), "content does not fit"),
    "no tensors": (no_tensors, "content does not fit"),
    "a shape": (tensor(WEIGHT, lambda old: old[:, :-1].clone()), rf"{WEIGHT} is 8 x 31 float32, not 8 x 32 float32"),
    "a type": (tensor(WEIGHT, torch.Tensor.double), rf"{WEIGHT} is 8 x 32 float64, not 8 x 32 float32"),
    "nan": (tensor(WEIGHT, lambda old: old * float("nan")), f"{WEIGHT} holds numbers that are not finite"),
    "repeated": (tensor(WEIGHT, lambda old: torch.ones(1).expand(8, 32)), f"{WEIGHT} repeats its numbers"),
    "text": (tensor(WEIGHT, lambda old: "x"), f"{WEIGHT} is no tensor"),
}


@pytest.mark.parametrize("name", WRONG)
def test_content_that_does_not_fit_is_one_error_that_names_it(best_pt, tmp_path, name):
    change, words = WRONG[name]
    path = rewritten(best_pt, tmp_path / "x.pt", change)
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(path)


def test_a_missing_and_an_unknown_tensor_are_named(best_pt, tmp_path):
    def missing(content, header):
        del content["tensors"][WEIGHT]

    def unknown(content, header):
        content["tensors"]["heads.0.other"] = torch.zeros(1)

    with pytest.raises(CheckpointError, match=f"{WEIGHT} is missing"):
        load_checkpoint(rewritten(best_pt, tmp_path / "x.pt", missing))
    with pytest.raises(CheckpointError, match=r"heads.0.other is unknown"):
        load_checkpoint(rewritten(best_pt, tmp_path / "x.pt", unknown))


def test_what_would_inflate_is_not_read(best_pt, tmp_path):
    with zipfile.ZipFile(best_pt) as old, zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.namelist():
            new.writestr(record, old.read(record))
    with pytest.raises(CheckpointError, match="it is compressed"):
        load_checkpoint(tmp_path / "x.pt")
    many = io.BytesIO()
    with zipfile.ZipFile(many, "w") as archive:
        archive.writestr("a", bytes(10_000))
    claimed = many.getvalue().replace((10_000).to_bytes(4, "little"), (3 * 10**9).to_bytes(4, "little"))
    (tmp_path / "x.pt").write_bytes(claimed)
    with pytest.raises(CheckpointError, match="records are larger than the file"):
        load_checkpoint(tmp_path / "x.pt")


def test_scores_that_are_not_finite_are_no_prediction(best_pt, learnable, tmp_path):
    """Finite weights can be too large for the numbers that they meet."""
    path = rewritten(best_pt, tmp_path / "x.pt", tensor(WEIGHT, lambda old: torch.full_like(old, 3e38)))
    (tmp_path / "ids.csv").write_text("guid\n3\n5\n")
    with pytest.raises(CheckpointError, match="scores that are not finite, the first is '3'"):
        predict(path, ids=tmp_path / "ids.csv")
    with pytest.raises(CheckpointError, match="scores that are not finite"):
        evaluate(path)


def test_a_loaded_head_says_what_the_trained_head_said_and_leaves_the_generator_alone(best_pt):
    before = torch.get_rng_state()
    again = load_checkpoint(best_pt)
    assert torch.equal(before, torch.get_rng_state())
    assert all(each.device.type == "cpu" for each in again.head.state_dict().values())
    assert all(each.requires_grad for each in again.head.parameters())
