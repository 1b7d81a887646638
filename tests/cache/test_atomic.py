"""Where output is not an ordinary file."""

import os
import threading

import pytest
from mmcli.cache import MmcliError
from mmcli.cache.atomic import atomic_path, write_text


def test_a_link_stays_and_what_it_points_at_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "out.csv", tmp_path / "link.csv"
    target.write_text("before")
    link.symlink_to(target)
    write_text(link, "after")
    assert link.is_symlink()
    assert target.read_text() == "after"
    assert [path.name for path in target.parent.iterdir()] == ["out.csv"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_written_into_and_stays(tmp_path):
    pipe, found = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "content")
    reader.join(10)
    assert found == ["content"]
    assert pipe.is_fifo()
    with pytest.raises(MmcliError, match="is a device or a pipe"), atomic_path(pipe):
        pass
    assert pipe.is_fifo()
