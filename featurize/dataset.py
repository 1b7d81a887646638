"""The raw pairs: a folder of ``<guid>.jpg`` + ``<guid>.txt``, or a manifest."""

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from ..cache.errors import DataError
from ..cache.labels import cell_text, read_labels, read_table
from .image import IMAGE_SUFFIXES

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Pair:
    """Where one pair's raw bytes are.

    ``image`` and ``text_path`` are paths; ``text`` is a manifest's inline text. ``problem`` says why the pair cannot
    be read, where that is known before reading.
    """

    guid: str
    image: str | None = None
    text_path: str | None = None
    text: str | None = None
    problem: str | None = None

    @property
    def absent(self) -> bool:
        """Whether nothing of the pair is there, only a label that names it."""
        return self.image is None and self.text_path is None and self.text is None

    def cannot_be_whole(self) -> bool:
        """Whether a look at the names is enough to know that the pair cannot be read."""
        return self.problem is not None or self.image is None or (self.text is None and self.text_path is None)

    def read_image(self) -> bytes:
        """Return the image file's bytes; DataError where there is none or it cannot be read."""
        if self.image is None:
            raise DataError("image missing")
        return _read(self.image, "image")

    def read_text(self) -> bytes:
        """Return the text's bytes; DataError where there is none or it cannot be read."""
        if self.text is not None:
            return self.text.encode(errors="replace")  # half an emoji, as JSON can hold it
        if self.text_path is None:
            raise DataError("text missing")
        return _read(self.text_path, "text")

    def digests(self) -> tuple[bytes, bytes] | None:
        """Return (sha256 of image bytes, sha256 of text bytes), or None where the pair cannot be read."""
        if self.problem is not None:
            return None
        try:
            return hashlib.sha256(self.read_image()).digest(), hashlib.sha256(self.read_text()).digest()
        except DataError:
            return None


def _read(path: str, what: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise DataError(f"{what} missing") from error
    except (OSError, ValueError) as error:  # ValueError: a path that holds a NUL
        raise DataError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@dataclass(frozen=True)
class Dataset:
    """Raw pairs in natural order of guid, and their labels.

    Attributes
    ----------
    data, labels_path
        Absolute locations, recorded in the cache so that later commands need no flags.
    pairs
        Every pair that is there or that a label names.
    labels
        Label (or None) by guid, as in the labels file; empty without one.
    """

    data: Path
    labels_path: Path | None
    pairs: Sequence[Pair]
    labels: dict[str, str | None]

    @classmethod
    def open(cls, data: str | Path, labels: str | Path | None = None) -> "Dataset":
        """List the pairs of ``data``, a folder or a manifest (.csv, .jsonl, .parquet).

        A guid that ``labels`` names and that is not there becomes a pair with a ``problem``.

        Raises
        ------
        DataError
            No such folder or labels file; no pair in it; a header that is not understood.
        """
        data = Path(os.path.abspath(data))
        labels_path = None if labels is None else Path(os.path.abspath(labels))
        found: _Folder | _Manifest
        by_guid: dict[str, str | None] = {}
        if data.is_dir():
            found = _Folder(data, labels_path)
        elif data.is_file():
            manifest, by_guid = _read_manifest(data)
            found = _Manifest(manifest)
            if by_guid and labels_path is None:
                labels_path = data
        else:
            raise DataError(f"no such folder or manifest: {data}")
        if not found:
            raise DataError(
                f"no pairs in {data}: expected files <guid>.jpg (or {', '.join(IMAGE_SUFFIXES[1:])}) and <guid>.txt"
            )
        if labels is not None:
            by_guid = read_labels(Path(labels))
            if not any(guid in found for guid in by_guid):
                raise DataError(f"none of the {len(by_guid)} guids in {labels} is in {data}: is it the right file?")
        for guid in by_guid:
            found.expect(guid)
        return cls(data, labels_path, found.in_order(), by_guid)


def natural_key(guid: str) -> str:
    """Sort key in which ``8`` comes before ``26``."""
    # Text and digits in turn, text first. A longer number is a larger one; what ends comes first.
    key = []
    for index, part in enumerate(re.split(r"([0-9]+)", guid)):
        digits = part.lstrip("0")
        key.append(chr(len(digits) + 1) + digits if index % 2 else part)
    return "\0".join([*key, "", guid])


_LABELLED_ONLY = "labelled, but neither image nor text is there"


class _Manifest(dict[str, Pair]):
    """Pairs of a manifest, by guid."""

    def expect(self, guid: str) -> None:
        """Take note of a pair that a label names."""
        self.setdefault(guid, Pair(guid, problem=_LABELLED_ONLY))

    def in_order(self) -> Sequence[Pair]:
        """Return the pairs in natural order."""
        return [self[guid] for guid in sorted(self, key=natural_key)]


class _Folder(dict[str, int]):
    """What is in a folder: by guid, the number of its two suffixes."""

    def __init__(self, folder: Path, labels_path: Path | None) -> None:
        super().__init__()
        self._folder = str(folder)
        self._kinds: dict[tuple[str | None, str | None], int] = {}  # (image's suffix, text's suffix)
        self._odd: dict[str, Pair] = {}
        twice: dict[str, list[str]] = {}
        with os.scandir(folder) as entries:
            for entry in entries:
                guid, suffix = os.path.splitext(entry.name)
                is_image, is_text = suffix.lower() in IMAGE_SUFFIXES, suffix.lower() == ".txt"
                if guid.startswith(".") or not (is_image or is_text) or not entry.is_file():
                    continue
                if labels_path is not None and is_text and _is_same_file(entry, labels_path):
                    continue
                image, text = self._suffixes(guid)
                if is_image and image is not None:
                    twice.setdefault(guid, [guid + image]).append(entry.name)
                self._set(guid, suffix if is_image else image, suffix if is_text else text)
        for guid, names in twice.items():
            names.sort()
            image, text = os.path.join(folder, names[0]), self._suffixes(guid)[1]
            text_path = None if text is None else os.path.join(folder, guid + text)
            self._odd[guid] = Pair(guid, image, text_path, None, "guid given twice: " + ", ".join(names))
        for guid in [guid for guid in self if not guid.isprintable()]:
            readable = guid.encode(errors="replace").decode()
            if guid != readable:
                pair = self._odd.pop(guid, None) or _pair(self._folder, guid, self._suffixes(guid))
                del self[guid]
                self._set(readable, None, None)
                self._odd[readable] = replace(pair, guid=readable, problem="the file's name is not UTF-8")

    def _suffixes(self, guid: str) -> tuple[str | None, str | None]:
        kind = self.get(guid)
        return (None, None) if kind is None else list(self._kinds)[kind]

    def _set(self, guid: str, image: str | None, text: str | None) -> None:
        self[guid] = self._kinds.setdefault((image, text), len(self._kinds))

    def expect(self, guid: str) -> None:
        """Take note of a pair that a label names."""
        if guid not in self:
            self._set(guid, None, None)

    def in_order(self) -> Sequence[Pair]:
        """Return the pairs in natural order, each made when it is asked for: a million would take half a gigabyte."""
        guids = sorted(self, key=natural_key)
        kinds = np.fromiter((self[guid] for guid in guids), np.uint16, len(guids))
        folder, odd, suffixes = self._folder, self._odd, list(self._kinds)

        def make(number: int) -> Pair:
            guid = guids[number]
            return odd.get(guid) or _pair(folder, guid, suffixes[kinds[number]])

        return MadeWhenAsked(len(guids), make)


class MadeWhenAsked(Sequence[Item]):
    """A sequence of ``length`` items, each made by ``make(number)`` when it is asked for."""

    def __init__(self, length: int, make: Callable[[int], Item]) -> None:
        self._numbers, self._make = range(length), make

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        chosen = self._numbers[index]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(each) for each in chosen]


def _pair(folder: str, guid: str, suffixes: tuple[str | None, str | None]) -> Pair:
    image, text = (None if suffix is None else os.path.join(folder, guid + suffix) for suffix in suffixes)
    return Pair(guid, image, text, None, _LABELLED_ONLY if image is None and text is None else None)


def _is_same_file(entry: os.DirEntry[str], path: Path) -> bool:
    if entry.name != path.name and not entry.is_symlink() and not path.is_symlink():
        return False
    return os.path.realpath(entry.path) == os.path.realpath(path)


def _read_manifest(path: Path) -> tuple[dict[str, Pair], dict[str, str | None]]:
    header, rows = read_table(path)
    if "guid" not in header or "image" not in header or not {"text", "text_path"} & set(header):
        raise DataError(
            f"{path}: a manifest has the columns guid, image, text or text_path, and label if known; "
            f"found {','.join(header)[:80]}"
        )
    pairs: dict[str, Pair] = {}
    for line, row in rows:
        guid, image, text_path = (cell_text(row.get(name)) for name in ("guid", "image", "text_path"))
        if not guid:
            raise DataError(f"{path} line {line}: the guid is empty")
        if guid in pairs:
            pairs[guid] = replace(pairs[guid], problem=f"guid given twice, again in line {line} of {path.name}")
            continue
        text = row.get("text")
        pairs[guid] = Pair(
            guid,
            str(path.parent / image) if image else None,
            str(path.parent / text_path) if text_path else None,
            None if text is None or text_path else str(text),
        )
    return pairs, read_labels(path) if "label" in header else {}
