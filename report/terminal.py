"""stdout carries the answer: tables, or one JSON document. stderr carries everything else."""

import json
import sys
from typing import Any

from rich.console import Console

_PIPE_COLUMNS = 160


def print_json(result: Any) -> None:
    """Print ``result`` as one JSON document."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")


def print_parts(*parts: Any) -> None:
    """Print text and tables, text to the letter; a pipe gets wide tables and no trailing spaces."""
    terminal = sys.stdout.isatty()
    console = Console(
        highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if terminal else _PIPE_COLUMNS
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    for line in captured.get().splitlines():
        sys.stdout.write(line.rstrip() + "\n")


def note(text: str) -> None:
    """Say something beside the answer, on stderr."""
    sys.stderr.write(text + "\n")
