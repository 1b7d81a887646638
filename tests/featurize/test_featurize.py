import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import content, write_pair
from mmcli.cache import CacheError, DataError, FeatureCache
from mmcli.featurize import FeaturizeOptions, featurize

OPTIONS = FeaturizeOptions(dtype="float32")


def rejects(out):
    with open(f"{out}.rejects.csv", newline="") as file:
        return {row["guid"]: row["reason"] for row in csv.DictReader(file)}


def test_every_pair_is_there_labelled_or_not(pairs, tmp_path, free):
    folder, labels = pairs(12)
    lines = labels.read_text().splitlines()
    labels.write_text("\n".join(lines[:9]) + "\n")
    summary = featurize(folder, labels, tmp_path / "f.h5", OPTIONS)
    assert (summary.rows, summary.labels.labelled, summary.labels.unlabelled, summary.rejects) == (12, 8, 4, 0)
    with FeatureCache.open(tmp_path / "f.h5") as cache:
        assert cache.guids == [str(guid) for guid in range(1, 13)]
        assert cache.header.dataset == {"data": str(folder), "labels": str(labels)}
    assert not Path(f"{tmp_path / 'f.h5'}.rejects.csv").exists()
    assert not list(tmp_path.glob("f.h5.parts*"))


def test_a_second_run_computes_nothing_and_loads_nothing(pairs, tmp_path, free):
    folder, labels = pairs(12)
    out = tmp_path / "f.h5"
    featurize(folder, labels, out, OPTIONS)
    stamp = out.stat().st_mtime_ns
    summary = featurize(folder, None, out, OPTIONS)
    assert (summary.computed, summary.unchanged, summary.labels.labelled) == (0, 12, 12)
    assert len(free.loaded) == 1
    assert out.stat().st_mtime_ns == stamp
    with FeatureCache.open(out) as cache:
        assert cache.header.dataset["labels"] == str(labels)  # as it was, though not given again


def test_only_edited_and_added_pairs_are_computed(pairs, tmp_path, free):
    folder, labels = pairs(12)
    out = tmp_path / "f.h5"
    featurize(folder, labels, out, OPTIONS)
    before = content(out)
    (folder / "7.txt").write_text("an edited text")
    write_pair(folder, 13)
    write_pair(folder, 14)
    summary = featurize(folder, labels, out, OPTIONS)
    assert (summary.computed, summary.unchanged, summary.rows) == (3, 11, 14)
    assert (free.images, free.texts) == (14, 15)  # the edited pair's image is the one that it was
    after = content(out)
    assert {guid for guid in before if before[guid] != after[guid]} == {"7"}
    featurize(folder, labels, tmp_path / "fresh.h5", OPTIONS)
    assert after == content(tmp_path / "fresh.h5")


def test_a_pair_that_is_gone_is_kept_until_pruned(pairs, tmp_path, free):
    folder, labels = pairs(6)
    out = tmp_path / "f.h5"
    featurize(folder, labels, out, OPTIONS)
    for suffix in ("jpg", "txt"):
        (folder / f"3.{suffix}").unlink()
    summary = featurize(folder, None, out, OPTIONS)
    assert (summary.rows, summary.gone, summary.pruned) == (6, 1, 0)
    assert summary.rejects == 0  # though a label names it
    summary = featurize(folder, None, out, FeaturizeOptions(dtype="float32", prune=True))
    assert (summary.rows, summary.gone, summary.pruned, summary.rejects) == (5, 1, 1, 1)
    assert "3" not in content(out)


def test_bad_pairs_are_left_out_with_a_reason(pairs, tmp_path, free):
    folder, labels = pairs(40)
    good = (folder / "1.jpg").read_bytes()
    (folder / "2.jpg").write_bytes(good[: len(good) // 2])
    (folder / "3.jpg").write_bytes(b"no image")
    (folder / "4.jpg").unlink()
    (folder / "5.txt").unlink()
    (folder / "6.png").write_bytes(good)
    labels.write_text(labels.read_text() + "99,neutral\n")
    out = tmp_path / "f.h5"
    summary = featurize(folder, labels, out, FeaturizeOptions(dtype="float32", max_reject_rate=0.2))
    assert (summary.rows, summary.rejects) == (35, 6)
    reasons = rejects(out)
    for guid, words in {"2": "cut off", "3": "not an image", "4": "image missing", "5": "text missing",
                        "6": "given twice", "99": "neither image nor text"}.items():  # fmt: skip
        assert words in reasons[guid]
    loaded = len(free.loaded)
    again = featurize(folder, labels, out, FeaturizeOptions(dtype="float32", max_reject_rate=0.2))
    assert (again.computed, again.rejects, len(free.loaded)) == (0, 6, loaded)
    (folder / "6.png").unlink()
    assert featurize(folder, labels, out, FeaturizeOptions(dtype="float32", max_reject_rate=0.2)).computed == 1


def test_too_many_rejects_fail_and_what_was_done_is_kept(pairs, tmp_path, free):
    folder, _ = pairs(20)
    for guid in range(11, 14):
        (folder / f"{guid}.jpg").write_bytes(b"broken")
    out = tmp_path / "f.h5"
    with pytest.raises(DataError, match=r"at least 3 of 20 pairs cannot be read.*--max-reject-rate 0.05.*rejects.csv"):
        featurize(folder, None, out, OPTIONS)
    assert set(rejects(out)) == {"11", "12", "13"}
    done = free.images
    assert done >= 10
    for guid in range(11, 14):
        write_pair(folder, guid)
    summary = featurize(folder, None, out, OPTIONS)
    assert summary.rows == 20
    assert summary.resumed >= 10
    assert free.images == done + 20 - summary.resumed


def test_nothing_readable_at_all(pairs, tmp_path, free):
    folder, _ = pairs(3)
    for guid in (1, 2, 3):
        (folder / f"{guid}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="no pair of"):
        featurize(folder, None, tmp_path / "f.h5", FeaturizeOptions(dtype="float32", max_reject_rate=1))
    assert not free.loaded
    assert not (tmp_path / "f.h5").exists()


UNREADABLE = {
    "the image is gone": lambda folder: (folder / "4.jpg").unlink(),
    "the text is gone": lambda folder: (folder / "4.txt").unlink(),
    "the image is damaged": lambda folder: (folder / "4.jpg").write_bytes(b"broken"),
    "the guid is given twice": lambda folder: (folder / "4.png").write_bytes((folder / "4.jpg").read_bytes()),
    "a folder is in the place of the image": lambda folder: [(folder / "4.jpg").unlink(), (folder / "4.jpg").mkdir()],
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_row_whose_pair_cannot_be_read_now_stays_until_pruned(pairs, tmp_path, free, what):
    folder, labels = pairs(30)
    out = tmp_path / "f.h5"
    featurize(folder, labels, out, OPTIONS)
    before = content(out)
    UNREADABLE[what](folder)
    summary = featurize(folder, None, out, OPTIONS)
    assert (summary.rows, summary.unreadable, summary.rejects, summary.computed) == (30, 1, 0, 0)
    assert summary.unreadable_example.startswith("'4': ")
    assert "stays in the cache" in rejects(out)["4"]
    assert content(out) == before
    summary = featurize(folder, None, out, FeaturizeOptions(dtype="float32", prune=True))
    assert (summary.rows, summary.unreadable, summary.rejects) == (29, 0, 1)
    assert "4" not in content(out)


def test_most_pictures_away_for_a_day_cost_nothing(pairs, tmp_path, free):
    folder, labels = pairs(30)
    out = tmp_path / "f.h5"
    featurize(folder, labels, out, OPTIONS)
    (tmp_path / "away").mkdir()
    for guid in range(1, 26):
        shutil.move(folder / f"{guid}.jpg", tmp_path / "away")
    assert featurize(folder, None, out, OPTIONS).unreadable == 25
    for path in (tmp_path / "away").iterdir():
        shutil.move(path, folder)
    summary = featurize(folder, None, out, OPTIONS)
    assert (summary.rows, summary.unchanged, summary.unreadable, summary.rejects_file) == (30, 30, 0, None)
    assert free.images == 30


def test_a_labels_file_that_is_away_is_not_forgotten(pairs, tmp_path, free):
    folder, labels = pairs(12)
    out = tmp_path / "f.h5"
    featurize(folder, labels, out, OPTIONS)
    labels.rename(tmp_path / "elsewhere.csv")
    summary = featurize(folder, None, out, OPTIONS)
    assert (summary.labels_missing, summary.labels.labelled) == (str(labels), 0)
    (tmp_path / "elsewhere.csv").rename(labels)
    summary = featurize(folder, None, out, OPTIONS)
    assert (summary.labels_missing, summary.labels.labelled) == (None, 12)


def test_a_backbone_that_moved_is_recorded(pairs, tmp_path, free):
    folder, _ = pairs(6)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, OPTIONS)
    free.name = "moved"
    assert featurize(folder, None, out, OPTIONS).computed == 0
    with FeatureCache.open(out) as cache:
        assert cache.header.backbone["name"] == "moved"


def test_versions_of_libraries_add_up(pairs, tmp_path, free, monkeypatch):
    from mmcli.featurize import plan

    folder, _ = pairs(6)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, OPTIONS)
    now = plan.version("numpy")
    monkeypatch.setattr(plan, "version", lambda name: "99.1")
    featurize(folder, None, out, OPTIONS)
    with FeatureCache.open(out) as cache:
        assert cache.header.versions["numpy"] == now  # nothing was encoded by the new one
    write_pair(folder, 7)
    featurize(folder, None, out, OPTIONS)
    with FeatureCache.open(out) as cache:
        assert cache.header.versions["numpy"] == f"{now}, 99.1"


def test_cleaning_and_size_are_those_of_the_cache(pairs, tmp_path, free):
    folder, _ = pairs(6)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, FeaturizeOptions(dtype="float32", clean=False, resize=99, encoding="latin1"))
    write_pair(folder, 7)
    assert featurize(folder, None, out).unchanged == 6
    with FeatureCache.open(out) as cache:
        identity = cache.header.identity
    assert (identity["text"]["cleaning"], identity["image"]["resize"]) == (0, 99)
    assert identity["text"]["encoding"] == "iso8859-1"


def test_an_encoding_that_was_asked_for(pairs, tmp_path, free):
    folder, _ = pairs(30)
    (folder / "1.txt").write_bytes("привет".encode("cp1251"))
    (folder / "2.txt").write_bytes("привет мир".encode("utf-16"))
    out = tmp_path / "f.h5"
    featurize(folder, None, out, FeaturizeOptions(dtype="float32", encoding="ascii", max_reject_rate=1))
    assert rejects(out) == {"1": "text is not ascii (byte 0)", "2": "text is not ascii (byte 0)"}
    featurize(folder, None, tmp_path / "g.h5", FeaturizeOptions(dtype="float32", encoding="cp1251"))
    (folder / "1.txt").write_text("привет")
    featurize(folder, None, tmp_path / "h.h5", OPTIONS)
    assert content(tmp_path / "g.h5")["1"][1] == content(tmp_path / "h.h5")["1"][1]
    with pytest.raises(DataError, match="unknown encoding 'nonsense'"):
        featurize(folder, None, tmp_path / "i.h5", FeaturizeOptions(encoding="nonsense"))


def test_an_embedding_that_is_not_finite_is_a_reject(pairs, tmp_path, free, monkeypatch):
    from free_backbone import FreeEncoder

    def broken(self, ids, tokens=False):
        encoded = original(self, ids, tokens)
        encoded.pooled[0] = np.nan
        return encoded

    original = FreeEncoder.encode_texts
    monkeypatch.setattr(FreeEncoder, "encode_texts", broken)
    folder, _ = pairs(5)
    summary = featurize(folder, None, tmp_path / "f.h5", FeaturizeOptions(dtype="float32", max_reject_rate=0.5))
    assert (summary.rows, summary.rejects) == (4, 1)
    assert list(rejects(tmp_path / "f.h5").values()) == ["the embedding is not finite, or all zero"]


def test_another_backbone_or_cleaning_is_refused_by_name(pairs, tmp_path, free):
    folder, _ = pairs(4)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, OPTIONS)
    before = out.read_bytes()
    with pytest.raises(CacheError, match=r"text.cleaning \(--no-clean-text\): 2, not 0"):
        featurize(folder, None, out, FeaturizeOptions(dtype="float32", clean=False))
    free.version = 2
    with pytest.raises(
        CacheError, match=r"features of free, which do not fit free \(backbone.version: 1, not 2.*another --out"
    ):
        featurize(folder, None, out, OPTIONS)
    assert out.read_bytes() == before


def test_other_data_does_not_replace_a_cache(pairs, tmp_path, free):
    first, _ = pairs(6)
    out = tmp_path / "f.h5"
    featurize(first, None, out, OPTIONS)
    other = tmp_path / "other"
    for guid in range(1, 5):
        write_pair(other, guid, seed=f"other {guid}")
    with pytest.raises(CacheError, match="holds the pairs of"):
        featurize(other, None, out, OPTIONS)
    moved = tmp_path / "moved"
    shutil.move(first, moved)
    summary = featurize(moved, None, out, OPTIONS)
    assert (summary.computed, summary.unchanged) == (0, 6)
    with FeatureCache.open(out) as cache:
        assert cache.header.dataset["data"] == str(moved)


def test_views_and_tokens_are_added_later_and_not_lost(pairs, tmp_path, free):
    folder, _ = pairs(7)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, OPTIONS)
    plain = content(out)
    summary = featurize(folder, None, out, FeaturizeOptions(dtype="float32", views=2, tokens=True))
    assert (summary.computed, summary.views, summary.tokens) == (7, 2, True)
    with FeatureCache.open(out) as cache:
        assert cache.file["image_views"].shape == (7, 2, 6)
        assert cache.file["image_tokens"].shape[0] == 7
        image, text = cache.embeddings(["3"])
    assert [image[0].tobytes(), text[0].tobytes()] == plain["3"][:2]
    again = featurize(folder, None, out, OPTIONS)
    assert (again.computed, again.views, again.tokens) == (0, 2, True)


def test_views_and_tokens_of_a_row_are_those_of_its_pair(pairs, tmp_path, free):
    """Against one pair at a time, without the pass: nothing is mixed up by batches or by sorting texts by length."""
    from free_backbone import FreeEncoder
    from mmcli.featurize.pairs.image import augment, decode_image

    folder, _ = pairs(9)
    out = tmp_path / "f.h5"
    featurize(folder, None, out, FeaturizeOptions(dtype="float32", views=2, tokens=True, batch_size=4))
    encoder = FreeEncoder()
    with FeatureCache.open(out) as cache:
        for row, guid in enumerate(cache.guids):
            image = decode_image((folder / f"{guid}.jpg").read_bytes())
            alone = encoder.encode_images(encoder.prepare_image(image)[None], tokens=True)
            assert np.array_equal(cache.file["image_tokens"][row], alone.tokens[0])
            for view in range(2):
                pixels = encoder.prepare_image(augment(image, 0, guid, view))[None]
                assert np.allclose(cache.file["image_views"][row, view], encoder.encode_images(pixels).pooled[0])
            ids, _ = encoder.tokenize([(folder / f"{guid}.txt").read_text()])
            alone = encoder.encode_texts(ids, tokens=True)
            assert np.array_equal(cache.text_tokens(row), alone.tokens[0])


def test_cleaning_can_be_left_out(pairs, tmp_path, free):
    folder, _ = pairs(1)
    for text, name in (("GOOD http://a.b", "shouted"), ("good", "plain")):
        (folder / "1.txt").write_text(text)
        for clean in (True, False):
            featurize(folder, None, tmp_path / f"{name}{clean}.h5", FeaturizeOptions(dtype="float32", clean=clean))
    found = {path.stem: content(path)["1"][1] for path in tmp_path.glob("*.h5")}
    assert found["shoutedTrue"] == found["plainTrue"] == found["plainFalse"] != found["shoutedFalse"]


def test_an_image_that_the_processor_cannot_take_is_a_reject(pairs, tmp_path, free, monkeypatch):
    from free_backbone import FreeEncoder

    def fails_for_one(self, image):
        if image.size == (7, 9):
            raise RuntimeError("seven by nine")
        return original(self, image)

    original = FreeEncoder.prepare_image
    monkeypatch.setattr(FreeEncoder, "prepare_image", fails_for_one)
    folder, _ = pairs(30)
    write_pair(folder, 3, size=(7, 9))
    assert featurize(folder, None, tmp_path / "f.h5", OPTIONS).rows == 29
    assert rejects(tmp_path / "f.h5") == {"3": "image cannot be prepared: seven by nine"}


def test_labels_recorded_for_a_manifest_do_not_hide_those_of_another(pairs, tmp_path, free):
    folder, _ = pairs(6)
    for name, count in (("m1.csv", 4), ("m2.csv", 6)):
        lines = [f"{guid},{folder}/{guid}.jpg,text {guid},up" for guid in range(1, count + 1)]
        (tmp_path / name).write_text("guid,image,text,label\n" + "\n".join(lines) + "\n")
    out = tmp_path / "f.h5"
    assert featurize(tmp_path / "m1.csv", None, out, OPTIONS).labels.labelled == 4
    assert featurize(tmp_path / "m2.csv", None, out, OPTIONS).labels.labelled == 6


def test_a_file_of_another_kind_is_not_called_a_damaged_cache(pairs, tmp_path, free):
    folder, labels = pairs(6)
    with pytest.raises(CacheError, match=r"another kind of file.*another --out"):
        featurize(folder, None, labels, OPTIONS)
    assert labels.read_text().startswith("guid,tag")
