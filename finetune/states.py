"""What enters the unfrozen layers of a tower: computed once per pair, kept beside the cache, mapped into memory.

Below the first unfrozen layer everything is frozen and has no dropout, so its output is a constant of a text or an
image. ``store.py`` keeps it in ``<cache>.states/<tower>-<layers>-<fingerprint>/``, a file per finished block of pairs.
The operating system keeps in memory what fits.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cache.features import text_offsets
from ..cache.hdf5 import open_hdf5
from ..cache.parts import Block


class StateBatch(NamedTuple):
    """States of b rows, float32: (b, L, w) of texts, with token ids and mask, (b, L) int64; (b, ...) of images."""

    states: Tensor
    ids: Tensor | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Part:
    """States of some rows: (n, ...) of images; (sum L, w) of texts, with offsets (n + 1,) and token ids (sum L,)."""

    states: NDArray[Any]
    offsets: NDArray[np.int64] | None = None
    ids: NDArray[np.int32] | None = None
    path: Path | None = None

    @classmethod
    def of_block(cls, block: Block) -> Part:
        """Return the states of a block that was just computed, in memory."""
        if block.text_tokens is None or block.text_ids is None:
            return cls(block.columns["image_tokens"])
        joined = np.concatenate(block.text_tokens), text_offsets(block.text_tokens), np.concatenate(block.text_ids)
        return cls(*joined)

    def checksum(self, row: int) -> int:
        """Return the CRC-32 of a row's states and token ids."""
        if self.offsets is None or self.ids is None:
            return zlib.crc32(np.ascontiguousarray(self.states[row]).data)
        span = slice(self.offsets[row], self.offsets[row + 1])
        of_states = zlib.crc32(np.ascontiguousarray(self.states[span]).data)
        return zlib.crc32(np.ascontiguousarray(self.ids[span]).data, of_states)

    @classmethod
    def of_file(cls, path: Path) -> Part:
        """Map the states in a file that ``write_part`` wrote."""
        with open_hdf5(path) as file:
            if "text_ids" in file:
                return cls(_mapped(path, file["text_tokens"]), file["text_offsets"][:], file["text_ids"][:], path)
            return cls(_mapped(path, file["image_tokens"]), path=path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Send a file by its name to another process."""
        if self.path is not None:
            return Part.of_file, (self.path,)
        return Part, (self.states, self.offsets, self.ids)


def _mapped(path: Path, dataset: h5py.Dataset) -> NDArray[Any]:
    offset = dataset.id.get_offset()  # contiguous: `write_part` asks for no chunks
    if offset is None:
        raise ValueError(f"{dataset.name} was never written")
    return np.memmap(path, dataset.dtype, "r", offset, dataset.shape)


@dataclass(frozen=True)
class States:
    """States of n rows, wherever they are.

    Attributes
    ----------
    parts
        Files, or blocks in memory.
    places
        (n, 2) int64: part, and row in it, of each row.
    """

    parts: list[Part]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def take(self, rows: NDArray[np.int64]) -> States:
        """Return the rows numbered ``rows``."""
        return States(self.parts, self.places[rows])

    def lengths(self) -> NDArray[np.int64]:
        """Return the number of tokens of each row, (n,); 1 for images, which all have the same."""
        if self.parts[0].offsets is None:
            return np.ones(len(self), dtype=np.int64)
        of_part = [np.diff(part.offsets) for part in self.parts if part.offsets is not None]
        return np.array([of_part[part][row] for part, row in self.places.tolist()], dtype=np.int64)

    def load(self, pad_id: int, device: str) -> StateBatch:
        """Read these rows as one batch, texts padded on the right, in float32; float64 stays float64."""
        dtype = np.result_type(self.parts[0].states, np.float32)
        found = [(self.parts[part], row) for part, row in self.places.tolist()]
        if self.parts[0].offsets is None:
            stacked = np.stack([part.states[row] for part, row in found]).astype(dtype)
            return StateBatch(torch.from_numpy(stacked).to(device))
        spans = [(part, slice(part.offsets[row], part.offsets[row + 1])) for part, row in found]
        length = max(span.stop - span.start for _, span in spans)
        states = np.zeros((len(spans), length, self.parts[0].states.shape[1]), dtype)
        ids = np.full((len(spans), length), pad_id, np.int64)
        mask = np.zeros((len(spans), length), np.int64)
        for number, (part, span) in enumerate(spans):
            there = slice(0, span.stop - span.start)
            states[number, there] = part.states[span]
            ids[number, there] = part.ids[span]
            mask[number, there] = 1
        return StateBatch(*(torch.from_numpy(array).to(device) for array in (states, ids, mask)))
