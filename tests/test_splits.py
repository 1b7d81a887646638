import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.cache import DataError
from mmcli.heads import Split, read_split, stratified_split, write_split
from mmcli.heads.splits import stratified_draw
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


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=4, max_size=200), st.integers(0, 2**32 - 1), st.integers(1, 199))
def test_a_draw_equals_that_of_scikit_learn(classes, seed, count):
    classes = np.unique(classes, return_inverse=True)[1]
    count = min(count, len(classes) - 1)
    found = stratified_draw(classes, count, seed)
    try:
        theirs = train_test_split(np.arange(len(classes)), train_size=count, random_state=seed, stratify=classes)
    except ValueError:
        assert found is None
        return
    assert all(np.array_equal(one, two) for one, two in zip(found, theirs, strict=True))


@pytest.mark.parametrize("count", [*range(40, 61), 4111])
def test_the_parts_have_the_sizes_of_scikit_learn(count):
    guids, tags = [str(each) for each in range(count)], ["ab"[each % 3 == 0] for each in range(count)]
    train, rest, _, rest_tags = train_test_split(guids, tags, train_size=0.8, random_state=1, stratify=tags)
    val, test = train_test_split(rest, test_size=0.5, random_state=1, stratify=rest_tags)
    split = stratified_split(guids, tags, 1)
    assert (split.train, split.val, split.test) == (train, val, test)


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
