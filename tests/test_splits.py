import numpy as np
import pytest
from mmcli.cache import DataError
from mmcli.heads import Split, read_split, stratified_split, write_split
from sklearn.model_selection import train_test_split


def synthetic(n=4000):
    random = np.random.default_rng(7)
    tags = random.choice(["negative", "neutral", "positive"], n, p=[0.3, 0.1, 0.6]).tolist()
    return random.permutation(9000)[:n].astype(str).tolist(), tags


def test_the_split_equals_two_calls_of_scikit_learn_row_by_row():
    guids, tags = synthetic()
    train, rest, _, rest_tags = train_test_split(guids, tags, train_size=0.8, random_state=42, stratify=tags)
    val, test = train_test_split(rest, test_size=0.5, random_state=42, stratify=rest_tags)
    split = stratified_split(guids, tags)
    assert (split.train, split.val, split.test) == (train, val, test)
    assert [len(part) for part in split.named().values()] == [3200, 400, 400]


def test_written_splits_are_read_again(tmp_path):
    guids, tags = synthetic(200)
    labels = dict(zip(guids, tags, strict=True))
    split = stratified_split(guids, tags)
    write_split(tmp_path, split, labels)
    assert (tmp_path / "val_split.csv").read_text().startswith(f"guid,tag\n{split.val[0]},{labels[split.val[0]]}\n")
    assert read_split(tmp_path, labels) == split


def test_bad_split_folders(tmp_path):
    labels = {str(guid): "ab"[guid % 2] for guid in range(12)}
    good = Split(["0", "1", "2", "3"], ["4", "5"], ["6", "7"])

    def refused(split, known, words):
        write_split(tmp_path, split, labels)
        with pytest.raises(DataError, match=words):
            read_split(tmp_path, known)

    refused(Split(["0", "1"], ["1", "2"], ["3", "4"]), labels, "guid '1' is in two parts.*train and val")
    refused(good, {guid: tag for guid, tag in labels.items() if guid != "5"}, "names guid '5', which has no label")
    refused(good, labels | {"7": "a"}, "says that '7' is 'b', the labels file says 'a'")
    refused(Split(["0", "1"], ["2", "4"], ["6", "7"]), labels, "class 'b' has no row in the val part")
    (tmp_path / "test_split.csv").unlink()
    with pytest.raises(DataError, match=r"no such file.*test_split.csv"):
        read_split(tmp_path, labels)


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (["a"] * 50, "two classes are needed"),
        (["a"] * 50 + ["b"], "class 'b' has 1"),
        (["a"] * 50 + ["b"] * 3, "class 'b'"),
        (["a", "b"], "class"),
    ],
)
def test_classes_too_small_to_split_are_named(tags, words):
    with pytest.raises(DataError, match=words):
        stratified_split([str(guid) for guid in range(len(tags))], tags)
