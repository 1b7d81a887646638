"""Pairs listed in a table: CSV, JSON Lines or Parquet."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...cache.errors import DataError
from ...cache.labels import cell_text, guid_of, is_missing, label_column, plain_cell, read_table
from .pair import Pair, guid_problem, natural_key

_COLUMNS = ("guid", "image", "text", "text_path")


class Manifest(dict[str, Pair]):
    """Pairs of a manifest, by guid, in its order.

    Attributes
    ----------
    has_labels
        Whether a column holds labels.
    unused
        Names of columns that mmcli does not use.
    """

    def __init__(self) -> None:
        super().__init__()
        self.has_labels = False
        self.unused: list[str] = []

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest.

        Raises
        ------
        DataError
            It cannot be read, lacks a column, or has an empty guid.
        """
        header, rows = read_table(path)
        if "guid" not in header or "image" not in header or not {"text", "text_path"} & set(header):
            raise DataError(
                f"{path}: a manifest needs the columns guid, image, and text or text_path (label or tag is optional), "
                f"but has {','.join(header)[:80]!a}"
                + (": save it with commas" if re.search("[;\t]", header[0]) else "")
            )
        label = label_column(path, header)
        manifest = cls()
        manifest.has_labels = label is not None
        manifest.unused = [name for name in header if name not in (*_COLUMNS, label)]
        for line, row in rows:
            guid = guid_of(plain_cell(path, line, row, "guid"))
            if not guid:
                raise DataError(f"{path} line {line}: the guid is empty: fill it in or remove the line")
            if guid in manifest:
                problem = f"guid given twice, again in line {line} of {path.name}"
                manifest[guid] = replace(manifest[guid], problem=problem)
            else:
                manifest[guid] = _pair_of(path.parent, guid, row)
        return manifest

    def expect(self, guid: str) -> None:
        """Add the pair that a label names, if it is not listed."""
        self.setdefault(guid, Pair.named_by_label(guid))

    def in_order(self) -> Sequence[Pair]:
        """Return the pairs in natural order."""
        return [self[guid] for guid in sorted(self, key=natural_key)]


def _pair_of(folder: Path, guid: str, row: dict[str, Any]) -> Pair:
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
        str(folder / image) if image else None,
        str(folder / text_path) if text_path else None,
        None if is_missing(text) or text_path else str(text),
        problem,
    )
