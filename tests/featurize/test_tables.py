"""From a table as people have it to predictions, without reshaping it: a product list with two texts per row."""

import csv
import json
import shutil

import pytest
from mmcli.cache import FeatureCache
from mmcli.featurize import Dataset

HEADER = ["id", "picture", "title", "description", "category", "price"]


@pytest.fixture
def products(raw_sixty, tmp_path):
    """Return a table with labels and one without, whose images lie in subfolders of another folder."""
    data, labels = raw_sixty
    tags = dict(line.split(",") for line in labels.read_text().splitlines()[1:])
    rows = []
    for guid, tag in tags.items():
        folder = tmp_path / "images" / tag
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / f"{guid}.jpg", folder / f"p{guid}.jpg")
        words = (data / f"{guid}.txt").read_text().split()
        rows.append([guid, f"{tag}\\p{guid}.jpg", words[0] if int(guid) % 3 else "", " ".join(words[1:]), tag, "3,50"])
    tables = tmp_path / "train.csv", tmp_path / "test.tsv"
    for path, chosen, width, delimiter in ((tables[0], rows[:50], 6, ";"), (tables[1], rows[50:], 4, "\t")):
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter=delimiter).writerows(row[:width] for row in [HEADER, *chosen])
    return *tables, tmp_path / "images"


def test_a_product_table_needs_no_reshaping(products, tiny_clip, tmp_path, cli):
    train, test, images = products
    columns = "image=picture,text=title+description"
    code, out, err = cli(
        "featurize", train, "--columns", columns, "--image-root", images, "--backbone", tiny_clip, "--out", "f.h5"
    )
    assert code == 0, err
    assert "columns: guid=id, image=picture, text=title+description, label=category; not used: price" in err
    assert f"first row: '0', image {images / 'negative' / 'p0.jpg'}, text " in err
    assert "50 rows; labels: negative 17, neutral 17, positive 16; 0 without a label, 0 with an empty text" in err
    assert "50 (50 labelled, 0 without a label)" in out
    code, out, err = cli("featurize", train, "--out", "f.h5", "--json")  # columns and images are those of the cache
    assert (code, json.loads(out)["unchanged"]) == (0, 50), err
    with FeatureCache.open(tmp_path / "f.h5") as cache:
        recorded = Dataset.recorded(cache.header.dataset, labels=True)
    assert (len(recorded.pairs), recorded.image_root) == (50, images)
    code, out, err = cli("cache", "verify", "f.h5", "--json")
    assert (code, json.loads(out)["sound"]) == (0, True), err
    shared = ("--cache", "f.h5", "--epochs", "1", "--hidden", "4", "--jobs", "1")
    code, _, err = cli("train-head", *shared, "--no-group-duplicates")
    assert code == 0, err
    code, out, err = cli("predict", "--ids", train, "--device", "cpu")
    assert (code, len(out.splitlines())) == (0, 51), err
    code, out, err = cli("predict", "--data", test, "--device", "cpu")  # new rows, read as those of the cache
    assert (code, [line.split(",")[0] for line in out.splitlines()[1:]]) == (0, [str(n) for n in range(50, 60)]), err


def test_a_column_that_is_not_there_stops_before_anything_is_written(products, tiny_clip, tmp_path, cli):
    train, _, _ = products
    code, _, err = cli("featurize", train, "--columns", "text=words", "--backbone", tiny_clip, "--out", "f.h5")
    assert code == 1
    assert "has no column 'words' for the text: it has id, picture, title, description, category, price" in err
    assert not (tmp_path / "f.h5").exists()
    code, _, err = cli("featurize", train, "--columns", "words", "--backbone", tiny_clip, "--out", "f.h5")
    assert (code, "write name=column" in err) == (1, True)
