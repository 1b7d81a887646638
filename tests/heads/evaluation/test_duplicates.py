import hashlib

import numpy as np
import pytest
from conftest import synthetic_block, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.cache import DataError, FeatureCache, MmcliError
from mmcli.heads import Split
from mmcli.heads.evaluation.folds import duplicate_groups, group_folds, repeated_folds
from mmcli.heads.evaluation.splits import separated


def cache_with(tmp_path, images, texts):
    """Make a cache whose images and cleaned texts are the same where their names are."""
    block = synthetic_block([str(guid) for guid in range(len(images))])
    for name, contents in (("row/image_sha256", images), ("row/cleaned_sha256", texts)):
        digests = [np.frombuffer(hashlib.sha256(each.encode()).digest(), np.uint8) for each in contents]
        block.columns[name] = np.stack(digests)
    return write_cache(tmp_path / "f.h5", block), block.guids


def test_copies_of_images_and_of_texts_are_joined_and_empty_texts_are_not(tmp_path):
    path, guids = cache_with(tmp_path, ["a", "b", "a", "c", "d", "e"], ["one", "two", "two", "", "", "six"])
    with FeatureCache.open(path) as cache:
        groups = duplicate_groups(cache, guids)
        assert groups[0] == groups[1] == groups[2]  # 0 and 2 by image, 1 and 2 by text
        assert len(set(groups[2:].tolist())) == 4
        assert duplicate_groups(cache, ["2", "4", "0"]).tolist() == [0, 1, 0]


@pytest.mark.parametrize("seed", range(8))
def test_groups_are_closed_over_chains_of_images_and_texts(tmp_path, seed):
    random = np.random.default_rng(seed)
    images, texts = (random.integers(0, 25, 40).astype(str).tolist() for _ in range(2))
    groups = [{number} for number in range(40)]  # joined one pair of rows at a time
    for row, other in np.ndindex(40, 40):
        if images[row] == images[other] or texts[row] == texts[other]:
            groups[row] |= groups[other]
            for member in groups[row]:
                groups[member] = groups[row]
    path, guids = cache_with(tmp_path, [f"image {name}" for name in images], [f"text {name}" for name in texts])
    with FeatureCache.open(path) as cache:
        numbers = duplicate_groups(cache, guids)
    assert [set(np.flatnonzero(numbers == number).tolist()) for number in numbers] == groups


def test_how_many_copies_a_split_separates():
    groups = {"1": 0, "2": 0, "3": 1, "4": 2, "5": 2, "6": 3}
    assert separated(Split(["1", "4"], ["2", "3"], ["5", "6"]).named(), groups) == 2
    assert separated(Split(["1", "2"], ["3"], ["4", "5", "6"]).named(), groups) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_folds_part_no_group_cover_every_row_once_and_hold_every_class(seed, folds):
    random = np.random.default_rng(seed)
    classes = random.integers(0, 3, 200)
    groups = random.integers(0, 150, 200)
    classes = classes[np.unique(groups, return_index=True)[1][np.unique(groups, return_inverse=True)[1]]]
    seen = np.zeros(200, dtype=int)
    for inside, outside in group_folds(classes, groups, folds, seed):
        assert not set(groups[inside]) & set(groups[outside])
        assert sorted([*inside, *outside]) == list(range(200))
        assert set(classes[outside]) == {0, 1, 2}
        seen[outside] += 1
    assert (seen == 1).all()


def test_without_copies_the_folds_are_those_of_scikit_learn():
    from sklearn.model_selection import StratifiedKFold

    classes = np.random.default_rng(0).integers(0, 3, 90)
    theirs = StratifiedKFold(5, shuffle=True, random_state=3).split(np.zeros(90), classes)
    for (_, ours), (_, expected) in zip(group_folds(classes, np.arange(90), 5, 3), theirs, strict=True):
        assert np.array_equal(ours, expected)


def test_the_rows_to_stop_by_are_no_copies_of_those_to_learn_from_or_to_score():
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 3)
    classes = np.repeat(random.integers(0, 2, 100), 3)
    made = repeated_folds(classes, groups, ["a", "b"], folds=4, repeats=2, seed=0)
    assert [(fold.repeat, fold.fold) for fold in made] == [(r, f) for r in range(2) for f in range(4)]
    for fold in made:
        parts = [set(groups[rows]) for rows in (fold.train, fold.stop, fold.test)]
        assert sum(map(len, parts)) == len(set().union(*parts)) == 100
        assert len(fold.stop) == pytest.approx(0.1 * (len(fold.train) + len(fold.stop)), abs=6)
    assert not np.array_equal(made[0].test, made[4].test)


@pytest.mark.parametrize(
    ("classes", "folds", "repeats", "error", "words"),
    [
        ([0] * 20 + [1] * 3, 5, 1, DataError, "two classes with at least 5 rows each .*'b' has 3; .* fewer folds"),
        ([0] * 20, 5, 1, DataError, "two classes are needed"),
        ([0, 1] * 20, 1, 1, MmcliError, "at least 2 folds and 1 repeat"),
        ([0, 1] * 20, 2, 0, MmcliError, "at least 2 folds and 1 repeat"),
    ],
)
def test_folds_that_cannot_be(classes, folds, repeats, error, words):
    with pytest.raises(error, match=words):
        repeated_folds(np.array(classes), np.arange(len(classes)), ["a", "b"], folds, repeats, seed=0)


def test_a_class_that_is_nothing_but_copies_has_one_row():
    classes, groups = np.array([0] * 40 + [1] * 8), np.array([*range(40), *[40] * 8])
    with pytest.raises(DataError, match=r"copies counted once\): class 'b' has 1;"):
        repeated_folds(classes, groups, ["a", "b"], 5, 1, seed=0)


def test_a_tenth_is_kept_to_stop_by_however_rare_a_class_is():
    classes = np.array([0] * 1000 + [1] * 8)
    for fold in repeated_folds(classes, np.arange(1008), ["a", "b"], folds=4, repeats=2, seed=0):
        inside = len(fold.train) + len(fold.stop)
        assert len(fold.stop) == pytest.approx(0.1 * inside, abs=3)
        assert set(classes[fold.stop]) == set(classes[fold.train]) == {0, 1}
        assert not set(fold.stop) & set(fold.train)


@pytest.mark.filterwarnings("error")
def test_folds_of_very_few_rows_are_made_or_refused_in_words():
    made = repeated_folds(np.array([0] * 100 + [1] * 2), np.arange(102), ["a", "b"], folds=2, repeats=1, seed=0)
    assert all((fold.train == 100).any() or (fold.train == 101).any() for fold in made)
    with pytest.raises(DataError, match="2 training rows are too few to keep some of them to stop by"):
        repeated_folds(np.array([0, 0, 1, 1]), np.arange(4), ["a", "b"], folds=2, repeats=1, seed=0)


def test_a_class_whose_rows_are_all_copies_of_another_is_learned_in_every_fold():
    classes = np.array([0] * 40 + [1] * 5)
    groups = np.array([*range(40), *range(5)])  # every row of class 1 is a copy of one of class 0
    for fold in repeated_folds(classes, groups, ["a", "b"], 5, 2, seed=0):
        assert set(classes[fold.train].tolist()) == {0, 1}
        parts = [set(groups[rows].tolist()) for rows in (fold.train, fold.stop, fold.test)]
        assert sum(map(len, parts)) == 40


def test_copies_that_all_have_both_labels_can_still_be_folded():
    classes, groups = np.array([0, 1] * 8), np.repeat(np.arange(8), 2)
    made = repeated_folds(classes, groups, ["a", "b"], 8, 1, seed=0)
    assert sorted(np.concatenate([fold.test for fold in made]).tolist()) == list(range(16))


def test_a_class_with_fewer_rows_than_folds_trains_only():
    classes = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3, 4], [80, 60, 3, 4, 6]))
    made = repeated_folds(classes, np.arange(153), list("abcde"), folds=5, repeats=2, seed=0)
    always = set(np.flatnonzero((classes == 2) | (classes == 3)).tolist())
    for fold in made:
        assert always <= set(fold.train.tolist())
        assert not always & {*fold.stop.tolist(), *fold.test.tolist()}
        assert set(classes[fold.test].tolist()) == {0, 1, 4}
        assert sorted([*fold.train, *fold.stop, *fold.test]) == list(range(153))
    scored = np.concatenate([fold.test for fold in made if fold.repeat == 1])
    assert sorted(scored.tolist()) == sorted(set(range(153)) - always)


def test_a_copy_of_a_row_of_a_rare_class_trains_only():
    classes, groups = np.array([0] * 40 + [1] * 40 + [2] * 2), np.array([*range(80), 0, 81])
    for fold in repeated_folds(classes, groups, list("abc"), folds=4, repeats=1, seed=0):
        assert {0, 80, 81} <= set(fold.train.tolist())


def test_images_that_are_missing_are_no_copies_of_each_other(tmp_path):
    block = synthetic_block(["0", "1", "2", "3"])
    block.columns["row/image_sha256"][:2] = 0
    block.columns["row/image_sha256"][2:] = np.frombuffer(hashlib.sha256(b"").digest(), np.uint8)
    with FeatureCache.open(write_cache(tmp_path / "f.h5", block)) as cache:
        assert duplicate_groups(cache, block.guids).tolist() == [0, 1, 2, 3]
