"""Embeddings left in the file because they are too many: read by blocks, the same numbers."""

import hashlib
import json
import pickle
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from conftest import header, synthetic_block, write_cache
from mmcli.cache import CacheError, FeatureCache, MmcliError, hdf5
from mmcli.cache.features import StoredRows
from mmcli.cli import app
from mmcli.heads import Recipe, Rows, fit, predict_logits
from mmcli.heads.runs import labelled
from mmcli.heads.runs.fit_store import data_key
from mmcli.heads.training import training_rows
from mmcli.heads.training.training_rows import shuffled_blocks
from typer.testing import CliRunner

N, VIEWS = 3000, 3
RECIPE = Recipe(epochs=3, hidden=(8,), dropout=0.0, batch_size=50, lr=1e-2)


@pytest.fixture(scope="module")
def cache_path(tmp_path_factory):
    block = synthetic_block([str(guid) for guid in range(N)])
    random = np.random.default_rng(0)
    for name in ("image", "text"):
        block.columns[name] = random.standard_normal(block.columns[name].shape).astype(np.float16)
    block.columns["image_views"] = np.repeat(block.columns["image"][:, None], VIEWS, axis=1)
    return write_cache(tmp_path_factory.mktemp("stored") / "features.h5", block, header())


@pytest.fixture
def both(cache_path, monkeypatch):
    """Return the rows in memory and left in the file, in an order that is not that of the file."""
    monkeypatch.setattr(training_rows, "_STRETCH_ROWS", 64)
    guids = [str(each) for each in np.random.default_rng(1).permutation(N)]
    with FeatureCache.open(cache_path) as cache:
        in_memory, in_file = (cache.features(guids, views=True, max_bytes=limit) for limit in (None, 40_000))
        classes = np.digitize(in_memory.image[:, 0].astype(float) + in_memory.text[:, 0], [-0.5, 0.5])
        return Rows(in_memory, classes), Rows(in_file, classes)


def test_the_same_numbers_whichever_rows_are_asked_for(both):
    in_memory, in_file = (rows.features for rows in both)
    assert isinstance(in_file.image, StoredRows)
    assert in_file.at_once < N // 3
    picked = np.array([5, 2999, 5, 0])
    for one, two in ((in_memory, in_file), (in_memory.take(picked), in_file.take(picked))):
        assert len(one) == len(two)
        for side in ("image", "text", "views"):
            assert getattr(one, side).shape == getattr(two, side).shape
            assert np.array_equal(getattr(one, side), getattr(two.load(), side))
            assert np.array_equal(getattr(one, side)[1:3], getattr(two, side)[1:3])
    again = pickle.loads(pickle.dumps(in_file.image))
    assert np.array_equal(again[picked], in_memory.image[picked])


def test_a_head_sees_the_same_of_both(both):
    in_memory, in_file = both
    head = fit(replace(RECIPE, epochs=1), 3, in_memory).head
    np.testing.assert_allclose(
        predict_logits(head, in_memory.features), predict_logits(head, in_file.features), atol=1e-4
    )
    other = fit(replace(RECIPE, epochs=1), 3, in_file).head
    for side in ("image_input", "text_input"):
        for name in ("mean", "scale"):
            one, two = (getattr(getattr(each, side), name) for each in (head, other))
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
            unit = torch.nn.functional.normalize(torch.from_numpy(getattr(in_memory.features, side[:-6])).double())
            exact = unit.mean(dim=0) if name == "mean" else 1 / unit.std(dim=0, correction=0)
            torch.testing.assert_close(one.double(), exact, rtol=1e-4, atol=1e-5)


def test_an_epoch_sees_every_row_once_in_blocks_that_fit(both):
    features = both[1].features
    blocks = list(shuffled_blocks(features, torch.Generator().manual_seed(0)))
    assert len(blocks) > 3
    assert max(map(len, blocks)) <= features.at_once
    assert sorted(np.concatenate(blocks).tolist()) == list(range(N))
    for block in blocks:
        assert (np.diff(features.places[block]) > 0).all()  # in the order of the file
        assert np.ptp(features.places[block]) > 2 * len(block)  # from all over it
    others = list(shuffled_blocks(features, torch.Generator().manual_seed(1)))
    assert not np.array_equal(others[0], blocks[0])


def test_a_block_of_one_row_takes_no_step(both):
    """2,945 rows are 46 stretches of 64 and one of 1, here each a block."""
    rows = both[1].take(np.arange(46 * 64 + 1))
    small = replace(rows.features.image, max_bytes=1)
    rows = Rows(replace(rows.features, image=small), rows.classes)
    assert sorted(map(len, shuffled_blocks(rows.features, torch.Generator().manual_seed(0)))) == [1, *[64] * 46]
    for seed in range(3):
        (record,) = fit(replace(RECIPE, epochs=1, seed=seed), 3, rows).history
        assert 0.5 < record["train_loss"] < 2


@pytest.mark.parametrize("settings", [{}, {"views": True}, {"batch_size": 64}])
def test_a_head_learns_as_well_from_the_file(both, settings):
    recipe = replace(RECIPE, **settings)
    scores = []
    for rows in both:
        train, val = rows.take(np.arange(2400)), rows.take(np.arange(2400, N))
        found = fit(recipe, 3, train, val)
        scores.append(found.history[-1]["val_macro_f1"])
        assert np.isfinite([record["train_loss"] for record in found.history]).all()
    assert min(scores) > 0.8
    assert abs(scores[0] - scores[1]) < 0.05


def test_a_linear_head_needs_all_rows_at_once(both):
    with pytest.raises(MmcliError, match="all 3000 training rows in memory, and they do not fit: raise --max-memory"):
        fit(replace(RECIPE, head="linear"), 3, both[1])


def test_the_key_of_kept_fits_is_the_same(both):
    guids = [str(each) for each in range(N)]
    assert data_key("x", guids, both[0]) == data_key("x", guids, both[1])


def test_a_number_that_is_not_finite_is_found_when_it_is_read(cache_path, tmp_path):
    path = tmp_path / "features.h5"
    path.write_bytes(cache_path.read_bytes())
    with h5py.File(path, "r+") as file:
        file["text"][7, 3] = np.nan
    with FeatureCache.open(path) as cache:
        features = cache.features(["3", "7"], max_bytes=1)
        assert np.isfinite(features.image[np.array([1])]).all()
        with pytest.raises(
            CacheError, match="rows of text that are not finite or all zero: list them with `mmcli cache verify`"
        ):
            features.load()


def test_train_head_and_evaluate_with_little_memory(cache_path, both, tmp_path, monkeypatch):
    monkeypatch.setattr(labelled, "_PROCESS_BYTES", 10**9 - 30_000)
    monkeypatch.setattr(labelled, "_BYTES_PER_ROW", 0)
    monkeypatch.setattr(labelled, "_LEAST_BYTES", 0)
    seen = []
    original = labelled.features_for
    monkeypatch.setattr(labelled, "features_for", lambda *given: (seen.append(original(*given)), seen[-1])[1])
    labels = tmp_path / "labels.csv"
    order = np.random.default_rng(1).permutation(N)
    labels.write_text(
        "guid,tag\n" + "".join(f"{guid},{tag}\n" for guid, tag in zip(order, both[0].classes, strict=True))
    )
    command = ["--cache", str(cache_path), "--labels", str(labels), "--json"]
    limits = (["--max-memory", "1GB"], ["--max-memory", "1TB"])
    runs = ["train-head", "--runs", str(tmp_path / "runs"), "--epochs", "4", "--lr", "0.01", "--hidden", "8"]
    results = [json.loads(CliRunner().invoke(app, [*runs, *command, *limit]).stdout) for limit in limits]
    assert [features.places is not None for features in seen] == [True, True, True, False, False, False]
    assert abs(results[0]["test"]["macro_f1"] - results[1]["test"]["macro_f1"]) < 0.05
    for limit in limits:
        again = CliRunner().invoke(app, ["evaluate", "--from", results[0]["best_pt"], "--on", "test", *command, *limit])
        assert json.loads(again.stdout)["test"]["confusion"] == results[0]["test"]["confusion"]


def test_a_cache_that_is_replaced_meanwhile_is_an_error_and_not_the_rows_of_others(tmp_path):
    path, guids = tmp_path / "features.h5", [str(guid) for guid in range(20)]
    write_cache(path, synthetic_block(guids[2:]))
    with FeatureCache.open(path) as cache:
        features = cache.features(["12", "15"], max_bytes=1)
    write_cache(path, synthetic_block(guids))
    with pytest.raises(CacheError, match="changed by another command: run the same command again"):
        features.load()


def test_a_wide_row_is_not_read_with_thousands_of_its_neighbours(both, monkeypatch):
    in_memory, in_file = (rows.features for rows in both)
    monkeypatch.setattr(hdf5, "_WINDOW_BYTES", 200)
    assert np.array_equal(in_file.image[np.array([0, 1500, 7])], in_memory.image[[0, 1500, 7]])
    assert np.array_equal(in_file.load().views, in_memory.views)


def test_the_limit_is_shared_by_the_processes_and_by_the_one_that_waits():
    assert [labelled.share_of(1200, processes) for processes in (1, 2, 3)] == [1200, 400, 300]
    assert labelled.share_of(None, 4) is None


def test_no_rows_are_hashed_as_nothing(both):
    digest = hashlib.sha256()
    both[0].features.take(np.array([], dtype=np.int64)).hash_into(digest)
    assert digest.digest() == hashlib.sha256().digest()
