"""Standard streams that take every character. Imports nothing heavy: every command begins with it."""

import io
import os
import sys


def prepare_streams() -> None:
    """Make stdout and stderr take every character, and be there where the caller closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
