"""Result folders that several commands write at the same time, and what ``latest`` is afterwards."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from mmcli.cache import CheckpointError, MmcliError
from mmcli.heads.runs import folders
from mmcli.heads.runs.folders import check_writable, find_best_pt, new_folder

HAMMER = """
import sys
from pathlib import Path
from mmcli.heads.runs.folders import check_writable, new_folder
for number in range(60):
    check_writable(Path(sys.argv[1]))
    with new_folder(Path(sys.argv[1]), "concat") as (draft, folder):
        (draft / "name").write_text(folder.name)
"""


def written(parent):
    return [path for path in parent.iterdir() if path.name != "latest" and not path.name.startswith(".")]


def test_no_run_is_lost_where_processes_share_a_folder(tmp_path):
    command = [sys.executable, "-c", HAMMER, str(tmp_path)]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [each.communicate()[1] for each in started]
    assert errors == [""] * 4
    assert len(written(tmp_path)) == 240
    assert all((path / "name").read_text() == path.name for path in written(tmp_path))  # as its metrics.json says
    assert (tmp_path / "latest").resolve().parent == tmp_path.resolve()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_no_run_is_lost_where_threads_share_a_folder(tmp_path):
    def write(number):
        check_writable(tmp_path)
        with new_folder(tmp_path, "text") as (draft, folder):
            (draft / "name").write_text(folder.name)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len(written(tmp_path)) == 200
    assert all((path / "name").read_text() == path.name for path in written(tmp_path))


def test_drafts_of_neighbours_that_vanish_while_they_are_looked_at_are_no_error(tmp_path):
    stop = threading.Event()

    def neighbour():
        while not stop.is_set():
            check_writable(tmp_path)

    other = threading.Thread(target=neighbour)
    other.start()
    try:
        for number in range(100):
            with new_folder(tmp_path, f"run-{number}") as (draft, _):
                (draft / "best.pt").write_text("x")
    finally:
        stop.set()
        other.join()
    assert len(written(tmp_path)) == 100


def test_an_old_draft_is_removed_and_no_error_of_that_reaches_the_run(tmp_path, monkeypatch):
    old, new = tmp_path / ".unfinished-old", tmp_path / ".unfinished-new"
    for path in (old, new):
        path.mkdir()
    os.utime(old, (time.time() - 2 * 86_400,) * 2)
    with new_folder(tmp_path, "a"):
        pass
    assert (old.exists(), new.exists()) == (False, True)

    def refuse(*arguments, **more):
        raise PermissionError(13, "no")

    monkeypatch.setattr(folders.time, "time", refuse)
    with new_folder(tmp_path, "b") as (_, folder):
        pass
    assert folder.is_dir()


def test_a_kill_while_a_run_is_written_leaves_no_folder_with_the_name_of_a_run(tmp_path):
    with new_folder(tmp_path, "first"):
        pass
    first = (tmp_path / "latest").resolve()
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom mmcli.heads.runs.folders import new_folder\n"
        "with new_folder(Path(sys.argv[1]), 'killed') as (draft, folder):\n"
        "    (draft / 'best.pt').write_text('half')\n    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert written(tmp_path) == [first]
    assert (tmp_path / "latest").resolve() == first


def test_what_fails_while_it_is_written_leaves_nothing(tmp_path):
    def fail():
        with new_folder(tmp_path, "a") as (draft, _):
            (draft / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_latest_that_is_a_real_folder_is_moved_aside_and_said(tmp_path):
    """As ``cp -rL`` or a zip file makes it: nothing of it is lost, and ``latest`` means the newest run again."""
    (tmp_path / "latest").mkdir()
    (tmp_path / "latest" / "best.pt").write_text("a copy")
    assert find_best_pt(tmp_path / "latest").read_text() == "a copy"
    said = []
    with new_folder(tmp_path, "b", said.append) as (draft, folder):
        (draft / "best.pt").write_text("new")
    assert find_best_pt(tmp_path / "latest").read_text() == "new"
    assert (tmp_path / "latest").resolve() == folder.resolve()
    (aside,) = tmp_path.glob("latest-moved-aside-*/latest")
    assert (aside / "best.pt").read_text() == "a copy"
    assert len(said) == 1
    assert str(aside) in said[0]


def test_a_disk_without_links_gets_a_file_that_names_the_newest(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(folders.Path, "symlink_to", refuse)
    for content in ("first", "second"):
        with new_folder(tmp_path, "a") as (draft, folder):
            (draft / "best.pt").write_text(content)
    assert (tmp_path / "latest").is_file()
    for named in (tmp_path / "latest", tmp_path / "latest" / "best.pt"):
        assert find_best_pt(named) == folder / "best.pt"
    monkeypatch.undo()
    with new_folder(tmp_path, "a") as (draft, folder):
        (draft / "best.pt").write_text("third")
    assert (tmp_path / "latest").is_symlink()
    assert find_best_pt(tmp_path / "latest").read_text() == "third"


def test_a_latest_that_cannot_be_written_costs_no_run(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(folders.os, "replace", refuse)
    said = []
    with new_folder(tmp_path, "a", said.append) as (_, folder):
        pass
    assert folder.is_dir()
    assert "Read-only file system" in said[0]
    assert "--from" in said[0]


def test_a_best_pt_that_is_not_there_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=r"no best.pt in the folder .*folder"):
        find_best_pt(tmp_path / "folder")
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        find_best_pt(tmp_path / "dangling")
    (tmp_path / "file").write_text("x")
    with pytest.raises(MmcliError, match=r"cannot make the folder .*, a file is in its place"):
        check_writable(tmp_path / "file")


@pytest.mark.parametrize("content", ["", "../elsewhere", "a/b"])
def test_a_latest_that_names_no_run_is_one_line(tmp_path, content):
    (tmp_path / "latest").write_text(content)
    with pytest.raises(CheckpointError, match="names no run folder beside it"):
        find_best_pt(tmp_path / "latest" / "best.pt")
