"""Prediction from raw pairs, with a small CLIP."""

import os
import shutil
from pathlib import Path
from random import Random

import numpy as np
import pytest
from conftest import rewrite, synthetic_block, write_cache, write_pair
from mmcli.cache import BackboneError, CacheError, CheckpointError, DataError, FeatureCache, MmcliError
from mmcli.featurize import FeaturizeOptions, featurize, source
from mmcli.featurize.backbones.huggingface import HuggingFaceBackbone
from mmcli.featurize.pairs.pair import Pair
from mmcli.heads import (
    FUSIONS,
    Predictor,
    Recipe,
    RunOptions,
    evaluate,
    load_checkpoint,
    predict,
    predict_logits,
    train_head,
)
from small_experiments import QUICK
from tolerances import close_rows


@pytest.fixture
def trained(pairs, tiny_clip, tmp_path):
    """A head trained on 40 featurized pairs; returns (folder of pairs, cache, best.pt)."""
    folder, labels = pairs(40)
    cache = tmp_path / "f.h5"
    featurize(folder, labels, cache, FeaturizeOptions(backbone=str(tiny_clip), dtype="float32"))
    run = train_head(cache, recipe=Recipe(epochs=2, hidden=(8,)), options=RunOptions(tmp_path / "runs"))
    return folder, cache, run.best_pt


@pytest.fixture
def encoded(monkeypatch):
    """Collect the guids of the pairs that are encoded, not taken from a cache."""
    guids = []
    original = source.encode_blocks

    def spy(blocks, *rest):
        guids.extend(pair.guid for block in blocks for pair in block)
        return original(blocks, *rest)

    monkeypatch.setattr(source, "encode_blocks", spy)
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
    close_rows(fresh.probs, expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_says_the_same_of_the_raw_pair_as_of_the_cache(pairs, tiny_clip, tmp_path, fusion):
    folder, labels = pairs(40)
    cache_path = tmp_path / "f.h5"
    options = FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", tokens=True)
    featurize(folder, labels, cache_path, options)
    recipe = Recipe(fusion=fusion, epochs=3, hidden=(8,), lr=1e-2, lr_attn=1e-1)
    best_pt = train_head(cache_path, recipe=recipe, options=RunOptions(tmp_path / "runs")).best_pt
    again = train_head(cache_path, recipe=recipe, options=RunOptions(tmp_path / "more")).best_pt
    assert Path(best_pt).read_bytes() == Path(again).read_bytes()  # same seed, same bits
    checkpoint = load_checkpoint(best_pt)
    with FeatureCache.open(cache_path) as cache:
        guids = cache.guids
        logits = predict_logits(checkpoint.head, cache.features(guids, tokens=fusion == "cross_attn"))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    listed = tmp_path / "ids.csv"
    listed.write_text("guid\n" + "\n".join(guids[:5]))
    close_rows(predict(best_pt, ids=listed).probs, expected[:5])
    cache_path.rename(tmp_path / "away.h5")
    close_rows(predict(best_pt, data=folder).probs, expected)
    one = predict(best_pt, pair=(folder / "3.jpg", (folder / "3.txt").read_text()))
    close_rows(one.probs[0], expected[guids.index("3")])


def test_cross_attention_and_a_cache_without_tokens(pairs, tiny_clip, tmp_path, encoded):
    """The head was trained with tokens; a cache without them does for nothing, the raw pairs do."""
    folder, labels = pairs(40)
    with_tokens, without = tmp_path / "t.h5", tmp_path / "p.h5"
    for path in (with_tokens, without):
        options = FeaturizeOptions(backbone=str(tiny_clip), dtype="float32", tokens=path == with_tokens)
        featurize(folder, labels, path, options)
    recipe = Recipe(fusion="cross_attn", epochs=1, hidden=(8,))
    best_pt = train_head(with_tokens, recipe=recipe, options=RunOptions(tmp_path / "runs")).best_pt
    ids = tmp_path / "ids.csv"
    ids.write_text("guid\n7\n3\n")
    expected = predict(best_pt, ids=ids).probs
    assert encoded == []
    close_rows(predict(best_pt, ids=ids, cache_path=without).probs, expected)
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
    close_rows(predict(best_pt, ids=ids).probs[1], alone.probs[0])
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
    close_rows(single.probs[0], everything.probs[everything.guids.index("3")])
    with pytest.raises(DataError, match="image missing"):
        predict(best_pt, pair=(folder / "none.jpg", text))


def test_a_backbone_that_was_moved_or_is_another(trained, tiny_clip, tmp_path):
    folder, _, best_pt = trained
    pair = (folder / "3.jpg", "a text")
    moved = shutil.copytree(tiny_clip, tmp_path / "moved")
    assert (
        Predictor.open(best_pt, backbone=str(moved)).predict(pairs=[pair]).labels == predict(best_pt, pair=pair).labels
    )
    (moved / "merges.txt").write_text("#version: 0.2\na b\n")
    with pytest.raises(BackboneError, match=r"not the backbone.*merges.txt.*--backbone"):
        Predictor.open(best_pt, backbone=str(moved)).predict(pairs=[pair])
    with pytest.raises(BackboneError, match="no such backbone folder"):
        Predictor.open(best_pt, backbone="/nowhere/clip").predict(pairs=[pair])


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
    run = train_head(path, labels, QUICK, options=RunOptions(tmp_path / "runs"))

    def spoil(columns):
        columns["image"][119, 2] = np.inf

    rewrite(path, spoil)
    (tmp_path / "ids.csv").write_text("guid\n3\n119\n")
    with pytest.raises(MmcliError, match="image embeddings that are not finite or all zero, the first is '119'"):
        predict(run.best_pt, ids=tmp_path / "ids.csv")


def manifest_of(folder, guids, path):
    """Write a manifest of pairs in the order of ``guids``."""
    path.write_text("guid,image,text_path\n" + "".join(f"{g},{folder}/{g}.jpg,{folder}/{g}.txt\n" for g in guids))
    return path


def test_predictions_of_a_manifest_have_its_order(trained, tmp_path, cli):
    """So that ``frame["tag"] = read_csv(out)["tag"]`` is right."""
    folder, _, best_pt = trained
    guids = [str(guid) for guid in range(1, 41)]
    Random(3).shuffle(guids)
    write_pair(folder, 99)
    guids.insert(5, "99")
    manifest = manifest_of(folder, guids, tmp_path / "m.csv")
    found = predict(best_pt, data=manifest)
    assert found.guids == guids
    natural = predict(best_pt, data=folder)
    by_guid = dict(zip(natural.guids, natural.labels, strict=True))
    assert found.labels == [by_guid[guid] for guid in guids]
    code, _, _ = cli("predict", "--from", best_pt, "--data", manifest, "--out", "p.csv")
    assert code == 0
    assert [line.split(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]] == guids
    assert natural.guids == [*map(str, range(1, 41)), "99"]  # of a folder, natural order


def test_pairs_that_were_edited_since_featurize_are_counted(trained, tmp_path, cli):
    folder, _, best_pt = trained
    (tmp_path / "ids.csv").write_text("guid\n5\n2\n9\n")
    assert predict(best_pt, ids=["5", "2", "9"]).notes == []
    (folder / "2.txt").write_text("edited since")
    write_pair(folder, 9, seed="another picture")
    os.utime(folder / "9.jpg", (0, 0))  # as a copy that keeps its times
    os.utime(folder / "9.txt", (0, 0))
    os.utime(folder / "5.jpg")  # touched, not edited
    (folder / "7.txt").write_text("edited, and not asked for")
    (note,) = predict(best_pt, ids=["5", "2", "9"]).notes
    assert "2 of 3 pairs were edited since featurize" in note
    assert "mmcli featurize" in note
    code, _, err = cli("predict", "--from", best_pt, "--ids", "ids.csv")
    assert (code, "2 of 3 pairs were edited since featurize" in err) == (0, True)
    shutil.rmtree(folder)
    assert predict(best_pt, ids=["5", "2", "9"]).notes == []  # nothing to compare with


def test_files_that_nobody_touched_since_are_not_read(trained, monkeypatch):
    folder, cache, best_pt = trained
    late = max(path.stat().st_ctime for path in folder.iterdir()) + 2 * 86_400
    os.utime(cache, (late, late))
    monkeypatch.setattr(Pair, "read_image", lambda self: pytest.fail("was read"))
    assert predict(best_pt, ids=["5", "2"]).notes == []


def test_a_predictor_loads_its_encoder_once(trained, tmp_path, monkeypatch, tiny_clip):
    folder, _, best_pt = trained
    loaded = []
    original = HuggingFaceBackbone.load

    def spy(self, *arguments):
        loaded.append(self.name)
        return original(self, *arguments)

    monkeypatch.setattr(HuggingFaceBackbone, "load", spy)
    predictor = Predictor.open(best_pt)
    assert predictor.predict(ids=["7", "3"]).guids == ["7", "3"]
    assert loaded == []
    texts = [(folder / f"{guid}.txt").read_text() for guid in (3, 4)]
    one = predictor.predict(pairs=[(folder / "3.jpg", texts[0])])
    two = predictor.predict(pairs=[(folder / "3.jpg", texts[0]), (folder / "4.jpg", texts[1])])
    same_name = predictor.predict(pairs=[(folder / "3.jpg", texts[0]), (folder / "3.jpg", "other words")])
    assert loaded == [str(tiny_clip)]
    assert (one.guids, two.guids, same_name.guids) == (["3"], ["3", "4"], ["1", "2"])
    once = predict(best_pt, pair=(folder / "3.jpg", texts[0]))
    close_rows(one.probs, once.probs)
    close_rows(two.probs[:1], once.probs)
    close_rows(predictor.predict(ids=["3"]).probs, once.probs)
    with pytest.raises(DataError, match="image missing"):
        predictor.predict(pairs=[(folder / "none.jpg", "x"), (folder / "3.jpg", "x")])
    with pytest.raises(DataError, match="guid '3' is given twice"):
        predictor.predict(ids=["3", "3"])
    with pytest.raises(DataError, match="no guid is given"):
        predictor.predict(ids=[])
    with pytest.raises(DataError, match="give ids, or data"):
        predictor.predict()


def test_a_run_that_was_moved_together_with_its_cache(trained, tmp_path):
    _, cache, best_pt = trained
    expected = predict(best_pt, ids=["7", "3"]).probs
    scores = evaluate(best_pt).scores["test"]
    run = Path(best_pt).parent
    moved = tmp_path / "moved"
    (moved / "runs").mkdir(parents=True)
    run.rename(moved / "runs" / run.name)
    cache.rename(moved / cache.name)
    here = moved / "runs" / run.name / "best.pt"
    assert np.array_equal(predict(here, ids=["7", "3"]).probs, expected)
    assert evaluate(here).scores["test"] == scores
    other = rewrite_as_another(moved / cache.name)
    with pytest.raises(CacheError, match=r"no feature cache at .*, and .*moved.*holds other features or other pairs"):
        evaluate(here)
    other.unlink()
    with pytest.raises(CacheError) as error:
        evaluate(here)
    assert all(str(place) in str(error.value) for place in (cache, moved / cache.name))


def rewrite_as_another(path):
    """Put a cache of other pairs with the same fingerprint in the place of one."""
    with FeatureCache.open(path) as cache:
        made, dim = cache.header, cache.dim
    return write_cache(path, synthetic_block([f"other {number}" for number in range(50)], dim), made)


def test_predictions_do_not_overwrite_what_the_head_learned_from(trained, cli):
    folder, cache, best_pt = trained
    with FeatureCache.open(cache) as opened:
        labels = Path(opened.header.dataset["labels"])
    ids = folder.parent / "ids.csv"
    ids.write_text("guid\n1\n2\n")
    for path in (labels, Path(best_pt).parent / "splits" / "test_split.csv"):
        before = path.read_bytes()
        code, _, err = cli("predict", "--from", best_pt, "--ids", ids, "--out", path)
        assert code == 1
        assert "is an input of this command" in err
        assert path.read_bytes() == before
    for _ in range(2):  # its own output is written again
        assert cli("predict", "--from", best_pt, "--ids", ids, "--out", folder.parent / "out.csv")[0] == 0
