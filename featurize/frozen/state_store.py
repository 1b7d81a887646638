"""States of the rows of a cache: kept beside it, computed from the raw pairs where they are not yet."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ...cache.errors import CacheError, DataError, DiskFullError
from ...cache.features import text_offsets
from ...cache.hdf5 import open_hdf5
from ...cache.lock import writer_lock
from ...cache.parts import Block, read_parts, write_part
from ...cache.schema import Header
from ...cache.states import States, StatesPart
from ...cache.store import FeatureCache
from ..encode import OnProgress, encode_blocks
from ..encode_options import EncodeOptions
from ..pairs.hashing import Reject, prefetch
from ..pairs.pair import Pair
from .source import Source

BLOCK_ROWS = 2048  # pairs per file, and what a crash can cost, at most
_BLOCK_BYTES = 256 << 20  # of a file's states, which are in memory until it is written
_SAMPLE = 16  # pairs
_CHECKSUMS = "row/states_crc32"


class StateStore:
    """States of the rows of a cache for one depth of one tower: those that are kept, and the others once computed.

    Parameters
    ----------
    cache
        Open.
    tower
        ``text`` or ``image``.
    layers
        How many at its top are unfrozen: what enters them is meant.
    source
        Where backbone and raw pairs are.
    """

    def __init__(self, cache: FeatureCache, tower: str, layers: int, source: Source) -> None:
        self.cache, self.tower, self.layers, self.source = cache, tower, layers, source
        of = cache.header
        states = {"version": 1, "tower": tower, "layers": layers}
        self.header = Header({**of.identity, "states": states}, of.backbone, of.dataset, of.versions)
        name = f"{tower}-{layers}-{self.header.fingerprint[:12]}"
        self.folder = cache.path.with_name(f"{cache.path.name}.states") / name
        self.digests = f"row/{tower}_sha256"
        self.kept = self._kept()

    def states(self, guids: Sequence[str], on_progress: OnProgress | None = None, keep: bool = True) -> States:
        """Return the states of ``guids`` in their order; what is not kept is computed from the raw pairs.

        Parameters
        ----------
        on_progress
            Called with (pairs computed, pairs to compute); not at all where all are there.
        keep
            Whether what is computed is kept beside the cache.

        Raises
        ------
        DataError
            A raw pair is gone, cannot be read, or has changed since it was featurized.
        BackboneError
            The backbone cannot be had, is another one, or has fewer layers.
        LockedError, DiskFullError
            As they say; finished blocks are kept.
        """
        self._drop_damaged(guids)
        missing = [guid for guid in guids if guid not in self.kept]
        if not missing:
            return self._together(guids, [])
        pairs = self._raw_pairs(missing)
        if not keep:
            return self._together(guids, list(self._computed(pairs, on_progress)))
        with writer_lock(self.folder, "let it finish, then run this again"):
            for leftover in self.folder.glob(".part-*.tmp"):  # of a writer that was killed
                leftover.unlink(missing_ok=True)
            numbers = [path.stem.removeprefix("part-") for path in self.folder.glob("part-*.h5")]
            number = max((int(each) + 1 for each in numbers if each.isdigit()), default=0)
            for block in self._computed(pairs, on_progress):
                part = part_of_block(block)
                checksums = [part.checksum(row) for row in range(len(block.guids))]
                block.columns[_CHECKSUMS] = np.array(checksums, dtype=np.uint32)
                write_part(self.folder, number, block, self.header, True)
                number += 1
        self.kept = self._kept()
        gone = [guid for guid in guids if guid not in self.kept]
        if gone:
            raise DataError(f"the raw pair {gone[0]!r} was changed while it was being read: run the command again")
        return self._together(guids, [])

    def _kept(self) -> dict[str, tuple[Path, int]]:
        """Return where the rows are whose raw bytes were those that the cache has; the newest counts."""
        found: dict[str, tuple[Path, int]] = {}
        for path in read_parts(self.folder, self.header):
            # What is damaged is computed again.
            with contextlib.suppress(CacheError, OSError, KeyError, ValueError), FeatureCache.open(path) as part:
                there = [(row, guid) for row, guid in enumerate(part.guids) if guid in self.cache]
                mine = self.cache.read(self.digests, self.cache.rows([guid for _, guid in there]))
                stored = part.read(self.digests, np.array([row for row, _ in there], dtype=np.int64))
                same = (stored == mine).all(axis=1)
                found |= {guid: (path, row) for (row, guid), good in zip(there, same.tolist(), strict=True) if good}
        return found

    def _drop_damaged(self, guids: Sequence[str]) -> None:
        """Forget those of the rows whose states are not what was written."""
        wanted: dict[Path, list[tuple[str, int]]] = {}
        for guid in guids:
            if guid in self.kept:
                path, row = self.kept[guid]
                wanted.setdefault(path, []).append((guid, row))
        for path, rows in wanted.items():
            damaged = [guid for guid, _ in rows]
            with contextlib.suppress(OSError, KeyError, ValueError, IndexError, TypeError):
                with open_hdf5(path) as file:
                    checksums = file[_CHECKSUMS][:]
                part = StatesPart.of_file(path)
                damaged = [guid for guid, row in rows if part.checksum(row) != checksums[row]]
            for guid in damaged:
                del self.kept[guid]

    @cached_property
    def _pair_of(self) -> dict[str, Pair]:
        """The raw pairs by guid; made once, since rows may be asked for a few hundred at a time."""
        return {pair.guid: pair for pair in self.source.dataset(self.cache).pairs}

    def _raw_pairs(self, guids: Sequence[str]) -> list[Pair]:
        """Return the raw pairs of rows; find out before the work that one is gone or was changed."""
        there = self._pair_of
        stored = dict(zip(guids, self.cache.read(self.digests, self.cache.rows(guids)), strict=True))
        gone: list[str] = []
        changed: list[str] = []

        def digest(guid: str) -> bytes | str:
            pair = there.get(guid, Pair(guid))
            try:
                return hashlib.sha256(pair.read_text() if self.tower == "text" else pair.read_image()).digest()
            except DataError as error:
                return f"{guid!r}: {error}"

        for guid, now in zip(guids, prefetch(digest, guids, ahead=64), strict=True):
            if isinstance(now, str):
                gone.append(now)
            elif now != stored[guid].tobytes():
                changed.append(guid)
        where = self.source.data or self.cache.header.dataset["data"]
        if gone:
            raise DataError(
                f"stage 2 goes back to the raw pairs, and {len(gone)} of {len(guids)} in {where} cannot be read "
                f"since they were featurized, the first is {gone[0]}: bring them back, say with --data where they are, "
                "or take them out of the labels and train stage 1 again"
            )
        if changed:
            raise DataError(
                f"{len(changed)} of {len(guids)} raw pairs in {where} have changed since they were featurized, the "
                f"first is {changed[0]!r}: run `mmcli featurize` again, then train stage 1 again"
            )
        return [there[guid] for guid in guids]

    def _computed(self, pairs: list[Pair], on_progress: OnProgress | None) -> Iterator[Block]:
        """Yield a block of states at a time, of as many pairs as take a few hundred megabytes."""
        if on_progress is not None:
            on_progress(0, len(pairs))
        size = self._rows_per_block(pairs)
        blocks = [pairs[start : start + size] for start in range(0, len(pairs), size)]
        for block, rejects in encode_blocks(blocks, self.source.encoder(), self._how(), on_progress):
            _refuse(rejects)
            yield block

    def _how(self) -> EncodeOptions:
        return EncodeOptions.for_identity(self.cache.header.identity, (self.tower,), below=self.layers)

    def _rows_per_block(self, pairs: list[Pair]) -> int:
        """Find out from a few pairs how large states are, and whether the disk has room for all."""
        few = pairs[: min(_SAMPLE, len(pairs))]
        sample, rejects = next(encode_blocks([few], self.source.encoder(), self._how()))
        _refuse(rejects)
        each = part_of_block(sample).states.nbytes / len(few)
        self.cache.path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache.path.parent).free
        if each * len(pairs) > free:
            raise DiskFullError(
                f"no room beside {self.cache.path} for what enters the unfrozen layers: about "
                f"{each * len(pairs) / 1e6:.0f} MB needed, {free / 1e6:.0f} MB free; free some space, or unfreeze "
                "other layers, then run the same command again"
            )
        return int(min(max(_BLOCK_BYTES / each, 1), BLOCK_ROWS))

    def _together(self, guids: Sequence[str], computed: Sequence[Block]) -> States:
        found = {guid: self.kept[guid] for guid in guids if guid in self.kept}
        parts: list[StatesPart] = []
        number_of: dict[Path, int] = {}
        for path in sorted({path for path, _ in found.values()}):
            number_of[path] = len(parts)
            try:
                parts.append(StatesPart.of_file(path))
            except (OSError, KeyError, ValueError) as error:
                raise CacheError(
                    f"{path} cannot be read ({error}): delete {self.folder} and run the command again"
                ) from error
        places = {guid: (number_of[path], row) for guid, (path, row) in found.items()}
        for block in computed:
            places |= {guid: (len(parts), row) for row, guid in enumerate(block.guids)}
            parts.append(part_of_block(block))
        return States(parts, np.array([places[guid] for guid in guids], dtype=np.int64).reshape(-1, 2))


def states_of_pairs(pairs: Sequence[Pair], source: Source, layers: Mapping[str, int]) -> dict[str, States]:
    """Return what enters the unfrozen layers of each tower, computed from raw pairs that can be read.

    Raises
    ------
    DataError
        A pair cannot be read, or its states are not finite.
    """
    states = {}
    for tower, count in layers.items():
        options = EncodeOptions.for_identity(source.identity, (tower,), below=count)
        block, rejects = next(encode_blocks([list(pairs)], source.encoder(), options))
        _refuse(rejects)
        row_of = {guid: row for row, guid in enumerate(block.guids)}
        places = [(0, row_of[pair.guid]) for pair in pairs]
        states[tower] = States([part_of_block(block)], np.array(places, dtype=np.int64).reshape(-1, 2))
    return states


def part_of_block(block: Block) -> StatesPart:
    """Return the states of a block that was just computed, in memory."""
    if block.text_tokens is None or block.text_ids is None:
        return StatesPart(block.columns["image_tokens"])
    offsets = text_offsets(block.text_tokens)
    return StatesPart(np.concatenate(block.text_tokens), offsets, np.concatenate(block.text_ids))


def _refuse(rejects: Sequence[Reject]) -> None:
    if rejects:
        raise DataError(
            f"{len(rejects)} raw pairs cannot be used for stage 2, the first is {rejects[0].guid!r} "
            f"({rejects[0].reason}, {rejects[0].path}): mend them and run `mmcli featurize` again; where states are "
            "not finite, featurize with --dtype float32 into another --out"
        )
