"""Labels and lists of guids: small tables whose guids name rows of the cache."""

import csv
import io
import json
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import DataError

_LONGEST_CELL = 10_000_000  # characters, because the texts of a manifest can be long
# Spellings of a missing label. Other spellings are labels, because there is a bread called Nan.
UNLABELLED = ("", "null", "NULL", "nan", "NaN")
_WHOLE = re.compile(r"[+-]?[0-9]+\.0")
# Usual names of a column, in any capitals.
USUAL_NAMES = {
    "guid": ("guid", "id"),
    "image": ("image", "img", "image_path", "file_name"),
    "text": ("text", "caption", "title"),
    "text_path": ("text_path",),
    "label": ("label", "tag", "category", "class"),
}
NO_COLUMNS: Mapping[str, str] = MappingProxyType({})


def read_table(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    """Read a table: Parquet, JSON (a list of objects), JSON Lines, or text with commas, semicolons or tabs.

    Return the header (for JSON: all keys) and (line number, cells by column) of each row. A DataError says that there
    is no such file, or that it is empty, not UTF-8, has a column twice, or a line that cannot be parsed.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: give a table, such as a CSV file")
    if not path.is_file():
        raise DataError(f"no such file: {path}: give an existing table")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save the table as UTF-8") from error
    if suffix in (".jsonl", ".ndjson"):
        return _read_json(path, _json_lines(path, content))
    if suffix == ".json":
        return _read_json(path, _json_objects(path, content))
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(io.StringIO(content, newline=""), strict=True, delimiter=_delimiter(content))
    try:
        header = [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{path} line 1: {error}") from error
    if not header:
        raise DataError(f"{path} is empty: expected a header line such as guid,tag")
    for name, count in Counter(header).items():
        if count > 1:
            raise DataError(f"{path}: the header has the column {name!r} {count} times: keep one")
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


def _delimiter(content: str) -> str:
    """Return the delimiter that makes most cells of the first line; a comma where they are equal."""
    first = content[: content.find("\n") + 1] or content
    cells = {delimiter: len(next(csv.reader([first], delimiter=delimiter), [])) for delimiter in ",;\t"}
    return max(cells, key=cells.__getitem__)


def _json_lines(path: Path, content: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError also for a number with thousands of digits
                raise DataError(f"{path} line {number} is not JSON: {getattr(error, 'msg', error)}") from error


def _json_objects(path: Path, content: str) -> Iterator[tuple[int, Any]]:
    try:
        objects = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {getattr(error, 'msg', error)}") from error
    if not isinstance(objects, list):
        raise DataError(f"{path}: expected a list of objects, [{{…}}, …]; with an object in each line, call it .jsonl")
    return enumerate(objects, 1)


def _read_json(
    path: Path, objects: Iterator[tuple[int, Any]]
) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    rows = []
    for number, row in objects:
        if not isinstance(row, dict):
            raise DataError(f'{path} line {number}: expected an object such as {{"guid": …}}, found {str(row)[:40]!r}')
        rows.append((number, row))
    if not rows:
        raise DataError(f"{path} is empty")
    return list(dict.fromkeys(key for _, row in rows for key in row)), iter(rows)


def _read_parquet(path: Path) -> tuple[list[str], Iterator[tuple[int, dict[str, Any]]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"{path}: Parquet needs another package: pip install pyarrow") from error
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
    """Return a table cell as stripped text. A missing value (None, or pandas' NaN) is the empty text."""
    return "" if is_missing(value) else str(value).strip()


def is_missing(value: Any) -> bool:
    """Whether a cell holds no value: None, or the number NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain_cell(path: Path, line: int, row: dict[str, Any], column: str) -> str:
    """Return ``cell_text`` of a cell; raise a DataError for a list, an object or half a character, as JSON has them."""
    value = row.get(column)
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        raise DataError(f"{path} line {line}: {column} is {kind}, {str(value)[:40]}: give one value")
    text = cell_text(value)
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # lone surrogates cannot be encoded
        raise DataError(f"{path} line {line}: {column} holds half a character, {ascii(text)[:60]}: correct it")
    return text


def parse_columns(text: str) -> dict[str, str]:
    """Read ``guid=id,text=title+description``: columns by the names of ``USUAL_NAMES``."""
    columns = {}
    for part in text.split(","):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column or name not in USUAL_NAMES:
            raise DataError(
                f"--columns cannot have {part.strip()!r}: write name=column, with a name among {', '.join(USUAL_NAMES)}"
            )
        columns[name] = column
    return columns


def columns_of(path: Path, header: Sequence[str], name: str, chosen: Mapping[str, str] = NO_COLUMNS) -> list[str]:
    """Return the columns of a table that hold the ``name`` (a key of ``USUAL_NAMES``); several only for the text.

    These are the columns ``chosen`` for it, as in ``{"text": "title+description"}``, or the column with a usual name.
    Raise a DataError if a chosen column is missing, or if two columns have a usual name.
    """
    if name in chosen:
        columns = [column.strip() for column in chosen[name].split("+")] if name == "text" else [chosen[name]]
        for column in columns:
            if column not in header:
                raise DataError(f"{path} has no column {column!r} for the {name}: it has {', '.join(header)[:200]}")
        return columns
    columns = [column for column in header if column.casefold() in USUAL_NAMES[name] and column not in chosen.values()]
    if len(columns) > 1:
        listed = " and ".join(map(repr, columns))
        raise DataError(f"{path}: the columns {listed} can both be the {name}: choose with --columns {name}=COLUMN")
    return columns


def guid_of(name: str) -> str:
    """Return a name as a guid, in Unicode's composed form (NFC), because macOS decomposes é in file names."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def rows_by_guid(
    path: Path, rows: Iterable[tuple[int, dict[str, Any]]], column: str, unlike: Container[str] = ()
) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (line, guid, row); raise a DataError if the guid is empty, or among those in ``unlike`` by then."""
    for line, row in rows:
        guid = guid_of(plain_cell(path, line, row, column))
        if not guid:
            raise DataError(f"{path} line {line}: the guid is empty: fill it in or remove the line")
        if guid in unlike:
            first = next(line for line, row in read_table(path)[1] if guid_of(cell_text(row.get(column))) == guid)
            raise DataError(f"{path}: guid {guid!r} occurs twice, in lines {first} and {line}: keep one")
        yield line, guid, row


class Labels(dict[str, str | None]):
    """Label by guid, in the order of the file; None for an unlabelled pair.

    ``unlabelled`` counts the unlabelled pairs by the content of the cell ("" for an empty cell).
    """

    def __init__(self) -> None:
        super().__init__()
        self.unlabelled: Counter[str] = Counter()


def read_labels(path: str | Path, columns: Mapping[str, str] = NO_COLUMNS) -> Labels:
    """Read labels: a table of guids and labels, or a manifest with a label column (see ``columns_of``).

    A guid that a manifest lists twice is unlabelled; featurize rejects such a pair. If every label is a whole number
    that pandas wrote as a fraction (``0.0``), labels are read as whole numbers (``0``).

    Returns
    -------
    Labels
        None if the tag is one of ``UNLABELLED``.

    Raises
    ------
    DataError
        No such file, another header, an empty guid, a label that is a list, or a guid that a table of two columns lists
        twice.
    """
    path = Path(path)
    header, rows = read_table(path)
    # The columns were chosen for a manifest; labels in a table of their own have usual names.
    chosen = {name: column for name, column in columns.items() if name != "text" and column in header}
    guids, found = columns_of(path, header, "guid", chosen), columns_of(path, header, "label", chosen)
    # A column `tag` among others may be that of predictions.
    is_manifest = "label" in chosen or found == ["label"] or columns_of(path, header, "image", chosen)
    if not guids or not found or not (len(header) == 2 or is_manifest):
        raise DataError(f"{path}: expected the header guid,tag, found {','.join(header)[:80]}")
    labels = Labels()
    for line, guid, row in rows_by_guid(path, rows, guids[0], labels if len(header) == 2 else ()):
        label = plain_cell(path, line, row, found[0])
        if guid in labels:
            if labels[guid] is not None:
                labels[guid] = None
                labels.unlabelled["guid given twice"] += 1
        elif label in UNLABELLED:
            labels[guid] = None
            labels.unlabelled[label] += 1
        else:
            labels[guid] = sys.intern(label)  # equal labels are stored once
    if not labels:
        raise DataError(f"{path} has a header, but no labels: add lines guid,tag")
    names = {label for label in labels.values() if label is not None}
    if names and all(_WHOLE.fullmatch(name) for name in names):
        labels.update({guid: sys.intern(label[:-2]) for guid, label in labels.items() if label is not None})
    return labels


def read_ids(path: str | Path) -> list[str]:
    """Read a list of guids: a table with a column of them (other columns are ignored).

    Raises
    ------
    DataError
        No such file, another header, an empty guid, a guid that occurs twice, or no guid at all.
    """
    path = Path(path)
    header, rows = read_table(path)
    column = columns_of(path, header, "guid")
    if not column:
        raise DataError(f"{path}: expected a header with the column guid, found {','.join(header)[:80]}")
    guids: dict[str, None] = {}
    for _, guid, _ in rows_by_guid(path, rows, column[0], guids):
        guids[guid] = None
    if not guids:
        raise DataError(f"{path} lists no guid: add a line per pair")
    return list(guids)
