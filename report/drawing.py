"""Drawing figures in a process of its own, which loads matplotlib while something else is computed."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any


def draw(name: str, *arguments: Any, path: Path) -> None:
    """Draw the figure that the function ``name`` of ``report.figures`` draws."""
    from . import figures  # here, because whoever draws nothing must not wait for matplotlib

    getattr(figures, name)(*arguments, path)


class Pencil:
    """Draws as ``draw`` does; made long before it is needed, it saves the time of loading matplotlib.

    Where the process cannot be had, or fails, the figure is drawn in this one.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Pencil":
        with contextlib.suppress(OSError):
            # As a script, without the folder of the script in the path: it needs nothing else of this package.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("figures.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def __call__(self, name: str, *arguments: Any, path: Path) -> None:
        """Draw a figure; return when it is there."""
        if not self._drawn(json.dumps([name, arguments, str(path)])):
            draw(name, *arguments, path=path)

    def _drawn(self, order: str) -> bool:
        if self._process is None or self._process.stdin is None or self._process.stdout is None:
            return False
        with contextlib.suppress(OSError):
            self._process.stdin.write(order + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline() == "drawn\n"
        return False
