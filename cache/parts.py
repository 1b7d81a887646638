"""Writing a cache: each finished block is a part beside it, and a streamed merge of all parts replaces the file.

The last good cache is never opened for writing. A part gets its name only when it is complete and on disk, so all parts
can be used after a crash.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .atomic import atomic_path, make_folder
from .errors import CacheError, DiskFullError
from .features import text_offsets
from .hdf5 import DAMAGE, new_hdf5, row_bytes, slices, window_rows
from .labels import guid_of
from .schema import PER_ROW, Header
from .store import FeatureCache

_CHUNK_ROWS = 256
_CHUNK_BYTES = 1 << 20
_OPEN_FILES = 16
_KEPT_DAYS = 30

RowSource = tuple[str, Path, int]  # guid, cache file or part, row in that file


@dataclass
class Block:
    """Rows that were computed together, in the layout of the file (see ``schema``).

    ``columns`` holds arrays by dataset name, (n, ...). ``text_tokens`` are (L, w_t) per row, or None. ``text_ids`` are
    token ids, (L,) per row, if ``text_tokens`` are states from the middle of a tower.
    """

    guids: list[str]
    columns: dict[str, NDArray[Any]]
    text_tokens: list[NDArray[Any]] | None = None
    text_ids: list[NDArray[np.int32]] | None = None


def parts_folder(cache_path: Path, fingerprint: str) -> Path:
    """Return the folder for the parts of ``cache_path`` with this fingerprint."""
    return cache_path.with_name(f"{cache_path.name}.parts") / fingerprint[:16]


def write_part(folder: Path, number: int, block: Block, header: Header, mapped: bool = False) -> Path:
    """Write one finished block as ``folder/part-<number>.h5``, completely or not at all; earlier parts stay.

    Checksums cover every byte, including the file's own structures. If ``mapped``, each column is stored in one piece,
    so that it can be mapped into memory, and checksums cover only the structures.
    """
    path = folder / f"part-{number:06d}.h5"
    columns = {"guid": _guid_column(block.guids), **block.columns}
    if block.text_tokens is not None:
        columns["text_offsets"] = text_offsets(block.text_tokens)
        columns["text_tokens"] = np.concatenate(block.text_tokens)
    if block.text_ids is not None:
        columns["text_ids"] = np.concatenate(block.text_ids)
    with atomic_path(path) as temporary, new_hdf5(temporary, checksums=True) as (file, _):
        file.attrs.update(header.to_attributes() | {"rows": len(block.guids)})
        for name, values in columns.items():
            checked = {} if mapped or not len(values) else {"chunks": _chunks(values, len(values)), "fletcher32": True}
            file.create_dataset(name, data=values, **checked)
    return path


def _guid_column(guids: Sequence[str]) -> NDArray[Any]:
    names = [guid_of(guid).encode() for guid in guids]
    return np.array(names, dtype=h5py.string_dtype("utf-8", max(map(len, names), default=1) or 1))


def read_parts(folder: Path, header: Header) -> list[Path]:
    """Return the usable parts in ``folder``, lowest number first. Each is read completely, to find damage now.

    Unusable parts are left in place, and their pairs are computed again.
    """
    return [path for path in sorted(folder.glob("part-*.h5")) if _is_sound(path, header)]


def _is_sound(path: Path, header: Header) -> bool:
    """Whether a part has this header's fingerprint and every checksum in it is right."""
    try:
        with FeatureCache.open(path) as part:
            part.check(header.identity, "this configuration")
            _ = part.guids
            part.file.visititems(_read_checked)
    except (CacheError, *DAMAGE):
        return False
    return True


def _read_checked(name: str, item: h5py.Dataset | h5py.Group) -> None:
    if isinstance(item, h5py.Dataset) and item.fletcher32:
        for span in slices(len(item), window_rows(item)):
            _ = item[span]


def remove_parts(cache_path: Path, fingerprint: str) -> None:
    """Delete the parts that were merged into ``cache_path``, and other parts that are more than a month old.

    Call this only while holding the lock.
    """
    merged = parts_folder(cache_path, fingerprint)
    with contextlib.suppress(OSError):
        for folder in merged.parent.iterdir():
            if folder == merged or time.time() - folder.stat().st_mtime > _KEPT_DAYS * 86_400:
                shutil.rmtree(folder, ignore_errors=True)
        merged.parent.rmdir()  # fails if it still holds parts of another configuration


@dataclass
class OpenCaches:
    """Cache files for reading. Only the most recently used files stay open."""

    open_files: OrderedDict[Path, FeatureCache] = field(default_factory=OrderedDict)

    def get(self, path: Path) -> FeatureCache:
        """Return the open file at ``path``."""
        if path not in self.open_files:
            if len(self.open_files) == _OPEN_FILES:
                self.open_files.popitem(last=False)[1].close()
            self.open_files[path] = FeatureCache.open(path)
        self.open_files.move_to_end(path)
        return self.open_files[path]

    def close(self) -> None:
        """Close all files."""
        while self.open_files:
            self.open_files.popitem()[1].close()


def merge(target: Path, rows: Sequence[RowSource], header: Header) -> None:
    """Write ``target`` from rows of other cache files, a chunk at a time.

    ``rows`` are in the order of the new file. All files have the same layout. ``target`` is replaced only when the new
    file is complete and on disk, so it may be one of the sources. A DiskFullError leaves the parts and the former
    ``target``; a CacheError says that a source is damaged or was changed.
    """
    _check_room(target, {path for _, path, _ in rows})
    with (
        contextlib.closing(OpenCaches()) as sources,
        atomic_path(target) as temporary,
        new_hdf5(temporary) as (file, check),
    ):
        file.attrs.update(header.to_attributes() | {"rows": len(rows)})
        datasets = _create_datasets(file, sources.get(rows[0][1]), rows)
        for span in slices(len(rows), _CHUNK_ROWS):
            for name, values in _read_chunk(sources, rows[span], datasets).items():
                datasets[name][span] = values
            if "text_tokens" in file:
                _append_text_tokens(file, sources, rows[span], span)
            check()
        sources.close()  # before the replace: target may be one of them


def _read_chunk(
    sources: OpenCaches, chunk: Sequence[RowSource], like: dict[str, h5py.Dataset]
) -> dict[str, NDArray[Any]]:
    """Return the columns of some rows, by name, with the dtypes and row shapes of ``like``."""
    columns = {name: np.empty((len(chunk), *dataset.shape[1:]), dataset.dtype) for name, dataset in like.items()}
    places_of: dict[Path, list[int]] = {}
    for place, (_, path, _) in enumerate(chunk):
        places_of.setdefault(path, []).append(place)
    for path, places in places_of.items():
        cache, numbers = sources.get(path), np.array([chunk[place][2] for place in places], dtype=np.int64)
        if [cache.guids[row] for row in numbers] != [guid_of(chunk[place][0]) for place in places]:
            raise CacheError(f"{cache.path} was changed by another command: run the same command again")
        for name, column in columns.items():
            column[places] = cache.read(name, numbers)
    return columns


def _check_room(target: Path, sources: set[Path]) -> None:
    needed = sum(path.stat().st_size for path in sources)
    make_folder(target.parent)
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        raise DiskFullError(
            f"not enough disk space to write {target}: about {needed / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; "
            "free some space, then run the same command again; finished work is kept"
        )


def _create_datasets(file: h5py.File, like: FeatureCache, rows: Sequence[RowSource]) -> dict[str, h5py.Dataset]:
    """Create the datasets of ``like`` for ``rows``, fill in the guids, and return the columns that are still empty."""
    create, n = partial(file.create_dataset, fletcher32=True), len(rows)
    create("guid", data=_guid_column([guid for guid, _, _ in rows]), chunks=(min(4096, n),))
    datasets = {}
    for name in (*like.embedding_names(), *PER_ROW):
        source = like.file[name]
        datasets[name] = create(name, (n, *source.shape[1:]), source.dtype, chunks=_chunks(source, n))
    if like.has_tokens:
        width = like.file["text_tokens"].shape[1]
        create("text_offsets", (n + 1,), np.int64, chunks=(min(4096, n + 1),))
        create("text_tokens", (0, width), np.float16, maxshape=(None, width), chunks=(4096, width))
    return datasets


def _chunks(like: h5py.Dataset | NDArray[Any], rows: int) -> tuple[int, ...]:
    """Return a chunk shape for a dataset like ``like`` with ``rows`` rows: whole rows, about 1 MiB."""
    return max(1, min(_CHUNK_ROWS, rows, _CHUNK_BYTES // max(1, row_bytes(like)))), *like.shape[1:]


def _append_text_tokens(file: h5py.File, sources: OpenCaches, chunk: Sequence[RowSource], span: slice) -> None:
    tokens = [sources.get(path).text_tokens(row) for _, path, row in chunk]
    first = len(file["text_tokens"])
    ends = first + np.cumsum([len(states) for states in tokens], dtype=np.int64)
    file["text_tokens"].resize(int(ends[-1]), axis=0)
    file["text_tokens"][first:] = np.concatenate(tokens)
    file["text_offsets"][span.start + 1 : span.stop + 1] = ends
