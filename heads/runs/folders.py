"""Result folders: written under a temporary name, then renamed. ``latest`` points at the newest.

Other processes may write into the same parent folder, so their drafts come and go at any moment. Once a folder has its
final name, later problems are no errors.
"""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from ...cache.atomic import disk_full_is_clear, fsync, make_folder
from ...cache.errors import CheckpointError

LATEST = "latest"
_DRAFT = ".unfinished-"
_MOVED = "latest-moved-aside"


def check_writable(parent: Path) -> None:
    """Raise an ``OSError`` before the work, rather than after it, if nothing can be written into ``parent``."""
    make_folder(parent)
    with (
        disk_full_is_clear(parent),
        tempfile.TemporaryDirectory(prefix=_DRAFT, dir=parent, ignore_cleanup_errors=True),
    ):
        pass


@contextlib.contextmanager
def new_folder(parent: Path, what: str, on_note: Callable[[str], None] | None = None) -> Iterator[tuple[Path, Path]]:
    """Yield (draft to write into, final path); rename the draft to ``parent/<when>-<what>``, or delete it on an error.

    ``on_note`` is called with a sentence for the user if ``latest`` could not simply be replaced.
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
    note = _point_latest(parent, folder.name)
    if note is not None and on_note is not None:
        on_note(note)
    _remove_abandoned(parent)


def _make_draft(parent: Path, what: str) -> tuple[Path, Path]:
    """Make a draft; return it with its final path, which stays free as long as the draft exists.

    The name of the draft contains the final name, so two runs cannot have the same draft. Another process may just have
    renamed its draft, so the final path is checked after the draft was made.
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
            with contextlib.suppress(OSError):  # another process may just have renamed or removed it
                if time.time() - draft.stat().st_mtime > 86_400:
                    shutil.rmtree(draft, ignore_errors=True)


def _point_latest(parent: Path, name: str) -> str | None:
    """Make ``latest`` point at ``name``; return a note for the user, if any.

    A real folder called ``latest``, which ``cp -rL`` and zip files make from a link, is moved aside. On a disk without
    links, ``latest`` becomes a file that holds the name, as in git.
    """
    latest, pointer = parent / LATEST, parent / f".latest.{os.getpid()}.{time.monotonic_ns()}.tmp"
    note = None
    try:
        try:
            pointer.symlink_to(name, target_is_directory=True)
        except OSError:
            pointer.write_text(name + "\n", encoding="utf-8")
            fsync(pointer)
        try:
            os.replace(pointer, latest)
        except (IsADirectoryError, PermissionError):
            aside = Path(tempfile.mkdtemp(prefix=f"{_MOVED}-", dir=parent)) / LATEST
            os.rename(latest, aside)
            note = f"note: {latest} was a folder, not a link to the newest run: it is now {aside}"
            os.replace(pointer, latest)
    except OSError as error:
        note = f"note: {latest} cannot point at {name} ({error.strerror}): name the run with --from"
    finally:
        with contextlib.suppress(OSError):
            pointer.unlink(missing_ok=True)
    return note


def pointed_at(latest: Path) -> Path:
    """Return the run folder that ``latest`` stands for: the link or folder itself, or the folder that a file names.

    Raise a CheckpointError if ``latest`` is a file that names no folder beside it.
    """
    if not latest.is_file():
        return latest
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not name or Path(name).name != name:
        raise CheckpointError(f"{latest} names no run folder beside it: name the run with --from")
    return latest.with_name(name)


def find_best_pt(path: str | Path) -> Path:
    """Return the best.pt that ``path`` names, which is the file or its run folder; the file is not opened.

    Raise a CheckpointError if there is no such file.
    """
    path = Path(path)
    for place in (path, path.parent):
        if place.name == LATEST and place.is_file():  # a disk without links
            path = pointed_at(place) / path.relative_to(place)
            break
    if path.is_dir():
        if not (path / "best.pt").is_file():
            raise CheckpointError(f"no best.pt in the folder {path}: give a best.pt, or the run folder that holds one")
        path = path / "best.pt"
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: {path}; train a head with `mmcli train-head`")
    return path
