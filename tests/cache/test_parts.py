"""Parts of an interrupted run: what is damaged is computed again, and never goes into the cache."""

import os
import time
from random import Random

import h5py
import numpy as np
import pytest
from conftest import content, header, synthetic_block, write_pair
from mmcli.cache import FeatureCache
from mmcli.cache.parts import merge, parts_folder, read_parts, remove_parts, write_part
from mmcli.featurize import FeaturizeOptions, featurize, pipeline


def block_with_tokens(n=6):
    random = np.random.default_rng(0)
    block = synthetic_block([f"guid {number}" for number in range(n)], 12)
    block.columns["image_views"] = random.standard_normal((n, 2, 12)).astype(np.float32)
    block.columns["image_tokens"] = random.standard_normal((n, 3, 5)).astype(np.float16)
    block.text_tokens = [random.standard_normal((1 + number, 5)).astype(np.float16) for number in range(n)]
    return block


def merged(part, target):
    with FeatureCache.open(part) as opened:
        rows = [(guid, part, row) for row, guid in enumerate(opened.guids)]
    merge(target, rows, header())
    with FeatureCache.open(target) as cache:
        cleaned = [cache.file[name][:].tobytes() for name in ("row/cleaned_sha256", "row/truncated", "text_offsets")]
    return content(target), cleaned


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_anywhere_in_a_part_is_found_or_changes_nothing(tmp_path, seed):
    part, random = write_part(tmp_path, 0, block_with_tokens(), header()), Random(seed)
    whole, expected = part.read_bytes(), merged(part, tmp_path / "whole.h5")
    found = 0
    for _ in range(120):
        place = random.randrange(len(whole))
        part.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << random.randrange(8))]) + whole[place + 1 :])
        if read_parts(tmp_path, header()):
            assert merged(part, tmp_path / "f.h5") == expected, place
        else:
            found += 1
    assert found > 60


@pytest.mark.parametrize("seed", range(3))
def test_damage_anywhere_in_a_part_is_no_traceback(tmp_path, seed):
    part, random = write_part(tmp_path, 0, block_with_tokens(), header()), Random(seed)
    whole = part.read_bytes()
    for _ in range(40):
        place, length = random.randrange(len(whole)), random.randrange(1, 200)
        part.write_bytes(whole[:place] + random.randbytes(length) + whole[place + length :])
        assert len(read_parts(tmp_path, header())) <= 1


@pytest.mark.parametrize("name", ["image", "text", "row/cleaned_sha256", "row/image_sha256", "guid"])
def test_a_flipped_bit_costs_the_part_and_is_not_in_the_result(tmp_path, free, monkeypatch, name):
    for guid in range(1, 13):
        write_pair(tmp_path / "data", guid)
    options = FeaturizeOptions(dtype="float32", batch_size=2)
    featurize(tmp_path / "data", None, tmp_path / "one.h5", options)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        featurize(tmp_path / "data", None, tmp_path / "f.h5", options)
    monkeypatch.setattr(pipeline, "merge", merge)
    first = min((tmp_path / "f.h5.parts").rglob("part-*.h5"))
    with h5py.File(first) as file:
        stored = file[name][:].tobytes()
    whole = first.read_bytes()
    place = whole.index(stored) + len(stored) // 2
    first.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    summary = featurize(tmp_path / "data", None, tmp_path / "f.h5", options)
    assert (summary.resumed, summary.computed) == (7, 5)
    assert content(tmp_path / "f.h5") == content(tmp_path / "one.h5")
    assert not (tmp_path / "f.h5.parts").exists()


def test_an_offset_of_token_states_has_a_checksum_in_the_final_file(tmp_path):
    part = write_part(tmp_path, 0, block_with_tokens(), header())
    merged(part, tmp_path / "f.h5")
    with h5py.File(tmp_path / "f.h5") as file:
        without = [name for name in file if isinstance(file[name], h5py.Dataset) and not file[name].fletcher32]
        without += [name for name in file["row"] if not file["row"][name].fletcher32]
    assert without == []


def test_parts_that_nobody_went_on_with_for_a_month_go(tmp_path):
    out = tmp_path / "f.h5"
    for made, days in ((header(), 0), (header(dtype="old"), 40), (header(dtype="new"), 3)):
        folder = parts_folder(out, made.fingerprint)
        write_part(folder, 0, synthetic_block(["a"]), made)
        os.utime(folder, (time.time() - days * 86_400,) * 2)
    remove_parts(out, header().fingerprint)
    assert [path.name for path in (tmp_path / "f.h5.parts").iterdir()] == [header(dtype="new").fingerprint[:16]]
    remove_parts(out, header(dtype="new").fingerprint)
    assert not (tmp_path / "f.h5.parts").exists()
