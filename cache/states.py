"""The states that enter the unfrozen layers of a tower, in files beside the cache.

Everything below the first unfrozen layer is frozen and has no dropout, so these states are constant for each text or
image. The files are mapped into memory, and the operating system keeps in memory what fits.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from .hdf5 import open_hdf5


class PaddedStates(NamedTuple):
    """States of b rows, float32: (b, L, w) for texts, with token ids and mask, (b, L) int64; (b, ...) for images."""

    states: NDArray[Any]
    ids: NDArray[np.int64] | None = None
    mask: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class StatesPart:
    """States of n rows: (n, ...) for images; (sum L, w) for texts, with offsets (n + 1,) and token ids (sum L,)."""

    states: NDArray[Any]
    offsets: NDArray[np.int64] | None = None
    ids: NDArray[np.int32] | None = None
    path: Path | None = None

    def span(self, row: int) -> slice:
        """Return where the states of a row are."""
        return slice(row, row + 1) if self.offsets is None else slice(self.offsets[row], self.offsets[row + 1])

    def checksum(self, row: int) -> int:
        """Return the CRC-32 of a row's states and token ids."""
        checksum = zlib.crc32(np.ascontiguousarray(self.states[self.span(row)]).data)
        if self.ids is None:
            return checksum
        return zlib.crc32(np.ascontiguousarray(self.ids[self.span(row)]).data, checksum)

    @classmethod
    def of_file(cls, path: Path) -> StatesPart:
        """Map the states of a file that ``write_part`` wrote into memory."""
        with open_hdf5(path) as file:
            if "text_ids" in file:
                return cls(_mapped(path, file["text_tokens"]), file["text_offsets"][:], file["text_ids"][:], path)
            return cls(_mapped(path, file["image_tokens"]), path=path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a mapped file as its path, so that another process maps it itself."""
        if self.path is not None:
            return StatesPart.of_file, (self.path,)
        return StatesPart, (self.states, self.offsets, self.ids)


def _mapped(path: Path, dataset: h5py.Dataset) -> NDArray[Any]:
    offset = dataset.id.get_offset()  # defined because `write_part` stores these columns without chunks
    if offset is None:
        raise ValueError(f"{dataset.name} was never written")
    return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)


@dataclass(frozen=True)
class States:
    """States of n rows in ``parts``, which are files or in memory.

    ``places``, (n, 2) int64, holds the part of each row, and the row in that part.
    """

    parts: list[StatesPart]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: NDArray[np.int64]) -> States:
        """Return the rows numbered ``rows``."""
        return States(self.parts, self.places[rows])

    def _spans(self) -> list[tuple[StatesPart, slice]]:
        return [(self.parts[part], self.parts[part].span(row)) for part, row in self.places.tolist()]

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each row, (n,) int64; 1 for images, which all have the same number."""
        return np.array([span.stop - span.start for _, span in self._spans()], dtype=np.int64)

    def padded(self) -> PaddedStates:
        """Read these rows as one float32 batch (float64 stays float64), texts padded with zeros on the right."""
        dtype = np.result_type(self.parts[0].states, np.float32)
        spans = self._spans()
        if self.parts[0].offsets is None:
            return PaddedStates(np.concatenate([part.states[span] for part, span in spans]).astype(dtype))
        length = max(span.stop - span.start for _, span in spans)
        states = np.zeros((len(spans), length, self.parts[0].states.shape[1]), dtype)
        ids, mask = np.zeros((2, len(spans), length), np.int64)
        for number, (part, span) in enumerate(spans):
            assert part.ids is not None
            inside = slice(0, span.stop - span.start)
            states[number, inside] = part.states[span]
            ids[number, inside] = part.ids[span]
            mask[number, inside] = 1
        return PaddedStates(states, ids, mask)
