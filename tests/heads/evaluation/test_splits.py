import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.cache import DataError
from mmcli.heads import Split, read_split, stratified_split, write_split
from mmcli.heads.evaluation.folds import split_rows
from mmcli.heads.evaluation.splits import SplitOptions, divide
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
    assert read_split(tmp_path) == {name: {guid: labels[guid] for guid in part} for name, part in split.named().items()}


def test_a_guid_in_two_parts_and_a_part_that_is_missing_are_errors(tmp_path):
    labels = {str(guid): "ab"[guid % 2] for guid in range(12)}
    write_split(tmp_path, Split(["0", "1"], ["1", "2"], ["3", "4"]), labels)
    with pytest.raises(DataError, match=r"guid '1' is in two parts.*train and val"):
        read_split(tmp_path)
    (tmp_path / "val_split.csv").unlink()
    with pytest.raises(DataError, match=r"no such file.*val_split.csv; a split folder holds .*guid,tag"):
        read_split(tmp_path)


@pytest.mark.parametrize("test_part", [None, "guid,tag\n", "guid,tag\n8,\n9,null\n"])
def test_the_test_part_may_be_absent_empty_or_unlabelled(tmp_path, test_part):
    labels = {str(guid): "ab"[guid % 2] for guid in range(8)}
    write_split(tmp_path, Split(list(labels)[:4], list(labels)[4:], []), labels)
    (tmp_path / "test_split.csv").unlink()
    if test_part is not None:
        (tmp_path / "test_split.csv").write_text(test_part)
    assert read_split(tmp_path)["test"] == ({"8": None, "9": None} if "8" in (test_part or "") else {})


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        (["a"] * 50, "all 50 labelled pairs are 'a': two classes are needed"),
        (["a"] * 50 + ["b"], r"two classes with at least 10 rows each are needed .*class 'b' has 1; label more"),
        (["a"] * 50 + ["b"] * 3, "class 'b' has 3"),
        (["a", "b"], r"class 'a' has 1, 'b' has 1"),
        (["a"] * 50 + ["b"] * 50 + ["c"] * 3, "class 'c' has 3 rows, and 10 are needed"),
    ],
)
def test_classes_too_small_to_split_are_named_with_the_number_needed(tags, words):
    with pytest.raises(DataError, match=words):
        stratified_split([str(guid) for guid in range(len(tags))], tags)


sizes = st.lists(st.integers(10, 60), min_size=2, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes, st.lists(st.integers(1, 9), max_size=5), st.integers(0, 1000))
def test_ten_rows_are_enough_for_each_part_and_rarer_classes_train_at_least(large, small, seed):
    counts = large + small
    classes = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    names = [str(number) for number in range(len(counts))]
    parts, rare = split_rows(classes, np.arange(len(classes)), names, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(classes)))
    assert all(counts[number] < 10 for number in rare)
    tested = set(range(len(counts))) - set(rare.tolist())
    assert not len(rare) or min(counts[number] for number in tested) > max(counts[number] for number in rare)
    for part in parts:
        assert set(range(len(counts))) - set(rare.tolist()) <= set(classes[part].tolist())
    for part in parts[1:]:
        assert not set(rare.tolist()) & set(classes[part].tolist())


def test_without_rare_classes_the_split_of_the_others_is_that_of_scikit_learn():
    classes = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [200, 150, 3, 6]))
    parts, rare = split_rows(classes, np.arange(359), list("abcd"), 42)
    rows = np.flatnonzero(classes < 2)
    train, rest = train_test_split(rows, train_size=0.8, random_state=42, stratify=classes[rows])
    val, test = train_test_split(rest, test_size=0.5, random_state=42, stratify=classes[rest])
    assert rare.tolist() == [2, 3]
    assert parts[0].tolist() == [*train, *np.flatnonzero(classes >= 2)]
    assert (parts[1].tolist(), parts[2].tolist()) == (val.tolist(), test.tolist())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(30, 300))
def test_copies_are_in_one_part_whatever_their_classes(seed, n_groups):
    random = np.random.default_rng(seed)
    groups, classes = random.integers(0, n_groups, 300), random.integers(0, 3, 300)
    parts, rare = split_rows(classes, groups, list("abc"), seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(300))
    held = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, held)) == len(set().union(*held))
    assert set(classes[parts[0]].tolist()) == {0, 1, 2}
    rows = np.sort(np.unique(groups, return_index=True)[1])
    if not len(rare) and np.bincount(classes[rows]).min() >= 10:
        train, _ = train_test_split(rows, train_size=0.8, random_state=seed, stratify=classes[rows])
        assert set(groups[train].tolist()) == held[0]  # the groups, in the order of their first rows


@pytest.mark.parametrize(
    ("classes", "groups"),
    [
        (
            [1, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 1, 1],
            [0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13],
        ),
        (
            [1, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 1, 0, 0],
            [0, 0, 1, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 8, 9, 10, 10, 11],
        ),
    ],
)
def test_copies_with_other_labels_are_divided_or_refused_and_never_for_ever(classes, groups):
    classes, groups = np.array(classes), np.array(groups)
    for seed in range(100):
        try:
            parts, _ = split_rows(classes, groups, ["a", "b"], seed)
        except DataError:
            continue
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(classes)))
        held = [set(groups[rows].tolist()) for rows in parts]
        assert not (held[0] & held[1] | held[0] & held[2] | held[1] & held[2])


def test_data_in_which_every_row_is_a_copy_of_a_row_of_a_rare_class_is_refused():
    """Classes 0 and 1 have 16 groups each, and each group also holds a row of a class with 8."""
    groups = np.repeat(np.arange(32), 2)
    classes = np.array([(group // 16, 2 + group // 8) for group in range(32)]).ravel()
    for seed in range(20):
        with pytest.raises(DataError, match="0 rows, copies counted once, are too few"):
            split_rows(classes, groups, list("abcdef"), seed)


def test_a_class_that_is_all_copies_of_another_trains_only():
    labels = {str(guid): "ab"[guid % 2] for guid in range(60)} | {str(guid): "c" for guid in range(60, 64)}
    groups = {guid: int(guid) if int(guid) < 60 else int(guid) - 60 for guid in labels}
    division = divide(labels, groups, SplitOptions())
    assert division.counts["rare_classes"] == {"c": 4}
    assert {"60", "61", "62", "63", "0", "1", "2", "3"} <= set(division.split.train)
