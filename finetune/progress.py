"""How far an interrupted stage 2 got: a file per command beside the run folders, written after each epoch."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ..cache.atomic import remove_leftovers
from ..cache.errors import CheckpointError
from ..heads.runs.tensor_file import read_tensor_file, write_tensor_file

_FORMAT = "mmcli finetune progress 2"
_KEPT_DAYS = 30


class Progress:
    """What is known of one command's fits.

    Parameters
    ----------
    runs
        Folder of run folders.
    depends_on
        Plain data: all that the result depends on. Only a command with the same goes on from here.
    """

    def __init__(self, runs: Path, depends_on: dict[str, Any]) -> None:
        digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
        self.path = runs / f".finetune-{digest[:16]}.pt"
        self.finished: list[dict[str, Any]] = []
        self.state: dict[str, Any] | None = None

    @property
    def epochs(self) -> int:
        """Epochs that the fit at work has behind it."""
        return 0 if self.state is None else len(self.state["history"])

    def load(self) -> bool:
        """Read what an interrupted command left; whether there is any.

        Raises
        ------
        CheckpointError
            It is there and cannot be read.
        """
        if not self.path.is_file():
            return False
        try:
            content = read_tensor_file(self.path)
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']!r}")
            self.finished, self.state = content["finished"], content["state"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.path}, which says how far an interrupted run got, cannot be used ({error}): leave --resume out"
            ) from error
        return bool(self.finished or self.state)

    def keep(self, state: dict[str, Any] | None) -> None:
        """Write ``finished`` and the state of the fit at work, whole or not at all."""
        self.state = state
        write_tensor_file(self.path, {"format": _FORMAT, "finished": self.finished, "state": state})

    def forget(self) -> None:
        """Delete the file, the run folder is written; and those that others left a month ago."""
        self.path.unlink(missing_ok=True)
        remove_leftovers(self.path)
        for old in self.path.parent.glob(".finetune-*.pt"):
            if time.time() - old.stat().st_mtime > _KEPT_DAYS * 86_400:
                old.unlink(missing_ok=True)
