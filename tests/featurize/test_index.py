"""The same image, or the same text, is encoded once, and nothing that is known is encoded again."""

import csv
import hashlib
import shutil
from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import content, write_pair
from mmcli.cache import FeatureCache
from mmcli.featurize import FeaturizeOptions, clean_text, encode, featurize, outputs, plan

OPTIONS = FeaturizeOptions(dtype="float32")


def columns(path, *names):
    """Return {guid: (value of each column)}."""
    with FeatureCache.open(path) as cache:
        values = [cache.read(name, np.arange(len(cache))) for name in names]
        return {guid: [each[row] for each in values] for row, guid in enumerate(cache.guids)}


def rejects_of(path):
    """Return {guid: reason} of the rejects beside a cache."""
    with path.with_name(path.name + ".rejects.csv").open(newline="") as file:
        return {row["guid"]: row["reason"] for row in csv.DictReader(file)}


@pytest.fixture
def copies(tmp_path, free):
    """Sixty pairs in blocks of five: 1 to 20, their copies 21 to 40, and images of 1 to 20 with other texts."""
    folder = tmp_path / "data"
    for guid in range(1, 21):
        for copy in (guid, guid + 20, guid + 40):
            write_pair(folder, copy, seed=guid)
        (folder / f"{guid}.txt").write_text(f"One {guid}")
        (folder / f"{guid + 20}.txt").write_text(f"one  {guid} https://t.co/x")  # the same when cleaned
        (folder / f"{guid + 40}.txt").write_text(f"another {guid}")
    return folder


def test_the_same_is_encoded_once_within_and_across_blocks(copies, tmp_path, free):
    out = tmp_path / "f.h5"
    assert featurize(copies, None, out, OPTIONS).rows == 60
    assert (free.images, free.texts) == (20, 40)
    found = columns(out, "image", "text", "row/text_sha256")
    for guid in range(1, 21):
        one, two, other = (found[str(guid + more)] for more in (0, 20, 40))
        assert np.array_equal(one[0], two[0])
        assert np.array_equal(one[0], other[0])
        assert np.array_equal(one[1], two[1])
        assert not np.array_equal(one[2], two[2])  # the raw texts are not the same
        assert not np.array_equal(one[1], other[1])


def test_texts_that_are_not_cleaned_are_the_same_only_byte_for_byte(copies, tmp_path, free):
    featurize(copies, None, tmp_path / "f.h5", replace(OPTIONS, clean=False))
    assert (free.images, free.texts) == (20, 60)


def test_each_pair_has_its_own_views_of_the_same_image(copies, tmp_path, free):
    featurize(copies, None, tmp_path / "f.h5", replace(OPTIONS, views=2))
    assert free.images == 20 + 2 * 60
    found = columns(tmp_path / "f.h5", "image_views")
    assert not np.array_equal(found["1"][0], found["21"][0])


def test_views_cost_the_extra_passes_only(pairs, tmp_path, free):
    folder, _ = pairs(12)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, OPTIONS)
    before = columns(out, "image", "text", "row/truncated")
    assert (free.images, free.texts) == (12, 12)
    featurize(folder, None, out, replace(OPTIONS, views=3))
    assert (free.images, free.texts) == (12 + 3 * 12, 12)
    after = columns(out, "image", "text", "row/truncated", "image_views")
    assert all(np.array_equal(one, two) for guid in before for one, two in zip(before[guid], after[guid], strict=False))
    free.loaded.clear()
    featurize(folder, None, tmp_path / "one.h5", replace(OPTIONS, views=3))
    assert content(out) == content(tmp_path / "one.h5")


def test_tokens_cannot_be_had_from_what_has_none(pairs, tmp_path, free):
    folder, _ = pairs(7)
    featurize(folder, None, tmp_path / "f.h5", OPTIONS)
    featurize(folder, None, tmp_path / "f.h5", replace(OPTIONS, tokens=True))
    assert (free.images, free.texts) == (14, 14)


def test_copies_have_the_token_states_of_the_original(copies, tmp_path, free):
    featurize(copies, None, tmp_path / "f.h5", replace(OPTIONS, tokens=True))
    assert (free.images, free.texts) == (20, 40)
    with FeatureCache.open(tmp_path / "f.h5") as cache:
        rows = [cache.row_of[guid] for guid in ("3", "23")]
        assert np.array_equal(*(cache.text_tokens(row) for row in rows))
        assert np.array_equal(*cache.read("image_tokens", np.array(rows)))


def test_renamed_pairs_are_not_encoded_again(pairs, tmp_path, free):
    folder, _ = pairs(12)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, OPTIONS)
    before = columns(out, "image", "text")
    for guid in range(1, 13):
        for suffix in ("jpg", "txt"):
            shutil.move(folder / f"{guid}.{suffix}", folder / f"renamed-{guid}.{suffix}")
    summary = featurize(folder, None, out, replace(OPTIONS, prune=True))
    assert (summary.rows, summary.pruned) == (12, 12)
    assert (free.images, free.texts) == (12, 12)
    after = columns(out, "image", "text")
    assert all(np.array_equal(before[str(guid)], after[f"renamed-{guid}"]) for guid in range(1, 13))


def test_the_first_eight_bytes_of_a_digest_are_not_enough(pairs, tmp_path, free, monkeypatch):
    """Every digest has the same place; what is there is compared."""
    folder, _ = pairs(12)
    featurize(folder, None, tmp_path / "one.h5", OPTIONS)
    monkeypatch.setattr(outputs, "_key", lambda digests: np.zeros(len(digests), np.uint64))
    featurize(folder, None, tmp_path / "f.h5", OPTIONS)
    assert content(tmp_path / "f.h5") == content(tmp_path / "one.h5")


def test_copies_of_a_broken_image_are_left_out_for_the_same_reason(copies, tmp_path, free):
    for guid in (3, 23, 43):
        (copies / f"{guid}.jpg").write_bytes(b"broken")
    summary = featurize(copies, None, tmp_path / "f.h5", replace(OPTIONS, max_reject_rate=0.1))
    assert (summary.rows, summary.rejects) == (57, 3)
    lines = (tmp_path / "f.h5.rejects.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:2] for line in lines] == [[guid, "not an image"] for guid in ("3", "23", "43")]


def test_progress_counts_every_pair_once(copies, tmp_path, free):
    seen = []
    featurize(copies, None, tmp_path / "f.h5", OPTIONS, lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 60)
    assert seen[-1] == (60, 60)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_number_of_cores_changes_nothing(copies, tmp_path, free, monkeypatch):
    from free_backbone import FreeEncoder

    for cores in (1, 2, 7):
        monkeypatch.setattr(FreeEncoder, "cores", cores)
        featurize(copies, None, tmp_path / f"{cores}.h5", replace(OPTIONS, views=1, tokens=True, batch_size=2))
    assert content(tmp_path / "1.h5") == content(tmp_path / "2.h5") == content(tmp_path / "7.h5")
    assert plan.BLOCK_ROWS == 5


def test_texts_that_are_the_same_only_when_cleaned_twice_are_not_the_same(tmp_path, free):
    folder = tmp_path / "data"
    for guid, text in ((1, "so ##happy today"), (2, "so #happy today")):
        write_pair(folder, guid)
        (folder / f"{guid}.txt").write_text(text)
    featurize(folder, None, tmp_path / "f.h5", OPTIONS)
    found = columns(tmp_path / "f.h5", "text", "row/cleaned_sha256")
    assert not np.array_equal(found["1"][0], found["2"][0])
    assert found["1"][1].tobytes() == hashlib.sha256(clean_text("so ##happy today").encode()).digest()


def test_an_image_that_changes_while_it_is_read_gives_its_copy_nothing_wrong(copies, tmp_path, free, monkeypatch):
    other = (copies / "2.jpg").read_bytes()
    hash_pair = encode.hash_pair

    def hash_then_replace(pair, **options):
        hashed = hash_pair(pair, **options)
        if pair.guid == "1":
            (copies / "1.jpg").write_bytes(other)
        return hashed

    monkeypatch.setattr(encode, "hash_pair", hash_then_replace)
    out = tmp_path / "f.h5"
    featurize(copies, None, out, replace(OPTIONS, max_reject_rate=0.5))
    rejects = rejects_of(out)
    assert "1" in rejects
    assert set(rejects) <= {"1", "21", "41"}  # a copy that is begun later is read for itself
    assert all("changed while it was read" in reason for reason in rejects.values())
    again = featurize(copies, None, out, OPTIONS)
    assert (again.computed, again.rejects) == (len(rejects), 0)
    featurize(copies, None, tmp_path / "new.h5", OPTIONS)
    assert content(out) == content(tmp_path / "new.h5")


def test_a_view_that_cannot_be_made_costs_its_pair_alone(copies, tmp_path, free, monkeypatch):
    augment = outputs.augment

    def fail_for_one(image, seed, guid, view):
        if (guid, view) == ("1", 1):
            raise ValueError("no room")
        return augment(image, seed, guid, view)

    monkeypatch.setattr(outputs, "augment", fail_for_one)
    featurize(copies, None, tmp_path / "f.h5", replace(OPTIONS, views=2, max_reject_rate=0.5))
    assert rejects_of(tmp_path / "f.h5") == {"1": "image cannot be prepared: no room"}
    found = columns(tmp_path / "f.h5", "image")
    assert np.array_equal(found["21"][0], found["41"][0])


def test_what_verify_finds_damaged_is_computed_again(copies, tmp_path, free):
    out, whole = tmp_path / "f.h5", tmp_path / "whole.h5"
    featurize(copies, None, out, OPTIONS)
    shutil.copy(out, whole)
    with h5py.File(out, "r+") as file:
        file["image"][5, 2] = np.nan
        file["text"][7] = 0
    assert featurize(copies, None, out, OPTIONS).computed == 2
    assert content(out) == content(whole)
