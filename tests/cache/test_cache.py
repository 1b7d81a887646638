import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import header, synthetic_block, write_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmcli.cache import CacheError, DiskFullError, FeatureCache, LockedError, MmcliError
from mmcli.cache.atomic import atomic_path, write_text, writer_lock
from mmcli.cache.export import export_npy, export_parquet
from mmcli.cache.labels import guid_of
from mmcli.cache.parts import merge, read_parts, write_part
from mmcli.cache.schema import describe_difference, fingerprint_of
from mmcli.cache.store import verify

LETTERS = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
GUIDS = st.lists(st.text(LETTERS, min_size=1), min_size=1, max_size=40, unique_by=guid_of)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(guids=GUIDS, seed=st.integers(0, 5), shuffle=st.randoms(use_true_random=False))
def test_write_then_read_is_identity_in_any_order(tmp_path, guids, seed, shuffle):
    block = synthetic_block(guids, seed=seed)
    path = write_cache(tmp_path / "features.h5", block)
    asked = list(guids)
    shuffle.shuffle(asked)
    with FeatureCache.open(path) as cache:
        assert cache.guids == [guid_of(guid) for guid in guids]
        image, text = cache.embeddings(asked)
        digests = cache.digests()
    for position, guid in enumerate(asked):
        row = guids.index(guid)
        assert np.array_equal(image[position], block.columns["image"][row])
        assert np.array_equal(text[position], block.columns["text"][row])
        assert digests[row][0] == block.columns["row/image_sha256"][row].tobytes()


def test_reading_few_rows_far_apart_and_repeated_ones(tmp_path):
    block = synthetic_block([str(number) for number in range(9000)], dim=2)
    with FeatureCache.open(write_cache(tmp_path / "f.h5", block)) as cache:
        for seed in range(3):
            rows = np.random.default_rng(seed).integers(0, 9000, 500)
            assert np.array_equal(cache.read("text", rows), block.columns["text"][rows])
        rows = np.array([8999, 0, 500, 0])
        assert np.array_equal(cache.read("image", rows), block.columns["image"][rows])
        assert cache.read("image", np.array([], dtype=np.int64)).shape == (0, 2)


def test_tokens_and_views_survive_a_merge_of_several_parts(tmp_path):
    random = np.random.default_rng(0)
    parts, rows, expected = [], [], {}
    for number in range(3):
        guids = [f"{number}-{index}" for index in range(5)]
        block = synthetic_block(guids, seed=number)
        block.columns["image_views"] = random.standard_normal((5, 2, 8)).astype(np.float32)
        block.columns["image_tokens"] = random.standard_normal((5, 4, 6)).astype(np.float16)
        block.text_tokens = [random.standard_normal((1 + index, 6)).astype(np.float16) for index in range(5)]
        parts.append(write_part(tmp_path / "parts", number, block, header()))
        rows += [(guid, parts[-1], row) for row, guid in enumerate(guids)]
        expected |= {guid: (block, row) for row, guid in enumerate(guids)}
    rows = rows[::-1]
    merge(tmp_path / "f.h5", rows, header())
    with FeatureCache.open(tmp_path / "f.h5") as cache:
        assert cache.n_views == 2
        assert cache.has_tokens
        for row, guid in enumerate(cache.guids):
            block, source = expected[guid]
            assert np.array_equal(cache.text_tokens(row), block.text_tokens[source])
            for name in ("image_views", "image_tokens"):
                assert np.array_equal(cache.file[name][row], block.columns[name][source])


def test_a_merge_may_read_the_file_that_it_replaces(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a", "b", "c"]))
    part = write_part(tmp_path / "parts", 1, synthetic_block(["b"], seed=9), header())
    merge(path, [("a", path, 0), ("b", part, 0), ("c", path, 2)], header())
    with FeatureCache.open(path) as cache:
        image, _ = cache.embeddings(["b", "c"])
    assert np.array_equal(image[0], synthetic_block(["b"], seed=9).columns["image"][0])
    assert np.array_equal(image[1], synthetic_block(["a", "b", "c"]).columns["image"][2])


def test_missing_rows_are_named(tmp_path):
    cache = FeatureCache.open(write_cache(tmp_path / "f.h5", synthetic_block(["a"])))
    with cache, pytest.raises(CacheError, match=r"2 of 3 pairs are not in .*'x'"):
        cache.rows(["a", "x", "y"])


def test_files_that_are_no_cache(tmp_path):
    with pytest.raises(CacheError, match="no feature cache at"):
        FeatureCache.open(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(CacheError, match="not a readable HDF5 file"):
        FeatureCache.open(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = [1]
    with pytest.raises(CacheError, match="not a feature cache of mmcli"):
        FeatureCache.open(tmp_path / "foreign.h5")
    for schema, words in (("v1", "schema v1"), (1, "the header of .* is damaged")):
        with h5py.File(tmp_path / "foreign.h5", "w") as file:
            file["guid"] = [1]
            file.attrs["schema"] = schema
        with pytest.raises(CacheError, match=words):
            FeatureCache.open(tmp_path / "foreign.h5")


def test_a_file_that_was_cut_off(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block([str(number) for number in range(500)]))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CacheError, match="cut off"):
        FeatureCache.open(path)


@pytest.mark.parametrize("name", ["image", "guid", "row/text_sha256", "row/codec"])
def test_a_flipped_byte_is_found_when_it_is_read(tmp_path, name):
    path = write_cache(tmp_path / "f.h5", synthetic_block([str(number) for number in range(500)], dim=64))
    with h5py.File(path) as file:
        offset = file[name].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset + 100] ^= 0xFF
    path.write_bytes(content)
    with FeatureCache.open(path) as cache, pytest.raises(CacheError, match="damaged"):
        _ = cache.guids, cache.embeddings(), cache.digests(), cache.codecs()


def test_another_schema_and_another_backbone_are_named(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a"]))
    with (
        FeatureCache.open(path) as cache,
        pytest.raises(CacheError, match=r"synthetic.*dtype.*: float32, not bfloat16"),
    ):
        cache.check(header(dtype="bfloat16").identity, "another")
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = 99
    with pytest.raises(CacheError, match="schema 99, but this mmcli reads schema 1"):
        FeatureCache.open(path)


def test_the_fingerprint_does_not_depend_on_order_or_on_the_place_of_the_weights():
    assert fingerprint_of({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint_of({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})
    assert describe_difference({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 1}) == ["a.b: 1, not 2"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")

    def interrupted():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file.txt"]


LIMITED = """
import resource, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/support"]
from conftest import header, synthetic_block
from mmcli.cache import DiskFullError
from mmcli.cache.parts import merge, write_part
folder, block = Path(sys.argv[2]), synthetic_block([str(n) for n in range(2000)], dim=64)
part = write_part(folder / "parts", 0, block, header())
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # the kernel refuses, as on a full disk
rows = [(guid, part, row) for row, guid in enumerate(block.guids)]
for write in (lambda: write_part(folder / "parts", 1, block, header()), lambda: merge(folder / "f.h5", rows, header())):
    try:
        write()
    except DiskFullError as error:
        print(error)
"""


def test_a_full_disk_is_said_so_and_costs_nothing_finished(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a"]))
    before = path.read_bytes()
    command = [sys.executable, "-c", LIMITED, str(Path(__file__).parents[1]), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("not enough disk space to write") == 2, done.stdout + done.stderr
    assert path.read_bytes() == before
    assert [part.name for part in read_parts(tmp_path / "parts", header())] == ["part-000000.h5"]
    assert not list(tmp_path.rglob("*.tmp"))


def test_no_merge_is_begun_without_room(tmp_path, monkeypatch):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a"]))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10}))
    with pytest.raises(DiskFullError, match="MB needed"):
        merge(path, [("a", path, 0)], header())


HOLDER = """
import sys
from pathlib import Path
from mmcli.cache.atomic import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_writer_is_refused_at_once_and_a_dead_one_is_forgotten(tmp_path):
    path = tmp_path / "f.h5"
    command = [sys.executable, "-c", HOLDER, str(path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(LockedError, match="another mmcli is writing"), writer_lock(path):
        pass
    other.kill()
    other.communicate()
    with writer_lock(path):
        pass


def test_parts_that_cannot_be_used_are_passed_over(tmp_path):
    good = write_part(tmp_path, 0, synthetic_block(["a"]), header())
    other = write_part(tmp_path, 1, synthetic_block(["b"]), header(dtype="bfloat16"))
    broken = tmp_path / "part-000002.h5"
    broken.write_bytes(good.read_bytes()[:100])
    assert read_parts(tmp_path, header()) == [good]
    assert other.exists()
    assert broken.exists()


def test_verify_sorts_rows_by_what_is_wrong(tmp_path):
    block = synthetic_block(["same", "changed", "gone", "nan", "zero"])
    block.columns["image"][3, 0] = np.nan
    block.columns["text"][4] = 0
    with FeatureCache.open(write_cache(tmp_path / "f.h5", block)) as cache:
        now = dict(zip(cache.guids, cache.digests(), strict=True))
        now["changed"], now["gone"] = (b"other", b"other"), None
        problems = verify(cache, now.get)
    assert problems == {"changed": ["changed"], "gone": ["gone"], "non_finite": ["nan"], "all_zero": ["zero"]}


def test_an_output_that_would_destroy_something_is_refused(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a"]))
    (tmp_path / "other.txt").write_text("something of value")
    with FeatureCache.open(path) as cache:
        for target, words in ((path, "an input"), (tmp_path / "other.txt", "another kind"), (tmp_path, "a folder")):
            with pytest.raises(MmcliError, match=words):
                export_parquet(cache, target)


def test_a_part_that_is_missing_in_the_middle_mixes_nothing_up(tmp_path):
    good, other = (write_part(tmp_path / "parts", n, synthetic_block([f"g{n}"], seed=n), header()) for n in (0, 1))
    with pytest.raises(CacheError, match="was changed by another command"):
        merge(tmp_path / "f.h5", [("g0", good, 0), ("g0b", other, 0)], header())
    assert not (tmp_path / "f.h5").exists()


def test_exports_hold_the_same_numbers(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    block = synthetic_block(["a", "b", "c"], store=np.float16)
    with FeatureCache.open(write_cache(tmp_path / "f.h5", block)) as cache:
        export_npy(cache, tmp_path / "npy")
        export_parquet(cache, tmp_path / "f.parquet")
    assert np.array_equal(np.load(tmp_path / "npy" / "text.npy"), block.columns["text"])
    assert (tmp_path / "npy" / "guids.txt").read_text().split() == block.guids
    table = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert table["guid"] == block.guids
    assert np.array_equal(np.array(table["image"], np.float32), block.columns["image"].astype(np.float32))


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_structure_is_no_traceback_when_it_is_opened(tmp_path, seed):
    path, random = write_cache(tmp_path / "f.h5", synthetic_block(["a", "b"])), np.random.default_rng(seed)
    whole = path.read_bytes()
    refused = 0
    for place in random.integers(0, min(len(whole), 8000), 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << int(random.integers(8)))]) + whole[place + 1 :])
        try:
            FeatureCache.open(path).close()
        except CacheError:
            refused += 1
    assert refused


def test_rows_that_a_damaged_file_reads_as_zeros_are_no_features(tmp_path):
    block = synthetic_block(["a", "b", "c"])
    block.columns["text"][1] = 0
    path = write_cache(tmp_path / "f.h5", block)
    for most in (None, 1):
        with FeatureCache.open(path) as cache, pytest.raises(CacheError, match="not finite or all zero"):
            cache.features(["a", "b", "c"], max_bytes=most).load()
    with FeatureCache.open(path) as cache:
        assert len(cache.features(["a", "c"])) == 2
        assert len(cache.features([])) == 0


def test_a_cache_that_lost_rows_is_damaged(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a", "b", "c"]))
    for name in ("image", "row/codec", "guid"):
        shutil.copy(path, tmp_path / "short.h5")
        with h5py.File(tmp_path / "short.h5", "a") as file:
            kept = file[name][:2]
            del file[name]
            file[name] = kept
        with pytest.raises(CacheError, match=f"is damaged: {name}.*2 rows instead of 3"):
            FeatureCache.open(tmp_path / "short.h5")
