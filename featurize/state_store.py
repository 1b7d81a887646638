"""States of the rows of a cache, kept in files beside it. Missing states are computed from the raw pairs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from ..cache.atomic import writer_lock
from ..cache.errors import CacheError, DataError, DiskFullError
from ..cache.features import text_offsets
from ..cache.hdf5 import open_hdf5
from ..cache.parts import Block, read_parts, write_part
from ..cache.states import States, StatesPart
from ..cache.store import FeatureCache
from .encode import EncodedBlocks, OnProgress, chunked, encode_blocks
from .identity import EncodeOptions
from .pairs.hashing import Reject, compare_bytes
from .pairs.pair import Pair
from .source import Source

_FILE_ROWS = 2048  # limit of pairs per file; a crash costs at most one file
_FILE_BYTES = 256 << 20  # limit of states per file, because they are in memory until they are written
_SAMPLE = 16  # pairs
_CHECKSUMS = "row/states_crc32"

RowOf = dict[str, int]  # row in a file or a block, by guid


class StateStore:
    """States that enter the last ``layers`` layers of one tower (``text`` or ``image``), for the rows of a cache."""

    def __init__(self, cache: FeatureCache, tower: str, layers: int, source: Source) -> None:
        self.cache, self.tower, self.layers, self.source = cache, tower, layers, source
        states = {"version": 1, "tower": tower, "layers": layers}
        self.header = replace(cache.header, identity={**cache.header.identity, "states": states})
        name = f"{tower}-{layers}-{self.header.fingerprint[:12]}"
        self.folder = cache.path.with_name(f"{cache.path.name}.states") / name

    def states(self, guids: Sequence[str], on_progress: OnProgress | None = None, keep: bool = True) -> States:
        """Return the states of ``guids``, in that order. Missing states are computed from the raw pairs.

        Parameters
        ----------
        on_progress
            Called with (pairs computed, pairs to compute), unless nothing is missing.
        keep
            Whether to keep computed states beside the cache.

        Raises
        ------
        DataError
            A raw pair is gone, cannot be read, or has changed since it was featurized.
        BackboneError
            The backbone cannot be opened, is a different one, or has fewer layers.
        LockedError, DiskFullError
            Another process is computing states, or the disk is full. Finished blocks are kept.
        """
        self._drop_damaged(guids)
        missing = [guid for guid in guids if guid not in self.kept]
        if not missing:
            return self._together(guids, [])
        pairs = self._raw_pairs(missing)
        if not keep:
            return self._together(guids, self._computed(pairs, on_progress, keep=False))
        with writer_lock(self.folder, ", then run the same command again"):
            for leftover in self.folder.glob(".part-*.tmp"):  # left by a writer that was killed
                leftover.unlink(missing_ok=True)
            numbers = [path.stem.removeprefix("part-") for path in self.folder.glob("part-*.h5")]
            first = max((int(number) + 1 for number in numbers if number.isdigit()), default=0)
            for number, block in enumerate(self._computed(pairs, on_progress), first):
                part, row_of = _part_of(block)
                checksums = [part.checksum(row) for row in row_of.values()]
                block.columns[_CHECKSUMS] = np.array(checksums, dtype=np.uint32)
                write_part(self.folder, number, block, self.header, mapped=True)
        del self.kept  # it is looked up anew
        gone = [guid for guid in guids if guid not in self.kept]
        if gone:
            raise DataError(f"the raw pair {gone[0]!r} changed while it was read: run the same command again")
        return self._together(guids, [])

    @cached_property
    def kept(self) -> dict[str, tuple[Path, int]]:
        """File and newest row of each guid whose states on disk were made from the raw bytes of the cache."""
        kept: dict[str, tuple[Path, int]] = {}
        column = f"row/{self.tower}_sha256"
        for path in read_parts(self.folder, self.header):
            # States in a damaged file are computed again.
            with contextlib.suppress(CacheError, OSError, KeyError, ValueError), FeatureCache.open(path) as part:
                row_of = {guid: row for row, guid in enumerate(part.guids) if guid in self.cache}
                expected = self.cache.read(column, self.cache.rows(row_of))
                stored = part.read(column, np.array([*row_of.values()], dtype=np.int64))
                same = (stored == expected).all(axis=1).tolist()
                kept |= {guid: (path, row) for (guid, row), good in zip(row_of.items(), same, strict=True) if good}
        return kept

    def _kept_by_file(self, guids: Sequence[str]) -> dict[Path, RowOf]:
        by_file: dict[Path, RowOf] = {}
        for guid in guids:
            if guid in self.kept:
                path, row = self.kept[guid]
                by_file.setdefault(path, {})[guid] = row
        return by_file

    def _drop_damaged(self, guids: Sequence[str]) -> None:
        """Forget rows whose checksum is wrong."""
        for path, row_of in self._kept_by_file(guids).items():
            damaged = list(row_of)
            with contextlib.suppress(OSError, KeyError, ValueError, IndexError, TypeError):
                with open_hdf5(path) as file:
                    checksums = file[_CHECKSUMS][:]
                part = StatesPart.of_file(path)
                damaged = [guid for guid, row in row_of.items() if part.checksum(row) != checksums[row]]
            for guid in damaged:
                del self.kept[guid]

    @cached_property
    def _pair_of(self) -> dict[str, Pair]:
        """The raw pairs by guid, listed once because rows may be requested a few hundred at a time."""
        return {pair.guid: pair for pair in self.source.dataset(self.cache).pairs}

    def _raw_pairs(self, guids: Sequence[str]) -> list[Pair]:
        """Return the raw pairs of ``guids``. Stop before any computation if one is gone or changed."""
        pairs = [self._pair_of.get(guid, Pair(guid)) for guid in guids]
        gone: list[str] = []
        changed: list[str] = []
        compared = compare_bytes(self.cache, self.cache.rows(guids), pairs, (self.tower,))
        for guid, same in zip(guids, compared, strict=True):
            if isinstance(same, DataError):
                gone.append(f"{guid!r}: {same}")
            elif not all(same):
                changed.append(guid)
        where = self.source.data or self.cache.header.dataset["data"]
        if gone:
            raise DataError(
                f"stage 2 needs the raw pairs, but {len(gone)} of {len(guids)} in {where} cannot be read any more, the "
                f"first is {gone[0]}: bring them back, give their path with --data, or remove them from the labels and "
                "train stage 1 again"
            )
        if changed:
            raise DataError(
                f"{len(changed)} of {len(guids)} raw pairs in {where} have changed since they were featurized, the "
                f"first is {changed[0]!r}: run `mmcli featurize` again, then train stage 1 again"
            )
        return pairs

    def _computed(self, pairs: list[Pair], on_progress: OnProgress | None, keep: bool = True) -> Iterator[Block]:
        """Compute states in blocks of at most a few hundred megabytes, if the disk has room for those to be kept."""
        if on_progress is not None:
            on_progress(0, len(pairs))
        few = pairs[:_SAMPLE]
        (sample,) = _all_of(_encode(few, self.source, self.tower, self.layers))
        pair_bytes = _part_of(sample)[0].states.nbytes / len(few)
        free = shutil.disk_usage(self.cache.path.parent).free
        if keep and pair_bytes * len(pairs) > free:
            raise DiskFullError(
                f"not enough disk space beside {self.cache.path} for the inputs of the unfrozen layers: about "
                f"{pair_bytes * len(pairs) / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; free some space, or "
                "unfreeze other layers, then run the same command again"
            )
        block_rows = int(min(max(_FILE_BYTES / pair_bytes, 1), _FILE_ROWS))
        yield from _all_of(_encode(pairs, self.source, self.tower, self.layers, block_rows, on_progress))

    def _together(self, guids: Sequence[str], computed: Iterable[Block]) -> States:
        parts: list[tuple[StatesPart, RowOf]] = []
        for path, row_of in sorted(self._kept_by_file(guids).items()):
            try:
                parts.append((StatesPart.of_file(path), row_of))
            except (OSError, KeyError, ValueError) as error:
                raise CacheError(
                    f"{path} cannot be read ({error}): delete {self.folder} and run the command again"
                ) from error
        return _join(guids, [*parts, *map(_part_of, computed)])


def states_of_pairs(
    pairs: Sequence[Pair], source: Source, layers: Mapping[str, int]
) -> tuple[list[str], dict[str, States], list[Reject]]:
    """Compute the states that enter the unfrozen layers of each tower, from raw pairs.

    Return the guids of the pairs that have states, the states by tower in this order, and the other pairs.
    """
    parts: dict[str, list[tuple[StatesPart, RowOf]]] = {}
    rejects: dict[str, Reject] = {}
    for tower, count in layers.items():
        for block, rejects_of_block in _encode(pairs, source, tower, count):
            rejects |= {reject.guid: reject for reject in rejects_of_block}
            parts.setdefault(tower, []).extend([_part_of(block)] if block.guids else [])
    guids = [pair.guid for pair in pairs if pair.guid not in rejects]
    return guids, {tower: _join(guids, parts[tower]) for tower in layers}, list(rejects.values())


def _encode(
    pairs: Sequence[Pair],
    source: Source,
    tower: str,
    layers: int,
    block_rows: int = _FILE_ROWS,
    on_progress: OnProgress | None = None,
) -> EncodedBlocks:
    """Yield the states that enter the last ``layers`` layers, in blocks, with the pairs that are rejected."""
    options = EncodeOptions.for_identity(source.identity, (tower,), below=layers)
    return encode_blocks(chunked(pairs, block_rows), source.encoder(), options, on_progress)


def _all_of(blocks: EncodedBlocks) -> Iterator[Block]:
    """Yield the blocks; raise a DataError if a pair is rejected."""
    for block, rejects in blocks:
        if rejects:
            raise DataError(
                f"{len(rejects)} raw pairs cannot be used for stage 2, the first is {rejects[0].guid!r} "
                f"({rejects[0].reason}, {rejects[0].path}): fix them and run `mmcli featurize` again; if states are "
                "not finite, featurize with --dtype float32 into another --out"
            )
        yield block


def _part_of(block: Block) -> tuple[StatesPart, RowOf]:
    """Return the states of a computed block, and the row of each guid."""
    row_of = {guid: row for row, guid in enumerate(block.guids)}
    if block.text_tokens is None or block.text_ids is None:
        return StatesPart(block.columns["image_tokens"]), row_of
    offsets = text_offsets(block.text_tokens)
    return StatesPart(np.concatenate(block.text_tokens), offsets, np.concatenate(block.text_ids)), row_of


def _join(guids: Sequence[str], parts: Iterable[tuple[StatesPart, RowOf]]) -> States:
    places: dict[str, tuple[int, int]] = {}
    joined: list[StatesPart] = []
    for part, row_of in parts:
        places |= {guid: (len(joined), row) for guid, row in row_of.items()}
        joined.append(part)
    return States(joined, np.array([places[guid] for guid in guids], dtype=np.int64).reshape(-1, 2))
