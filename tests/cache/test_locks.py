"""Caches that other programs hold, and file systems without locks."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys

import h5py
import pytest
from conftest import synthetic_block, write_cache
from mmcli.cache import CacheError, FeatureCache, LockedError
from mmcli.cache.atomic import writer_lock
from mmcli.cache.hdf5 import cannot_open

HOLDER = """
import sys, h5py
with h5py.File(sys.argv[1], "a"):
    print("held", flush=True)
    sys.stdin.read()
"""

NO_FLOCK = """
#include <errno.h>
int flock(int descriptor, int operation) { errno = NUMBER; return -1; }
"""


@pytest.fixture
def held(tmp_path):
    """A cache that a notebook holds open for writing."""
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a", "b"]))
    command = [sys.executable, "-c", HOLDER, str(path)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    yield path
    other.communicate("")


def test_a_cache_that_a_notebook_holds_open_is_read(held):
    with pytest.raises(OSError, match="unable to lock"):
        h5py.File(held, "r")
    with FeatureCache.open(held) as cache:
        assert cache.embeddings(["b"])[0].shape == (1, 8)
        assert len(cache.features(["a"], max_bytes=1).load()) == 1


def test_a_cache_that_the_same_process_holds_open_is_read(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a"]))
    for mode in ("a", "r"):
        with h5py.File(path, mode), FeatureCache.open(path) as cache:
            assert cache.guids == ["a"]
    with FeatureCache.open(path), h5py.File(path, "r") as own:  # and the notebook may open it afterwards
        assert len(own["guid"]) == 1


@pytest.mark.parametrize("words", ["unable to lock file, errno = 11", "file locking flag values don't match"])
def test_a_lock_is_never_called_damage(tmp_path, words):
    said = str(cannot_open(tmp_path / "f.h5", OSError(f"Unable to synchronously open file ({words})")))
    assert "is locked by another program" in said
    assert "aside" not in said


def test_what_is_cut_off_is_still_said_to_be(tmp_path):
    path = write_cache(tmp_path / "f.h5", synthetic_block(["a"]))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CacheError, match="is cut off"):
        FeatureCache.open(path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_writer_has_its_cache_alone_where_there_are_no_locks(tmp_path, monkeypatch, number):
    def refuse(*arguments):
        raise OSError(number, os.strerror(number))

    with writer_lock(tmp_path / "f.h5"):  # leaves its lock file, as a run before the disk was moved has
        pass
    monkeypatch.setattr(fcntl, "flock", refuse)
    with writer_lock(tmp_path / "f.h5"):
        with pytest.raises(LockedError, match="another mmcli is writing"), writer_lock(tmp_path / "f.h5"):
            pass
        with writer_lock(tmp_path / "other.h5"):
            pass
    with writer_lock(tmp_path / "f.h5"):
        pass


SOFT_HOLDER = """
import errno, fcntl, os, sys
from pathlib import Path
def refuse(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
from mmcli.cache.atomic import writer_lock
with writer_lock(Path(sys.argv[1])):
    os._exit(9)  # as a kill: the lock file stays
"""


def test_a_lock_file_of_a_writer_that_was_killed_is_no_lock(tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", SOFT_HOLDER, str(tmp_path / "f.h5")], check=False)
    assert done.returncode == 9
    assert (tmp_path / ".f.h5.lock-holder").exists()

    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with writer_lock(tmp_path / "f.h5"):
        pass


def test_a_lock_file_of_another_machine_is_named(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".f.h5.lock-holder").write_text("1234\nanother-machine\n")
    with (
        pytest.raises(LockedError, match=r"if no mmcli is running, delete .*lock-holder"),
        writer_lock(tmp_path / "f.h5"),
    ):
        pass


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_the_whole_job_on_a_file_system_without_locks(pairs, tiny_clip, tmp_path, number):
    folder, labels = pairs(60)
    shim = tmp_path / "shim.so"
    (tmp_path / "shim.c").write_text(NO_FLOCK.replace("NUMBER", str(number)))
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(shim), str(tmp_path / "shim.c")], check=True)
    for words in (
        ["featurize", folder, "--labels", labels, "--backbone", tiny_clip, "--out", "f.h5"],
        ["featurize", folder, "--out", "f.h5"],
        ["train-head", "--cache", "f.h5", "--epochs", "1"],
        ["predict", "--data", folder],
    ):
        command = [sys.executable, "-m", "mmcli", *map(str, words)]
        environment = os.environ | {"LD_PRELOAD": str(shim)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert "Warning" not in done.stderr
