"""Labels and lists of guids: small tables that are joined with the cache by guid."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import DataError

# Long cells (a manifest's texts) are legitimate.
_LONGEST_CELL = 10_000_000


def read_table(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Read a CSV, JSONL or Parquet table, by its suffix (anything but .jsonl and .parquet is CSV).

    Returns
    -------
    columns : list of str
        The header (for JSONL: all keys).
    rows : iterator of (line number, dict)

    Raises
    ------
    DataError
        No such file, empty, not UTF-8, or a line that cannot be parsed.
    """
    if not path.is_file():
        raise DataError(f"no such file: {path}")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from error
    if path.suffix == ".jsonl":
        return _read_jsonl(path, content)
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True)
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path} line 1: {error}") from error
    if not header:
        raise DataError(f"{path} is empty: expected a header line such as guid,tag")
    return header, _csv_rows(path, reader, header)


def _csv_rows(path: Path, reader: Any, header: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path} line {reader.line_num}: {len(cells)} cells, but the header has {len(header)} "
                    f"({','.join(header)})"
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: {error}") from error


def _read_jsonl(path: Path, content: str) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path} line {number} is not JSON: {error.msg}") from error
        if not isinstance(row, dict):
            raise DataError(f'{path} line {number}: expected an object such as {{"guid": …}}, found {line[:40]!r}')
        rows.append((number, row))
    if not rows:
        raise DataError(f"{path} is empty")
    return list(dict.fromkeys(key for _, row in rows for key in row)), iter(rows)


def _read_parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs one more package: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error
    return table.column_names, enumerate(table.to_pylist(), 1)


def table_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a small table as the text of a CSV file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def cell_text(value: Any) -> str:
    """Return a table cell as stripped text; None is the empty text."""
    return "" if value is None else str(value).strip()


def read_labels(path: str | Path) -> dict[str, str | None]:
    """Read labels: a CSV with header ``guid,tag``, or a manifest with the columns ``guid`` and ``label``.

    A guid that a manifest gives twice is unlabelled: featurizing leaves such a pair out, and says so.

    Returns
    -------
    dict
        Label by guid, in the file's order; None where the tag is empty, ``null`` or ``nan``: unlabelled.

    Raises
    ------
    DataError
        No such file, another header, an empty guid, or a guid that a ``guid,tag`` file gives twice.
    """
    path = Path(path)
    header, rows = read_table(path)
    if {"guid", "label"} <= set(header):
        column = "label"
    elif header == ["guid", "tag"]:
        column = "tag"
    else:
        hint = ": save it with commas" if ";" in header[0] else ""
        raise DataError(f"{path}: expected the header guid,tag, found {','.join(header)[:80]}{hint}")
    labels: dict[str, str | None] = {}
    names: dict[str, str] = {}  # of a million equal labels, one is kept
    for line, row in rows:
        guid, label = cell_text(row.get("guid")), cell_text(row.get(column))
        if not guid:
            raise DataError(f"{path} line {line}: the guid is empty")
        if guid in labels and column == "tag":
            first = next(line for line, row in read_table(path)[1] if cell_text(row.get("guid")) == guid)
            raise DataError(f"{path}: guid {guid!r} stands twice, in lines {first} and {line}: keep one")
        unlabelled = guid in labels or label.lower() in ("", "null", "nan")
        labels[guid] = None if unlabelled else names.setdefault(label, label)
    if not labels:
        raise DataError(f"{path} has a header, but names no pair")
    return labels


def read_ids(path: str | Path) -> list[str]:
    """Read a list of guids: a table with the column ``guid`` (other columns are ignored).

    Raises
    ------
    DataError
        No such file, another header, an empty guid, a guid given twice, or no guid at all.
    """
    path = Path(path)
    header, rows = read_table(path)
    if "guid" not in header:
        raise DataError(f"{path}: expected a header with the column guid, found {','.join(header)[:80]}")
    lines: dict[str, int] = {}
    for line, row in rows:
        guid = cell_text(row.get("guid"))
        if not guid:
            raise DataError(f"{path} line {line}: the guid is empty")
        if guid in lines:
            raise DataError(f"{path}: guid {guid!r} stands twice, in lines {lines[guid]} and {line}: keep one")
        lines[guid] = line
    if not lines:
        raise DataError(f"{path} names no guid")
    return list(lines)
