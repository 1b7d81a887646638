"""stdout carries the answer: tables, or one JSON document. stderr carries everything else."""

import json
import sys
from typing import Any

from rich.console import Console


def print_json(result: Any) -> None:
    """Print ``result`` as one JSON document."""
    sys.stdout.write(json.dumps(result, ensure_ascii=False) + "\n")


def print_parts(*parts: Any) -> None:
    """Print text and tables; a pipe gets as many columns as they need."""
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 160)
    for part in parts:
        console.print(part)


def note(text: str) -> None:
    """Say something beside the answer, on stderr."""
    sys.stderr.write(text + "\n")
