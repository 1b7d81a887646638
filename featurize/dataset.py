"""The raw pairs: a folder of ``<guid>.jpg`` + ``<guid>.txt``, or a manifest."""

import hashlib
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..cache.errors import DataError
from ..cache.labels import cell_text, read_labels, read_table
from .image import IMAGE_SUFFIXES


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
    pairs: list[Pair]
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
        if data.is_dir():
            found = _scan_folder(data, labels_path)
            by_guid: dict[str, str | None] = {}
        elif data.is_file():
            found, by_guid = _read_manifest(data)
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
            if not by_guid.keys() & found.keys():
                raise DataError(f"none of the {len(by_guid)} guids in {labels} is in {data}: is it the right file?")
        for guid in by_guid:
            if guid not in found:
                found[guid] = Pair(guid, problem="labelled, but neither image nor text is there")
        return cls(data, labels_path, [found[guid] for guid in sorted(found, key=natural_key)], by_guid)


def natural_key(guid: str) -> tuple[list[str | int], str]:
    """Sort key in which ``8`` comes before ``26``."""
    parts = re.split(r"([0-9]+)", guid)  # text and digits in turn, text first
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], guid


def _scan_folder(folder: Path, labels_path: Path | None) -> dict[str, Pair]:
    images: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    own_labels = None if labels_path is None else os.path.realpath(labels_path)
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            guid, suffix = os.path.splitext(entry.name)
            if guid.startswith(".") or not entry.is_file() or os.path.realpath(entry.path) == own_labels:
                continue
            if suffix.lower() in IMAGE_SUFFIXES:
                images.setdefault(guid, []).append(entry.path)
            elif suffix.lower() == ".txt":
                texts[guid] = entry.path
    pairs = {}
    for guid in images.keys() | texts.keys():
        files, text_path = images.get(guid, []), texts.get(guid)
        problem = None
        if len(files) > 1:
            problem = "guid given twice: " + ", ".join(os.path.basename(path) for path in files)
        if not guid.isprintable() and guid != guid.encode(errors="replace").decode():
            problem, guid = "the file's name is not UTF-8", guid.encode(errors="replace").decode()
        pairs[guid] = Pair(guid, files[0] if files else None, text_path, None, problem)
    return pairs


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
