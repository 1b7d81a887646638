"""Result folders: written under a temporary name, then renamed, with ``latest`` pointing at the newest.

Neighbours may write into the same folder: their drafts come and go at any moment. Once a folder has its name, nothing
that goes wrong afterwards is an error.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from ...cache.atomic import disk_full_is_clear, fsync_file, make_folder
from ...cache.errors import CheckpointError

LATEST = "latest"
_DRAFT = ".unfinished-"
_MOVED = "latest-moved-aside"


def check_writable(parent: Path) -> None:
    """Find out before the work, not after it, that nothing can be written; an ``OSError`` says why."""
    make_folder(parent)
    with (
        disk_full_is_clear(parent),
        tempfile.TemporaryDirectory(prefix=_DRAFT, dir=parent, ignore_cleanup_errors=True),
    ):
        pass


@contextlib.contextmanager
def new_folder(parent: Path, what: str, on_note: Callable[[str], None] | None = None) -> Iterator[tuple[Path, Path]]:
    """Yield (draft to write into, name it will have): ``parent/<when>-<what>`` once all is written, else nothing.

    Parameters
    ----------
    parent
        The folder of run folders.
    what
        Last part of the name.
    on_note
        Called with a sentence for the user, where ``latest`` was not simply replaced.
    """
    with disk_full_is_clear(parent):
        draft, folder = _make_draft(parent, what)
    try:
        with disk_full_is_clear(draft):
            yield draft, folder
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    os.rename(draft, folder)
    said = _point_latest(parent, folder.name)
    if said is not None and on_note is not None:
        on_note(said)
    _remove_abandoned(parent)


def _make_draft(parent: Path, what: str) -> tuple[Path, Path]:
    """Make a draft and return it with a name that is free, and stays free as long as the draft is there.

    The draft's own name holds the final name, so two runs cannot have the same draft. A neighbour may have renamed its
    draft a moment ago, so the final name is looked at after the draft was made.
    """
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{what}"
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}-{number}")
        draft = parent / f"{_DRAFT}{folder.name}"
        with contextlib.suppress(FileExistsError):
            draft.mkdir()
            if not os.path.lexists(folder):
                return draft, folder
            draft.rmdir()
        number += 1


def _remove_abandoned(parent: Path) -> None:
    """Delete the drafts of runs that were killed more than a day ago."""
    with contextlib.suppress(OSError):
        for draft in parent.glob(f"{_DRAFT}*"):
            with contextlib.suppress(OSError):  # a neighbour has just renamed or removed it
                if time.time() - draft.stat().st_mtime > 86_400:
                    shutil.rmtree(draft, ignore_errors=True)


def _point_latest(parent: Path, name: str) -> str | None:
    """Make ``latest`` mean ``name``; return what the user should know about it.

    A real folder in its place, as ``cp -rL`` and zip files make one of a link, is moved aside. A disk without links
    gets a file that holds the name, as git makes one.
    """
    latest, pointer = parent / LATEST, parent / f".latest.{os.getpid()}.{time.monotonic_ns()}.tmp"
    said = None
    try:
        try:
            pointer.symlink_to(name, target_is_directory=True)
        except OSError:
            pointer.write_text(name + "\n", encoding="utf-8")
            fsync_file(pointer)
        try:
            os.replace(pointer, latest)
        except (IsADirectoryError, PermissionError):
            aside = Path(tempfile.mkdtemp(prefix=f"{_MOVED}-", dir=parent)) / LATEST
            os.rename(latest, aside)
            said = f"note: {latest} was a folder, not a link to the newest run: it is now {aside}"
            os.replace(pointer, latest)
    except OSError as error:
        said = f"note: {latest} could not be made to point at {name} ({error.strerror}): name the run with --from"
    finally:
        with contextlib.suppress(OSError):
            pointer.unlink(missing_ok=True)
    return said


def pointed_at(latest: Path) -> Path:
    """Return the run folder that ``latest`` stands for: a link, a folder, or a file that names one.

    Raises
    ------
    CheckpointError
        It is a file that names none.
    """
    if not latest.is_file():
        return latest
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not name or Path(name).name != name:
        raise CheckpointError(f"{latest} names no run folder beside it: name the run with --from")
    return latest.with_name(name)


def find_best_pt(path: str | Path) -> Path:
    """Return the best.pt that ``path`` names: the file, or its run folder. Imports no PyTorch, and does not open it.

    Raises
    ------
    CheckpointError
        It is not there.
    """
    path = Path(path)
    for place in (path, path.parent):
        if place.name == LATEST and place.is_file():  # on a disk without links
            path = pointed_at(place) / path.relative_to(place)
            break
    if path.is_dir():
        if not (path / "best.pt").is_file():
            raise CheckpointError(f"no best.pt in the folder {path}: give a best.pt, or the run folder that holds one")
        path = path / "best.pt"
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}; train a head with `mmcli train-head`")
    return path
