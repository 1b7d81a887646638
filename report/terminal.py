"""stdout carries the answer: tables, or one JSON document. stderr carries everything else.

A character that the stream cannot hold (a Windows code page, ``LC_ALL=C``) is written as its escape.
Control characters in data (labels, class names) are written as escapes, so that they cannot command the terminal.
"""

import json
import os
import re
import sys
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

_PIPE_COLUMNS = 160
# Control characters except tab and line feed; halves of emoji; marks that change the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    r"""Return ``text`` with control characters as escapes, such as ``\x1b``."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Console(Console):
    """A console that escapes control characters in text."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


def print_json(result: Any) -> None:
    r"""Print ``result`` as one JSON document, with escapes such as ``\u00e9`` for what stdout cannot hold."""
    text = json.dumps(result, ensure_ascii=False)
    if not _can_hold(sys.stdout, text) or _CONTROLS.search(text):
        text = json.dumps(result)
    _write(text + "\n")


def print_parts(*parts: Any) -> None:
    """Print text and tables, text to the letter, without trailing spaces.

    Tables are as wide as the terminal, or as ``COLUMNS`` says; in a pipe without ``COLUMNS``, they are wide.
    """
    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdigit() else _PIPE_COLUMNS
    console = _Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)
    with console.capture() as captured:
        for part in parts:
            console.print(part)
    _write("".join(line.rstrip() + "\n" for line in captured.get().removesuffix("\n").split("\n")))


def print_csv(text: str) -> None:
    """Print a CSV: unchanged into a pipe, with control characters escaped on a terminal."""
    if not _can_hold(sys.stdout, text):
        note(
            f"note: standard output is {sys.stdout.encoding}, which cannot hold every character here: the others are "
            "written as escapes; a file (--out) is always UTF-8"
        )
    _write(printable(text) if sys.stdout.isatty() else text)


def note(text: str) -> None:
    """Print a message on stderr."""
    say(printable(text))


def say(line: str) -> None:
    """Write a line to stderr; work goes on if nobody reads it."""
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        _let_go(sys.stderr)


def _write(text: str) -> None:
    """Write the answer. A reader that has gone (``| head``) is no error; a full disk is."""
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
    """Redirect ``stream`` to nowhere, so that Python does not fail again when it exits."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except OSError:  # not a stream of the operating system
        pass
