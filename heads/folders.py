"""Result folders: written under a temporary name, then renamed, with ``latest`` pointing at the newest."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from ..cache.atomic import disk_full_is_clear

_DRAFT = ".unfinished-"


def check_writable(parent: Path) -> None:
    """Find out before the work, not after it, that nothing can be written; an ``OSError`` says why."""
    parent.mkdir(parents=True, exist_ok=True)
    with disk_full_is_clear(parent), tempfile.TemporaryDirectory(prefix=_DRAFT, dir=parent):
        pass


@contextlib.contextmanager
def new_folder(parent: Path, what: str) -> Iterator[tuple[Path, Path]]:
    """Yield (draft to write into, name it will have): ``parent/<when>-<what>`` once all is written, else nothing."""
    _remove_abandoned(parent)
    with disk_full_is_clear(parent):
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=parent))
    folder = _reserve_name(parent, what)
    try:
        draft.chmod(0o755)
        with disk_full_is_clear(draft):
            yield draft, folder
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # only a reserved name that was not used is empty
    _point_latest(parent, folder.name)


def _reserve_name(parent: Path, what: str) -> Path:
    """Make an empty folder that no other run, of the same second or not, can take."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{what}"
    folder, number = parent / name, 2
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            folder, number = parent / f"{name}-{number}", number + 1


def _remove_abandoned(parent: Path) -> None:
    """Delete the drafts of runs that were killed more than a day ago."""
    for draft in parent.glob(f"{_DRAFT}*"):
        if time.time() - draft.stat().st_mtime > 86_400:
            shutil.rmtree(draft, ignore_errors=True)


def _point_latest(parent: Path, name: str) -> None:
    pointer = parent / f".latest.{os.getpid()}.tmp"
    pointer.unlink(missing_ok=True)
    try:
        pointer.symlink_to(name, target_is_directory=True)
        os.replace(pointer, parent / "latest")
    finally:
        pointer.unlink(missing_ok=True)
