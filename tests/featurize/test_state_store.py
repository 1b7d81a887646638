"""What enters the unfrozen layers is kept beside the cache: computed once, resumed after a cut, never stale."""

import os
import pickle
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from mmcli.cache import BackboneError, DataError, DiskFullError, FeatureCache, LockedError
from mmcli.cache.atomic import writer_lock
from mmcli.featurize import FeaturizeOptions, featurize, open_backbone
from mmcli.featurize import state_store as store_module
from mmcli.featurize.source import Source
from mmcli.featurize.state_store import StateStore
from small_finetune import text_of
from tolerances import close_rows


@pytest.fixture
def cache(sixty):
    with FeatureCache.open(sixty) as opened:
        yield opened


def store_of(cache, tower="text", layers=1, **source):
    return StateStore(cache, tower, layers, Source(cache.header.identity, cache.header.backbone, **source))


def text_states(states):
    padded = states.padded()
    return [state[mask.astype(bool)] for state, mask in zip(padded.states, padded.mask, strict=True)]


@pytest.mark.parametrize("layers", [1, 3])
def test_states_are_what_the_tower_gives_below_those_layers(cache, tiny_clip, layers):
    guids = cache.guids[:20]
    states = store_of(cache, layers=layers).states(guids)
    encoder = open_backbone(str(tiny_clip)).load("cpu", "float32", None)
    data = cache.header.dataset["data"]
    for guid, state, length in zip(guids, text_states(states), states.lengths(), strict=True):
        ids, _ = encoder.tokenize([text_of(data, guid)])
        close_rows(state, encoder.texts_below(ids, layers)[0])
        assert length == len(ids[0])


def test_states_of_images(cache):
    states = store_of(cache, "image", 2).states(cache.guids[:5]).padded()
    assert states.states.shape == (5, 17, 32)
    assert states.ids is None


def test_the_second_time_the_backbone_is_not_even_opened(cache, monkeypatch):
    first = store_of(cache).states(cache.guids)
    monkeypatch.setattr(Source, "encoder", lambda *_: pytest.fail("the backbone was loaded"))
    seen = []
    second = store_of(cache).states(cache.guids[::-1], on_progress=lambda *each: seen.append(each))
    for one, other in zip(text_states(first), text_states(second)[::-1], strict=True):
        np.testing.assert_array_equal(one, other)
    assert seen == []


def test_depths_and_towers_are_kept_apart(cache):
    folders = {store_of(cache, tower, layers).folder for tower in ("text", "image") for layers in (1, 2)}
    assert len(folders) == 4


def test_a_cut_costs_the_block_at_work(cache, monkeypatch):
    whole = text_states(store_of(cache).states(cache.guids, keep=False))
    monkeypatch.setattr(store_module, "_FILE_ROWS", 16)
    written = []
    original = store_module.write_part

    def killed(*arguments, **options):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(original(*arguments, **options))

    monkeypatch.setattr(store_module, "write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        store_of(cache).states(cache.guids)
    monkeypatch.setattr(store_module, "write_part", original)
    seen = []
    states = store_of(cache).states(cache.guids, on_progress=lambda *each: seen.append(each))
    assert seen[0] == (0, 60 - 32)
    for one, other in zip(whole, text_states(states), strict=True):
        close_rows(one, other)


def test_rows_sent_to_another_process_are_read_there(cache):
    states = store_of(cache).states(cache.guids[:7])
    sent = pickle.dumps(states)
    assert len(sent) < 5000  # names of files, not their content
    for one, other in zip(text_states(states), text_states(pickle.loads(sent)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture
def own(raw_sixty, tiny_clip, tmp_path):
    """A dataset of its own, to be damaged, and its cache."""
    folder = tmp_path / "own"
    shutil.copytree(raw_sixty[0], folder)
    out = tmp_path / "own.h5"
    options = FeaturizeOptions(backbone=str(tiny_clip), dtype="float32")

    def again():
        featurize(folder, raw_sixty[1], out, options)
        return out

    again()
    return folder, again


def test_an_edited_pair_alone_is_computed_again(own):
    folder, again = own
    with FeatureCache.open(again()) as cache:
        store_of(cache).states(cache.guids)
    (folder / "7.txt").write_text("something else")
    with FeatureCache.open(again()) as cache:
        seen = []
        states = store_of(cache).states(cache.guids, on_progress=lambda *each: seen.append(each))
        assert seen[0] == (0, 1)
        direct = store_of(cache).states(["7"], keep=False)
        close_rows(text_states(states)[cache.guids.index("7")], text_states(direct)[0])


def test_raw_pairs_that_changed_or_went_since_they_were_featurized(own):
    folder, again = own
    with FeatureCache.open(again()) as cache:
        (folder / "7.txt").write_text("something else")
        with pytest.raises(DataError, match=r"1 of 60 raw pairs in .*own have changed .* '7': run `mmcli featurize`"):
            store_of(cache).states(cache.guids)
        os.remove(folder / "9.txt")
        with pytest.raises(DataError, match=r"1 of 60 in .*own cannot be read .* '9': text missing: bring them back"):
            store_of(cache).states(cache.guids)
        assert not store_of(cache).kept


def test_an_image_that_is_gone_does_not_matter_to_the_text_tower(own):
    folder, again = own
    with FeatureCache.open(again()) as cache:
        os.remove(folder / "9.jpg")
        assert len(store_of(cache).states(cache.guids)) == 60
        with pytest.raises(DataError, match="'9': image missing"):
            store_of(cache, "image").states(cache.guids)


def test_raw_pairs_that_were_moved_are_found_where_they_are_now(own, tmp_path):
    folder, again = own
    with FeatureCache.open(again()) as cache:
        shutil.move(folder, tmp_path / "elsewhere")
        with pytest.raises(DataError, match="no such folder"):
            store_of(cache).states(cache.guids)
        assert len(store_of(cache, data=tmp_path / "elsewhere").states(cache.guids)) == 60


def test_another_backbone_under_the_old_name(cache, tiny_clip, tmp_path):
    other = shutil.copytree(tiny_clip, tmp_path / "other")
    config = other / "preprocessor_config.json"
    config.write_text(config.read_text().replace('"shortest_edge": 64', '"shortest_edge": 70'))
    store = StateStore(cache, "text", 1, Source(cache.header.identity, {"name": str(other), "revision": None}))
    with pytest.raises(BackboneError, match="is not the backbone that the head was trained with"):
        store.states(cache.guids)


def test_a_second_writer_is_refused(cache):
    store = store_of(cache)
    with writer_lock(store.folder), pytest.raises(LockedError, match="wait until it ends, then run"):
        store.states(cache.guids)


def _damage(name):
    def change(path):
        with h5py.File(path, "r+") as file:
            file[name][...] = 0

    return change


def _without_digests(path):
    with h5py.File(path, "r+") as file:
        del file["row/text_sha256"]


def _cut_off(path):
    path.write_bytes(path.read_bytes()[:2000])


def _empty(path):
    path.write_bytes(b"")


DAMAGES = {
    "states": _damage("text_tokens"),
    "offsets": _damage("text_offsets"),
    "token ids": _damage("text_ids"),
    "no digests": _without_digests,
    "cut off": _cut_off,
    "empty": _empty,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states_are_computed_again(cache, damage):
    whole = text_states(store_of(cache).states(cache.guids))
    folder = Path(store_of(cache).folder)
    (folder / "part-x.h5").write_bytes(b"something of a stranger")
    (part,) = folder.glob("part-0*.h5")
    DAMAGES[damage](part)
    seen = []
    again = store_of(cache).states(cache.guids, on_progress=lambda *each: seen.append(each))
    assert seen[0] == (0, 60)
    for one, other in zip(whole, text_states(again), strict=True):
        close_rows(one, other)


def test_what_a_killed_writer_left_is_removed(cache):
    folder = Path(store_of(cache).folder)
    folder.mkdir(parents=True)
    (folder / ".part-000000.h5.12345.tmp").write_bytes(b"half a file")
    store_of(cache).states(cache.guids)
    assert [path.name for path in folder.iterdir()] == ["part-000000.h5"]


def test_large_states_are_written_in_smaller_blocks(cache, monkeypatch):
    monkeypatch.setattr(store_module, "_FILE_BYTES", 20_000)
    states = store_of(cache, "image", 3).states(cache.guids)  # 17 x 32 float32 each
    assert [len(part.states) for part in states.parts] == [9] * 6 + [6]


def test_a_disk_without_room_is_found_out_before_the_work(cache, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(store_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"not enough disk space beside .* MB needed, 0 MB free"):
        store_of(cache).states(cache.guids)
    assert len(store_of(cache).states(cache.guids, keep=False)) == len(cache)  # what is not kept needs no room


def test_rows_asked_for_bit_by_bit_look_through_the_pairs_once(cache, monkeypatch):
    """As for a cache in a folder that cannot be written to: nothing is kept, and the dataset is not listed anew."""
    store, listed = store_of(cache), []
    original = Source.dataset

    def spy(self, *arguments):
        listed.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(Source, "dataset", spy)
    guids = cache.guids[:12]
    bits = [text_states(store.states(guids[start : start + 4], keep=False)) for start in range(0, 12, 4)]
    assert len(listed) == 1
    together = text_states(store_of(cache).states(guids))
    for one, other in zip([state for bit in bits for state in bit], together, strict=True):
        close_rows(one, other)
