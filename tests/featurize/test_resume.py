"""Whatever interrupts featurize, the next run ends as if nothing had."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import content, write_pair
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmcli.cache import LockedError, atomic
from mmcli.featurize import FeaturizeOptions, featurize, pipeline, plan

OPTIONS = FeaturizeOptions(dtype="float32")


class Cut(BaseException):
    """The machine dies."""


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(1, 12), min_size=1, max_size=3), tokens=st.booleans())
def test_resuming_after_any_cut_equals_one_go(tmp_path_factory, free, cuts, tokens):
    """A cut falls on any step that changes the disk: a part's or the file's fsync, or its rename."""
    tmp_path = tmp_path_factory.mktemp("cut")
    for guid in range(1, 24):
        write_pair(tmp_path / "data", guid)
    (tmp_path / "data" / "9.jpg").write_bytes(b"broken")
    options = FeaturizeOptions(dtype="float32", tokens=tokens, views=int(tokens), max_reject_rate=0.5, batch_size=2)
    featurize(tmp_path / "data", None, tmp_path / "one.h5", options)
    computed = []
    for cut in cuts:
        steps = [cut]

        def step(do, steps=steps):
            def run(*arguments):
                steps[0] -= 1
                if steps[0] == 0:
                    raise Cut
                return do(*arguments)

            return run

        free.loaded.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(atomic, "fsync", step(atomic.fsync))
            patch.setattr("os.replace", step(os.replace))
            with contextlib.suppress(Cut):
                featurize(tmp_path / "data", None, tmp_path / "f.h5", options)
        computed.append(free.images)
    free.loaded.clear()
    summary = featurize(tmp_path / "data", None, tmp_path / "f.h5", options)
    assert content(tmp_path / "f.h5") == content(tmp_path / "one.h5")
    assert summary.rows == 22
    passes = 2 if tokens else 1  # a view is an image more
    assert sum(computed) + free.images <= passes * (22 + 10 * len(cuts))  # a cut costs the blocks at work, no more
    assert not list(tmp_path.rglob("*.tmp"))


KILLED = """
import os, signal, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/support"]
from free_backbone import FreeBackbone
from mmcli.featurize import FeaturizeOptions, featurize, pipeline, plan
backbone, left, replace = FreeBackbone(), int(sys.argv[4]), os.replace
pipeline.open_backbone = lambda name, revision=None: backbone
plan.BLOCK_ROWS = 5
def replace_then_die(*paths):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
os.replace = replace_then_die
featurize(sys.argv[2], None, sys.argv[3], FeaturizeOptions(dtype="float32"))
print(backbone.images)
"""


def test_kill_minus_nine_loses_at_most_a_block(pairs, tmp_path, free):
    folder, _ = pairs(18)
    featurize(folder, None, tmp_path / "one.h5", OPTIONS)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parents[1]), str(folder), str(tmp_path / "f.h5")]
    for _ in range(3):  # each dies when it is about to put its second part, or the file, in place
        assert subprocess.run([*command, "2"], capture_output=True).returncode == -9
    last = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    assert int(last.stdout) <= 5  # three parts were finished, one by each
    assert content(tmp_path / "f.h5") == content(tmp_path / "one.h5")


def test_a_gap_in_the_parts_of_a_killed_run_mixes_nothing_up(pairs, tmp_path, free, monkeypatch):
    folder, _ = pairs(18)
    featurize(folder, None, tmp_path / "one.h5", OPTIONS)
    monkeypatch.setattr(pipeline, "merge", lambda *arguments: (_ for _ in ()).throw(Cut()))
    with pytest.raises(Cut):
        featurize(folder, None, tmp_path / "f.h5", OPTIONS)
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "open_backbone", lambda name, revision=None: free)
    monkeypatch.setattr(plan, "BLOCK_ROWS", 5)
    parts = sorted(tmp_path.rglob("part-*.h5"))
    assert len(parts) == 4
    parts[0].write_bytes(parts[0].read_bytes()[:500])
    parts[1].unlink()
    summary = featurize(folder, None, tmp_path / "f.h5", OPTIONS)
    assert (summary.resumed, summary.computed) == (8, 10)
    assert content(tmp_path / "f.h5") == content(tmp_path / "one.h5")


def test_the_lock_is_held_while_featurizing(pairs, tmp_path, free):
    folder, _ = pairs(3)
    seen = []

    def try_to_write(done, total):
        with pytest.raises(LockedError):
            featurize(folder, None, tmp_path / "f.h5", OPTIONS)
        seen.append(done)

    featurize(folder, None, tmp_path / "f.h5", OPTIONS, try_to_write)
    assert seen


def test_leftovers_of_a_killed_writer_are_removed_and_no_others(pairs, tmp_path, free):
    folder, _ = pairs(3)
    mine, foreign = tmp_path / ".f.h5.123.tmp", tmp_path / ".f.h5.bak.h5.123.tmp"
    for path in (mine, foreign):
        path.write_bytes(b"half")
    featurize(folder, None, tmp_path / "f.h5", OPTIONS)
    assert (mine.exists(), foreign.exists()) == (False, True)


def test_parts_of_a_merge_that_was_finished_are_not_merged_again(pairs, tmp_path, free, monkeypatch):
    folder, _ = pairs(12)
    out = tmp_path / "f.h5"
    monkeypatch.setattr(pipeline, "remove_parts", lambda *arguments: None)
    featurize(folder, None, out, OPTIONS)
    stamp = out.stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "open_backbone", lambda name, revision=None: free)
    summary = featurize(folder, None, out, OPTIONS)
    assert (summary.resumed, summary.unchanged, out.stat().st_mtime_ns) == (0, 12, stamp)
    assert not list(tmp_path.glob("f.h5.parts*"))
