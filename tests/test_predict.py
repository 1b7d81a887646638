"""Prediction from raw pairs, with a small CLIP."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import rewrite, write_pair
from mmcli.cache import BackboneError, CheckpointError, DataError, FeatureCache, MmcliError
from mmcli.featurize import FeaturizeOptions, embed, featurize
from mmcli.heads import FUSIONS, Recipe, load_checkpoint, predict, predict_logits, train_head
from small_experiments import QUICK


@pytest.fixture
def trained(pairs, tiny_clip, tmp_path):
    """A head trained on 40 featurized pairs; returns (folder of pairs, cache, best.pt)."""
    folder, labels = pairs(40)
    cache = tmp_path / "f.h5"
    featurize(folder, labels, cache, FeaturizeOptions(backbone=str(tiny_clip), dtype="float32"))
    run = train_head(cache, recipe=Recipe(epochs=2, hidden=(8,)), runs=tmp_path / "runs")
    return folder, cache, run["best_pt"]


@pytest.fixture
def encoded(monkeypatch):
    """Collect the guids of the pairs that are encoded, not taken from a cache."""
    guids = []
    original = embed._encode

    def spy(pairs, *rest):
        guids.extend(pair.guid for pair in pairs)
        return original(pairs, *rest)

    monkeypatch.setattr(embed, "_encode", spy)
    return guids


def test_logits_from_the_raw_pair_equal_those_from_the_cache(trained, tmp_path):
    folder, cache_path, best_pt = trained
    checkpoint = load_checkpoint(best_pt)
    with FeatureCache.open(cache_path) as cache:
        guids = cache.guids
        logits = predict_logits(checkpoint.head, cache.features(guids))
    cache_path.rename(tmp_path / "away.h5")
    fresh = predict(best_pt, data=folder)
    assert fresh.guids == guids
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(fresh.probs, expected, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_says_the_same_of_the_raw_pair_as_of_the_cache(pairs, tiny_clip, tmp_path, fusion):
    folder, labels = pairs(40)
    cache_path = tmp_path / "f.h5"
    options = FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", tokens=True)
    featurize(folder, labels, cache_path, options)
    recipe = Recipe(fusion=fusion, epochs=3, hidden=(8,), lr=1e-2, lr_attn=1e-1)
    best_pt = train_head(cache_path, recipe=recipe, runs=tmp_path / "runs")["best_pt"]
    again = train_head(cache_path, recipe=recipe, runs=tmp_path / "more")["best_pt"]
    assert Path(best_pt).read_bytes() == Path(again).read_bytes()  # same seed, same bits
    checkpoint = load_checkpoint(best_pt)
    with FeatureCache.open(cache_path) as cache:
        guids = cache.guids
        logits = predict_logits(checkpoint.head, cache.features(guids, tokens=fusion == "cross_attn"))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    listed = tmp_path / "ids.csv"
    listed.write_text("guid\n" + "\n".join(guids[:5]))
    assert np.allclose(predict(best_pt, ids=listed).probs, expected[:5], atol=1e-6)
    cache_path.rename(tmp_path / "away.h5")
    assert np.allclose(predict(best_pt, data=folder).probs, expected, atol=1e-5)
    one = predict(best_pt, pair=(folder / "3.jpg", (folder / "3.txt").read_text()))
    assert np.allclose(one.probs[0], expected[guids.index("3")], atol=1e-5)


def test_cross_attention_and_a_cache_without_tokens(pairs, tiny_clip, tmp_path, encoded):
    """The head was trained with tokens; a cache without them does for nothing, the raw pairs do."""
    folder, labels = pairs(40)
    with_tokens, without = tmp_path / "t.h5", tmp_path / "p.h5"
    for path in (with_tokens, without):
        options = FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", tokens=path == with_tokens)
        featurize(folder, labels, path, options)
    recipe = Recipe(fusion="cross_attn", epochs=1, hidden=(8,))
    best_pt = train_head(with_tokens, recipe=recipe, runs=tmp_path / "runs")["best_pt"]
    ids = tmp_path / "ids.csv"
    ids.write_text("guid\n7\n3\n")
    expected = predict(best_pt, ids=ids).probs
    assert encoded == []
    assert np.allclose(predict(best_pt, ids=ids, cache_path=without).probs, expected, atol=1e-5)
    assert encoded == ["7", "3"]


def test_a_folder_never_featurized(trained, tmp_path, encoded):
    _, _, best_pt = trained
    for guid in ("x", "y"):
        write_pair(tmp_path / "more", guid)
    (tmp_path / "more" / "z.jpg").write_bytes(b"broken")
    (tmp_path / "more" / "z.txt").write_text("text")
    found = predict(best_pt, data=tmp_path / "more")
    assert found.guids == ["x", "y"]
    assert [(reject.guid, reject.reason) for reject in found.rejects] == [("z", "not an image")]
    assert encoded == ["x", "y", "z"]


def test_rows_of_the_cache_are_taken_from_it_and_others_encoded(trained, encoded):
    folder, _, best_pt = trained
    write_pair(folder, 41)
    (folder / "5.txt").write_text("changed since")
    found = predict(best_pt, data=folder)
    assert len(found.guids) == 41
    assert encoded == ["5", "41"]


def test_listed_pairs_that_were_added_since_are_encoded(trained, tmp_path, encoded):
    folder, _, best_pt = trained
    write_pair(folder, 41)
    ids = tmp_path / "ids.csv"
    ids.write_text("guid\n41\n2\n")
    assert predict(best_pt, ids=ids).guids == ["41", "2"]
    assert encoded == ["41"]
    (folder / "2.txt").write_text("edited, and the cache does not know")  # listed alone or not: the cached row counts
    ids.write_text("guid\n2\n")
    alone = predict(best_pt, ids=ids)
    ids.write_text("guid\n41\n2\n")
    assert np.allclose(predict(best_pt, ids=ids).probs[1], alone.probs[0], atol=1e-6)
    ids.write_text("guid\n2\n42\n")
    with pytest.raises(DataError, match=r"1 of the listed pairs are not in .*'42'"):
        predict(best_pt, ids=ids)
    (folder / "41.jpg").write_bytes(b"")
    ids.write_text("guid\n41\n")
    with pytest.raises(DataError, match=r"1 of 1 pairs cannot be read: '41' \(image file is empty"):
        predict(best_pt, ids=ids)


def test_one_pair(trained):
    folder, _, best_pt = trained
    text = (folder / "3.txt").read_text()
    single = predict(best_pt, pair=(folder / "3.jpg", text))
    everything = predict(best_pt, data=folder)
    assert np.allclose(single.probs[0], everything.probs[everything.guids.index("3")], atol=1e-5)
    with pytest.raises(DataError, match="image missing"):
        predict(best_pt, pair=(folder / "none.jpg", text))


def test_a_backbone_that_was_moved_or_is_another(trained, tiny_clip, tmp_path):
    folder, _, best_pt = trained
    pair = (folder / "3.jpg", "a text")
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    assert predict(best_pt, pair=pair, backbone=str(moved)).labels == predict(best_pt, pair=pair).labels
    (moved / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(BackboneError, match=r"not the backbone.*merges.txt.*--backbone"):
        predict(best_pt, pair=pair, backbone=str(moved))
    with pytest.raises(BackboneError, match="no such backbone folder"):
        predict(best_pt, pair=pair, backbone="/nowhere/clip")


def test_without_a_cache_listed_pairs_need_a_folder(trained, tmp_path):
    folder, cache, best_pt = trained
    cache.unlink()
    ids = tmp_path / "ids.csv"
    ids.write_text("guid\n3\n")
    with pytest.raises(DataError, match="give --data FOLDER"):
        predict(best_pt, ids=ids)
    assert predict(best_pt, ids=ids, data=folder).guids == ["3"]
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        predict(tmp_path / "none.pt", ids=ids)


def test_cached_rows_that_are_not_finite_are_not_predicted(learnable, tmp_path):
    path, labels = learnable
    run = train_head(path, labels, QUICK, runs=tmp_path / "runs")

    def spoil(columns):
        columns["image"][119, 2] = np.inf

    rewrite(path, spoil)
    (tmp_path / "ids.csv").write_text("guid\n3\n119\n")
    with pytest.raises(MmcliError, match="image embeddings that are not finite, the first is '119'"):
        predict(run["best_pt"], ids=tmp_path / "ids.csv")
