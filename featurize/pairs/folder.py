"""Pairs in a folder: ``<guid>.jpg`` and ``<guid>.txt``."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, overload

import numpy as np

from ...cache.labels import guid_of
from .image import IMAGE_SUFFIXES, is_image_file
from .pair import Pair, guid_problem, natural_key

Item = TypeVar("Item")


class Folder(dict[str, int]):
    """Pairs of a folder. The value of a guid is the number of its combination of suffixes, to save memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder)
        self._kinds: dict[tuple[str | None, str | None], int] = {}  # number by (image's suffix, text's suffix)
        self._odd: dict[str, Pair] = {}  # pairs that guid and suffixes do not describe

    @classmethod
    def scan(cls, path: Path, labels_path: Path | None) -> "Folder":
        """List the pairs in a folder. A labels file among them is not taken for a text."""
        folder = cls(path)
        folder._add_files(labels_path)
        folder._add_other_images()
        for guid in [guid for guid in folder if not guid.isprintable()]:
            folder._check_name(guid)
        return folder

    def _add_files(self, labels_path: Path | None) -> None:
        twice: dict[str, list[str]] = {}
        for entry, name, suffix in self._files():
            is_image, is_text = suffix.lower() in IMAGE_SUFFIXES, suffix.lower() == ".txt"
            if not (is_image or is_text):
                continue
            if labels_path is not None and is_text and _is_same_file(entry, labels_path):
                continue
            guid = guid_of(name)
            image, text = self._suffixes(guid)
            earlier = image if is_image else text
            if earlier is not None:
                twice.setdefault(guid, [guid + earlier]).append(entry.name)
            elif guid != name or guid in self._odd:  # the file name is the decomposed form of the guid
                pair = self._odd.get(guid) or (self._pair(guid) if guid in self else Pair(guid))
                self._odd[guid] = replace(pair, **{"image" if is_image else "text_path": entry.path})
            self._set(guid, suffix if is_image else image, suffix if is_text else text)
        for guid, names in twice.items():
            self._odd[guid] = replace(self._pair(guid), problem="guid given twice: " + ", ".join(sorted(names)))

    def _files(self) -> Iterator[tuple[os.DirEntry[str], str, str]]:
        """Yield each file with its name, split into stem and suffix."""
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name, suffix = os.path.splitext(entry.name)
                if not name.startswith(".") and entry.is_file():
                    yield entry, name, suffix

    def _add_other_images(self) -> None:
        """Give texts without an image the file of the same name as image, or as the reason if it is not an image."""
        without_image = {guid for guid in self if self._suffixes(guid)[0] is None}
        if not without_image:
            return
        for entry, name, suffix in self._files():
            guid = guid_of(name)
            if guid in without_image and suffix.lower() != ".txt" and self._suffixes(guid)[0] is None:
                problem = None if is_image_file(entry.path) else f"{entry.name} is not a readable image"
                self._odd[guid] = replace(self._pair(guid), image=entry.path, problem=problem)
                if problem is None:
                    self._set(guid, suffix, self._suffixes(guid)[1])

    def _check_name(self, guid: str) -> None:
        readable = os.fsencode(guid).decode(errors="backslashreplace")
        problem = "the file's name is not UTF-8" if readable != guid else guid_problem(guid)
        if problem is not None:
            pair = replace(self._pair(guid), guid=readable, problem=problem)
            self._odd.pop(guid, None)
            del self[guid]
            self._set(readable, None, None)
            self._odd[readable] = pair

    def _suffixes(self, guid: str) -> tuple[str | None, str | None]:
        kind = self.get(guid)
        return (None, None) if kind is None else list(self._kinds)[kind]

    def _set(self, guid: str, image: str | None, text: str | None) -> None:
        self[guid] = self._kinds.setdefault((image, text), len(self._kinds))

    def _pair(self, guid: str) -> Pair:
        return self._odd.get(guid) or _pair(self._folder, guid, self._suffixes(guid))

    def expect(self, guid: str) -> None:
        """Add the pair that a label names, if it is not in the folder."""
        if guid not in self:
            self._set(guid, None, None)

    def in_order(self) -> Sequence[Pair]:
        """Return the pairs in natural order. Each is made on access, because a million would take half a gigabyte."""
        guids = sorted(self, key=natural_key)
        kinds = np.fromiter((self[guid] for guid in guids), np.uint16, len(guids))
        folder, odd, suffixes = self._folder, self._odd, list(self._kinds)

        def make(number: int) -> Pair:
            guid = guids[number]
            return odd.get(guid) or _pair(folder, guid, suffixes[kinds[number]])

        return LazySequence(len(guids), make)


class LazySequence(Sequence[Item]):
    """A sequence of ``length`` items that calls ``make(number)`` on each access."""

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
        return self._make(chosen) if isinstance(chosen, int) else [self._make(number) for number in chosen]


def _pair(folder: str, guid: str, suffixes: tuple[str | None, str | None]) -> Pair:
    image, text = (None if suffix is None else os.path.join(folder, guid + suffix) for suffix in suffixes)
    return Pair.named_by_label(guid) if image is None and text is None else Pair(guid, image, text)


def _is_same_file(entry: os.DirEntry[str], path: Path) -> bool:
    if entry.name != path.name and not entry.is_symlink() and not path.is_symlink():
        return False
    return os.path.realpath(entry.path) == os.path.realpath(path)
