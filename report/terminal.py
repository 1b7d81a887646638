"""stdout carries the answer: tables, or one JSON document. stderr carries everything else.

Nothing is lost where a stream cannot hold a character (a Windows code page, ``LC_ALL=C``): it is written as its escape.
Nothing that stands in data (labels, class names) can command the terminal: control characters are written as escapes.
"""

import json
import os
import re
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_PIPE_COLUMNS = 160
# Controls but for tab and line feed; halves of emoji; marks that turn the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with control characters as escapes, such as ``\x1b``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Console(Console):
    """A console on which text from data is no command."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def print_json(result: Any) -> None:
    r"""Print ``result`` as one JSON document; what stdout cannot hold, as ``\u00e9``."""
    text = json.dumps(result, ensure_ascii=False)
    if not _can_hold(sys.stdout, text) or _CONTROLS.search(text):
        text = json.dumps(result)
    _write(text + "\n")


def print_parts(*parts: Any) -> None:
    """Print text and tables, text to the letter; a pipe gets wide tables and no trailing spaces."""
    terminal = sys.stdout.isatty()
    console = _Console(
        highlight=False, markup=False, emoji=False, soft_wrap=True, width=None if terminal else _PIPE_COLUMNS
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    _write("".join(line.rstrip() + "\n" for line in captured.get().removesuffix("\n").split("\n")))


def print_csv(text: str) -> None:
    """Print a CSV: into a pipe to the letter, on a terminal without control characters."""
    if not _can_hold(sys.stdout, text):
        note(
            f"note: standard output is {sys.stdout.encoding}, which cannot hold all of it: such characters are written "
            "as escapes; a file (--out) is always UTF-8"
        )
    _write(printable(text) if sys.stdout.isatty() else text)


def note(text: str) -> None:
    """Say something beside the answer, on stderr."""
    say(printable(text))


def say(line: str) -> None:
    """Write a line to stderr; a reader that is gone stops no work."""
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        _let_go(sys.stderr)


def _write(text: str) -> None:
    """Write the answer. A reader that has enough (``| head``) is no error; a disk that is full is one."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        _let_go(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise


def _can_hold(stream: TextIO, text: str) -> bool:
    try:
        text.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _let_go(stream: TextIO) -> None:
    """Let what is still to be written to ``stream`` go nowhere, so that Python does not fail again at its end."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except OSError:  # not a stream of the operating system
        pass
