"""A dataset of raw pairs: a folder of ``<guid>.jpg`` and ``<guid>.txt``, or a manifest (CSV, JSON Lines or Parquet)."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from ...cache.errors import DataError
from ...cache.labels import (
    NO_COLUMNS,
    USUAL_NAMES,
    Labels,
    cell_text,
    columns_of,
    guid_of,
    is_missing,
    read_labels,
    read_table,
    rows_by_guid,
)
from .image import IMAGE_SUFFIXES, is_image_file
from .pair import Pair, guid_problem, natural_key
from .spelling import Join, join_of

Item = TypeVar("Item")
Suffixes = tuple[str | None, str | None]  # of the image's and the text's file


@dataclass(frozen=True)
class Dataset:
    """Raw pairs, in natural order of guid, and their labels.

    Attributes
    ----------
    data, labels_path
        Absolute paths. The cache records them, so that later commands need no flags.
    pairs
        Every pair that has a file, a row in the manifest, or a label.
    labels
        Label (or None) by guid, as in the labels file; empty without a labels file.
    join
        How labels and pairs fit together.
    manifest
        Guids in the order of the manifest; None for a folder.
    columns, image_root
        The columns that were chosen for a manifest (see ``cache.labels.columns_of``), and the folder of its images.
    used_columns, unused_columns
        Columns of the manifest by their meaning, and those that mmcli does not use.
    """

    data: Path
    labels_path: Path | None
    pairs: Sequence[Pair]
    labels: Labels
    join: Join = field(default_factory=lambda: join_of((), ()))
    manifest: list[str] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    image_root: Path | None = None
    used_columns: Mapping[str, str] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)

    @classmethod
    def open(
        cls,
        data: str | Path,
        labels: str | Path | None = None,
        columns: Mapping[str, str] = NO_COLUMNS,
        image_root: str | Path | None = None,
    ) -> "Dataset":
        """List the pairs of ``data``, a folder or a manifest (a table, see ``cache.labels.read_table``).

        A guid that occurs only in ``labels`` becomes a pair with a ``problem``. ``columns`` are those of a manifest
        that have unusual names (see ``cache.labels.columns_of``), and ``image_root`` the folder of its images.

        Raises
        ------
        DataError
            No such folder, manifest or labels file, no pair in it, or a header that mmcli does not understand.
        """
        data = Path(os.path.abspath(data))
        labels_path = None if labels is None else Path(os.path.abspath(labels))
        source: _Folder | _Manifest
        if data.is_dir():
            source = _Folder.scan(data, labels_path)
        elif data.is_file():
            root = None if image_root is None else Path(os.path.abspath(image_root))
            chosen = dict(columns)
            if labels_path is not None:
                chosen.pop("label", None)
            source = _Manifest.read(data, chosen, root)
            if "label" in source.used and labels_path is None:
                labels_path = data
        else:
            raise DataError(f"no such folder or manifest: {data}: give the path of the pairs")
        if not source:
            raise DataError(
                f"no pairs in {data}: expected files <guid>.jpg (or {', '.join(IMAGE_SUFFIXES[1:])}) and <guid>.txt"
                + (_in_subfolders(data) if data.is_dir() else "")
            )
        by_guid = Labels() if labels_path is None else read_labels(labels_path, columns)
        join = join_of(by_guid, source)
        if by_guid and join.joined == 0:
            raise DataError(
                f"none of the {len(by_guid)} guids in {labels_path} is in {data}: give the labels of these pairs. "
                + join.describe()
            )
        for guid in by_guid:
            source.expect(guid)
        dataset = cls(data, labels_path, source.in_order(), by_guid, join)
        if isinstance(source, _Manifest):
            listed = [guid for guid in source if not source[guid].absent]
            root = None if image_root is None else Path(os.path.abspath(image_root))
            return replace(
                dataset,
                manifest=listed,
                columns=dict(columns),
                image_root=root,
                used_columns=source.used,
                unused_columns=source.unused,
            )
        return dataset

    @classmethod
    def recorded(cls, dataset: Mapping[str, Any], data: str | Path | None = None, labels: bool = False) -> "Dataset":
        """List the pairs that a cache records in its header, or the same pairs where they are now, in ``data``."""
        return cls.open(
            data or dataset["data"],
            dataset["labels"] if labels else None,
            dataset.get("columns", NO_COLUMNS),
            dataset.get("image_root"),
        )

    def to_header(self) -> dict[str, Any]:
        """Return what a cache records of this dataset."""
        chosen = {"columns": dict(self.columns)} if self.columns else {}
        root = {} if self.image_root is None else {"image_root": str(self.image_root)}
        labels = None if self.labels_path is None else str(self.labels_path)
        return {"data": str(self.data), "labels": labels} | chosen | root

    @property
    def order(self) -> list[str]:
        """Guids in the order of the manifest, or in natural order for a folder."""
        return self.manifest or [pair.guid for pair in self.pairs if not pair.absent]


def _in_subfolders(folder: Path) -> str:
    """Return a hint if there are images in a subfolder, else an empty string."""
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in below.iterdir()):
            return f"; there are images in {below.name}/: give that folder, or a manifest that names the files"
    return ""


class LazySequence(Sequence[Item]):
    """A sequence of ``length`` items that calls ``make(number)`` on each access."""

    def __init__(self, length: int, make: Callable[[int], Item]) -> None:
        self._numbers, self._make = range(length), make

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        chosen = self._numbers[index]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(number) for number in chosen]


class _Folder(dict[str, Suffixes]):
    """Pairs of a folder: suffixes of the files by guid. Equal suffixes are one object, to save memory."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = str(folder)
        self._shared: dict[Suffixes, Suffixes] = {}
        self._odd: dict[str, Pair] = {}  # pairs that guid and suffixes do not describe

    @classmethod
    def scan(cls, path: Path, labels_path: Path | None) -> "_Folder":
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
        for entry, name, suffix in self._files() if without_image else ():
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

    def _suffixes(self, guid: str) -> Suffixes:
        return self.get(guid, (None, None))

    def _set(self, guid: str, image: str | None, text: str | None) -> None:
        self[guid] = self._shared.setdefault((image, text), (image, text))

    def _pair(self, guid: str) -> Pair:
        return self._odd.get(guid) or _pair_in_folder(self._folder, guid, self._suffixes(guid))

    def expect(self, guid: str) -> None:
        """Add the pair that a label names, if it is not in the folder."""
        if guid not in self:
            self._set(guid, None, None)

    def in_order(self) -> Sequence[Pair]:
        """Return the pairs in natural order. Each is made on access, because a million would take half a gigabyte."""
        guids = sorted(self, key=natural_key)
        folder, odd, suffixes = self._folder, self._odd, [self[guid] for guid in guids]

        def make(number: int) -> Pair:
            guid = guids[number]
            return odd.get(guid) or _pair_in_folder(folder, guid, suffixes[number])

        return LazySequence(len(guids), make)


def _pair_in_folder(folder: str, guid: str, suffixes: Suffixes) -> Pair:
    image, text = (None if suffix is None else os.path.join(folder, guid + suffix) for suffix in suffixes)
    return Pair.named_by_label(guid) if image is None and text is None else Pair(guid, image, text)


def _is_same_file(entry: os.DirEntry[str], path: Path) -> bool:
    if entry.name != path.name and not entry.is_symlink() and not path.is_symlink():
        return False
    return os.path.realpath(entry.path) == os.path.realpath(path)


class _Manifest(dict[str, Pair]):
    """Pairs of a manifest by guid, in its order, and its columns: by their meaning, and those that are not used."""

    def __init__(self, used: dict[str, str], unused: list[str]) -> None:
        super().__init__()
        self.used, self.unused = used, unused

    @classmethod
    def read(cls, path: Path, chosen: Mapping[str, str], image_root: Path | None) -> "_Manifest":
        """Read a manifest; DataError if it cannot be read, lacks a column, or has an empty guid."""
        header, rows = read_table(path)
        columns = {name: found for name in USUAL_NAMES if (found := columns_of(path, header, name, chosen))}
        if not {"guid", "image"} <= columns.keys() or not {"text", "text_path"} & columns.keys():
            raise DataError(
                f"{path}: a manifest needs columns for guid, image, and text or text_path (label is optional), but has "
                f"{','.join(header)[:80]!a}: name them, as in --columns guid=id,image=picture,text=title+description"
            )
        used = {column for found in columns.values() for column in found}
        meanings = {name: "+".join(found) for name, found in columns.items()}
        manifest = cls(meanings, [column for column in header if column not in used])
        for line, guid, row in rows_by_guid(path, rows, columns["guid"][0]):
            if guid in manifest:
                problem = f"guid given twice, again in line {line} of {path.name}"
                manifest[guid] = replace(manifest[guid], problem=problem)
            else:
                cells = {name: row.get(found[0]) for name, found in columns.items()}
                if len(columns.get("text", ())) > 1:
                    texts = [cell_text(row.get(column)) for column in columns["text"]]
                    cells["text"] = " ".join(text for text in texts if text)
                manifest[guid] = _pair_in_row(path.parent, image_root or path.parent, guid, cells)
        return manifest

    def expect(self, guid: str) -> None:
        """Add the pair that a label names, if it is not listed."""
        self.setdefault(guid, Pair.named_by_label(guid))

    def in_order(self) -> Sequence[Pair]:
        """Return the pairs in natural order."""
        return [self[guid] for guid in sorted(self, key=natural_key)]


def _pair_in_row(folder: Path, image_root: Path, guid: str, row: dict[str, Any]) -> Pair:
    problem = guid_problem(guid)
    for name in ("image", "text", "text_path"):
        if isinstance(row.get(name), (list, dict)):
            problem = problem or f"{name} is a list or an object, not one value"
    image, text_path = cell_text(row.get("image")), cell_text(row.get("text_path"))
    for path in (image, text_path):
        if path.startswith(("http://", "https://")):
            problem = problem or "the path is a URL: download the file first"
    text = row.get("text")
    return Pair(
        guid,
        _path_in(image_root, image) if image else None,
        _path_in(folder, text_path) if text_path else None,
        None if is_missing(text) or text_path else str(text),
        problem,
    )


def _path_in(folder: Path, name: str) -> str:
    """Return the path of a file that a manifest in ``folder`` names. Backslashes are slashes if no file has them."""
    path = str(folder / name)
    return path.replace("\\", "/") if os.sep == "/" and "\\" in name and not os.path.exists(path) else path
