"""Figures drawn in a process of their own are those drawn in this one."""

import subprocess
import sys

import pytest
from mmcli.report import drawing
from mmcli.report.drawing import Pencil, draw

HISTORY = [
    [{"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 0.5, "val_macro_f1": 0.1 * epoch} for epoch in (1, 2)]
]
FIGURES = {
    "curves": (HISTORY, [2]),
    "confusion": ([[3, 1], [0, 2]], ["gut", "schlecht \u2639"], "test"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_the_same_picture(name, tmp_path, monkeypatch):
    draw(name, *FIGURES[name], path=tmp_path / "here.png")
    monkeypatch.setattr(drawing, "draw", lambda *arguments, **more: pytest.fail("was drawn here"))
    with Pencil() as pencil:
        pencil(name, *FIGURES[name], path=tmp_path / "there.png")
        pencil(name, *FIGURES[name], path=tmp_path / "again.png")
    pictures = {(tmp_path / f"{each}.png").read_bytes() for each in ("here", "there", "again")}
    assert len(pictures) == 1


def test_where_there_is_no_process_it_is_drawn_here(tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise OSError("no more processes")

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        with Pencil() as pencil:
            pencil("confusion", *FIGURES["confusion"], path=tmp_path / "one.png")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Pencil() as pencil:
        pencil("confusion", *FIGURES["confusion"], path=tmp_path / "two.png")
    assert (tmp_path / "one.png").stat().st_size == (tmp_path / "two.png").stat().st_size > 0


def test_what_cannot_be_drawn_is_said_here(tmp_path):
    with Pencil() as pencil, pytest.raises(FileNotFoundError):
        pencil("confusion", *FIGURES["confusion"], path=tmp_path / "no folder" / "one.png")
    with Pencil() as pencil:
        process = pencil._process
    assert process.poll() is not None  # and none is left behind
