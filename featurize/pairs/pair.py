"""One raw pair: the location of its bytes, and reading them."""

import hashlib
import os
import re
import stat
import unicodedata
from dataclasses import dataclass

from ...cache.errors import DataError

LONGEST_GUID = 1000  # bytes in UTF-8; every row of the cache reserves space for the longest guid
_LARGEST = {"image": 1 << 30, "text": 100 << 20}  # bytes of a file


@dataclass(frozen=True, slots=True)
class Pair:
    """The location of one pair's raw bytes.

    ``image`` and ``text_path`` are paths; ``text`` is an inline text from a manifest. ``problem`` says why the pair
    cannot be read, if that is known before reading.
    """

    guid: str
    image: str | None = None
    text_path: str | None = None
    text: str | None = None
    problem: str | None = None

    @classmethod
    def named_by_label(cls, guid: str) -> "Pair":
        """Return a pair that only a label names."""
        return cls(guid, problem="has a label, but neither image nor text")

    @property
    def absent(self) -> bool:
        """Whether only a label names the pair: it has neither image nor text."""
        return self.image is None and self.text_path is None and self.text is None

    def is_incomplete(self) -> bool:
        """Whether the file names alone show that the pair cannot be read."""
        return self.problem is not None or self.image is None or (self.text is None and self.text_path is None)

    def read_image(self) -> bytes:
        """Return the bytes of the image file; DataError if it is missing or cannot be read."""
        if self.image is None:
            raise DataError("image missing")
        return _read(self.image, "image")

    def read_text(self) -> bytes:
        """Return the bytes of the text; DataError if it is missing or cannot be read."""
        if self.text is not None:
            return self.text.encode(errors="replace")  # JSON can hold half an emoji
        if self.text_path is None:
            raise DataError("text missing")
        return _read(self.text_path, "text")

    def digest(self, side: str) -> bytes:
        """Return the sha256 of the bytes of the ``image`` or the ``text``; DataError if the pair cannot be read."""
        if self.problem is not None:
            raise DataError(self.problem)
        return hashlib.sha256(self.read_image() if side == "image" else self.read_text()).digest()

    def digests(self) -> tuple[bytes, bytes] | None:
        """Return (sha256 of image bytes, sha256 of text bytes), or None if the pair cannot be read."""
        try:
            return self.digest("image"), self.digest("text")
        except DataError:
            return None


def _read(path: str, what: str) -> bytes:
    try:
        # O_NONBLOCK, because opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{what} is not a file")
            if status.st_size > _LARGEST[what]:
                raise DataError(f"{what} too large: {status.st_size / 1e6:,.0f} MB")
            return file.read()
    except FileNotFoundError as error:
        hint = "; its path has backslashes" if "\\" in path else ""
        raise DataError(f"{what} missing{hint}") from error
    except (OSError, ValueError) as error:  # ValueError: the path holds a NUL or half a character
        raise DataError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def guid_problem(guid: str) -> str | None:
    """Return why a name cannot be a guid, or None if it can."""
    if any(unicodedata.category(letter) == "Cc" for letter in guid):
        return "the guid holds a control character"
    if len(guid) * 4 > LONGEST_GUID and len(guid.encode()) > LONGEST_GUID:
        return f"the guid is longer than {LONGEST_GUID} bytes"
    return None


def natural_key(guid: str) -> str:
    """Return a sort key that puts ``8`` before ``26``."""
    # Text and digits alternate, text first. Compare digit runs by length first; a prefix sorts before what it prefixes.
    key = []
    for index, part in enumerate(re.split(r"([0-9]+)", guid)):
        digits = part.lstrip("0")
        key.append(chr(min(len(digits) + 1, 0xD7FF)) + digits if index % 2 else part)
    return "\0".join([*key, "", guid])
