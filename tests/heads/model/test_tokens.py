"""Token states: read in memory or in blocks, and the head that looks at them."""

import pickle
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from conftest import header, synthetic_block, write_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcli.cache import CacheError, FeatureCache
from mmcli.cache.features import StoredTokens
from mmcli.heads import Recipe, Rows, fit, predict_logits
from mmcli.heads.model.inputs import token_batches

N, PLACES, IMAGE_WIDTH, TEXT_WIDTH = 60, 4, 12, 5


def cache_with_tokens(folder, n=N, views=0):
    block = synthetic_block([str(guid) for guid in range(n)])
    random = np.random.default_rng(3)
    block.columns["image_tokens"] = random.standard_normal((n, PLACES, IMAGE_WIDTH)).astype(np.float16)
    if views:
        block.columns["image_views"] = random.standard_normal((n, views, 8)).astype(np.float32)
    lengths = random.integers(0, 6, n)
    block.text_tokens = [random.standard_normal((length, TEXT_WIDTH)).astype(np.float16) for length in lengths]
    return write_cache(folder / "features.h5", block, header()), block


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return cache_with_tokens(tmp_path_factory.mktemp("tokens"))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, N - 1), min_size=1, max_size=20), st.sampled_from([None, 0, 10**9]))
def test_tokens_are_those_of_the_rows_asked_for(stored, rows, max_bytes):
    path, block = stored
    with FeatureCache.open(path) as cache:
        tokens = cache.features([str(row) for row in rows], tokens=True, max_bytes=max_bytes).tokens
        assert isinstance(tokens, StoredTokens) == (max_bytes == 0)
        found = tokens.load().padded()
        assert tokens.widths == (IMAGE_WIDTH, TEXT_WIDTH)
        picked = tokens.take(np.array([len(rows) - 1])).load().padded()
    for place, row in enumerate(rows):
        assert np.array_equal(found.image[place], block.columns["image_tokens"][row])
        length = len(block.text_tokens[row])
        assert found.mask[place].sum() == length
        assert np.array_equal(found.text[place, :length], block.text_tokens[row])
        assert not found.text[place, length:].any()
    assert np.array_equal(picked.image[0], block.columns["image_tokens"][rows[-1]])


def test_stored_tokens_can_be_sent_to_another_process(stored):
    with FeatureCache.open(stored[0]) as cache:
        tokens = cache.features(["3", "1"], tokens=True, max_bytes=0).tokens
        expected = tokens.load().padded()
        again = pickle.loads(pickle.dumps(tokens))
    assert np.array_equal(again.load().padded().image, expected.image)


def test_batches_are_the_same_in_memory_and_in_blocks_from_the_file(stored):
    guids = [str(row) for row in range(N)]
    order = np.random.default_rng(0).permutation(N)
    with FeatureCache.open(stored[0]) as cache:
        in_memory = cache.features(guids, tokens=True)
        size = sum(array.nbytes for array in (in_memory.tokens.image, in_memory.tokens.text))
        in_blocks = cache.features(guids, tokens=True, max_bytes=size // 2)
        assert in_blocks.tokens.at_once < N // 2
        pairs = [token_batches(each, True, order, 7, "cpu") for each in (in_memory, in_blocks)]
        for one, other in zip(*pairs, strict=True):
            assert torch.equal(one.image, other.image)
            assert torch.equal(one.mask, other.mask)
            assert torch.equal(one.text, other.text)


def test_training_on_tokens_left_in_the_file_gives_the_same_bits(stored):
    guids = [str(row) for row in range(N)]
    classes = np.arange(N) % 3
    recipe = Recipe(fusion="cross_attn", epochs=3, hidden=(8,), batch_size=7)
    states = []
    with FeatureCache.open(stored[0]) as cache:
        for max_bytes in (None, N * cache.row_bytes()):
            rows = Rows(cache.features(guids, tokens=True, max_bytes=max_bytes), classes)
            assert isinstance(rows.features.tokens, StoredTokens) == (max_bytes is not None)
            assert rows.features.places is None
            states.append(fit(recipe, 3, rows.take(np.arange(40)), rows.take(np.arange(40, N))).head.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_attention_has_its_own_learning_rate(stored):
    rows = None
    with FeatureCache.open(stored[0]) as cache:
        rows = Rows(cache.features([str(row) for row in range(N)], tokens=True), np.arange(N) % 3)
    recipe = Recipe(fusion="cross_attn", epochs=1, hidden=(8,), weight_decay=0.0, lr_attn=1e-30)
    heads = [fit(each, 3, rows, rows).head for each in (recipe, replace(recipe, lr_attn=1e-2))]
    torch.manual_seed(recipe.seed)
    from mmcli.heads import Head
    from mmcli.heads.model.head import sizes_of

    start = Head(sizes_of(rows.features), 3, recipe)
    for name, parameter in start.named_parameters():
        still, moved = (dict(head.named_parameters())[name] for head in heads)
        if name.startswith("fusion.attention."):
            assert torch.allclose(parameter, still, atol=1e-12), name
            assert name.endswith("key.linear.bias") or not torch.equal(parameter, moved), name
        else:
            assert not torch.equal(parameter, still), name


def test_the_tokens_matter(stored):
    with FeatureCache.open(stored[0]) as cache:
        features = cache.features([str(row) for row in range(N)], tokens=True)
    rows = Rows(features, np.arange(N) % 3)
    head = fit(Recipe(fusion="cross_attn", epochs=2, hidden=(8,)), 3, rows, rows).head
    other = replace(features.tokens, image=features.tokens.image[::-1].copy())
    changed = predict_logits(head, replace(features, tokens=other))
    assert not np.allclose(predict_logits(head, features), changed)


def test_tokens_and_views_that_are_not_there(tmp_path):
    path = write_cache(tmp_path / "plain.h5", synthetic_block(["0", "1"]))
    with FeatureCache.open(path) as cache:
        with pytest.raises(CacheError, match=r"no token states: run `mmcli featurize /none --out .*plain.h5 --tokens`"):
            cache.features(["0"], tokens=True)
        with pytest.raises(CacheError, match=r"no augmented views: run `mmcli featurize .* --views 4`"):
            cache.features(["0"], views=True)


def test_damaged_tokens_are_said_to_be(tmp_path):
    path, _ = cache_with_tokens(tmp_path)
    with h5py.File(path) as file:
        place = file["text_tokens"].id.get_chunk_info(0).byte_offset
    with path.open("r+b") as file:
        file.seek(place + 4)
        file.write(b"\xff\x00\xff\x00")
    with FeatureCache.open(path) as cache:
        with pytest.raises(CacheError, match="is damaged: token states cannot be read"):
            cache.features(["1"], tokens=True)
        with pytest.raises(CacheError, match="is damaged: text_tokens cannot be read"):
            cache.text_tokens(int(np.argmax([5])) + 1)


def test_cross_attention_is_the_same_to_the_bit_in_processes_of_its_own(stored, tmp_path):
    from mmcli.heads import RunOptions, train_head

    labels = tmp_path / "labels.csv"
    labels.write_text("guid,tag\n" + "".join(f"{row},{'abc'[row % 3]}\n" for row in range(N)))
    recipe = Recipe(fusion="cross_attn", epochs=2, hidden=(8,))
    runs = [
        train_head(stored[0], labels, recipe, options=RunOptions(tmp_path / f"jobs{jobs}", seeds=2, jobs=jobs))
        for jobs in (1, 2)
    ]
    first, second = (Path(run.best_pt).read_bytes() for run in runs)
    assert first == second


def test_tokens_that_are_not_finite_are_said_to_be(tmp_path):
    path, block = cache_with_tokens(tmp_path)
    block.columns["image_tokens"][7, 0, 0] = np.inf
    write_cache(path, block, header())
    with FeatureCache.open(path) as cache:
        assert len(cache.features(["6", "8"], tokens=True)) == 2
        with pytest.raises(CacheError, match="token states that are not finite, such as '7'"):
            cache.features(["6", "7", "8"], tokens=True)


def test_views_do_not_change_the_order_of_rows(tmp_path, monkeypatch):
    from mmcli.heads.training import training_rows

    path, _ = cache_with_tokens(tmp_path, views=3)
    with FeatureCache.open(path) as cache:
        rows = Rows(cache.features([str(row) for row in range(N)], views=True), np.arange(N) % 3)
    seen = []
    original = training_rows.token_batches
    monkeypatch.setattr(
        training_rows, "token_batches", lambda *given: (seen.append(given[2].tolist()), original(*given))[1]
    )
    for modality in ("both", "text"):
        fit(Recipe(epochs=3, hidden=(8,), views=True, modality=modality), 3, rows, rows)
    assert seen[:3] == seen[3:]


@pytest.mark.parametrize("name", ["text_offsets", "text_tokens", "image_tokens"])
def test_a_flipped_byte_in_token_states_is_found_when_they_are_read(tmp_path, name):
    path, _ = cache_with_tokens(tmp_path)
    with h5py.File(path) as file:
        offset = file[name].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 20] ^= 0xFF
    path.write_bytes(content)
    with FeatureCache.open(path) as cache, pytest.raises(CacheError, match="damaged"):
        cache.features(cache.guids, tokens=True)
