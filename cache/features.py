"""Features of some rows, in memory or still in the file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .rows import StoredRows
from .states import States
from .tokens import StoredTokens, Tokens


class Hash(Protocol):
    """An unfinished digest of ``hashlib``."""

    def update(self, data: bytes, /) -> object:
        """Add bytes."""


Column = NDArray[Any] | StoredRows


@dataclass(frozen=True)
class Features:
    """Inputs of a head for n rows. All columns are in memory, or all are in the file; only ``tokens`` may differ.

    Attributes
    ----------
    image, text
        Embeddings, (n, d) float16 or float32, as stored.
    tokens
        Last hidden states. None if not requested.
    views
        Embeddings of augmented images, (n, K, d). None if not requested.
    states
        States that enter the unfrozen layers, by tower (``text``, ``image``), for towers with unfrozen layers.
    """

    image: Column
    text: Column
    tokens: Tokens | StoredTokens | None = None
    views: Column | None = None
    states: dict[str, States] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.image)

    def take(self, rows: NDArray[np.int64]) -> Features:
        """Return the rows numbered ``rows``, in that order."""
        return Features(
            _take(self.image, rows),
            _take(self.text, rows),
            None if self.tokens is None else self.tokens.take(rows),
            None if self.views is None else _take(self.views, rows),
            {tower: states.take(rows) for tower, states in self.states.items()},
        )

    @property
    def places(self) -> NDArray[np.int64] | None:
        """Rows of the file, (n,) int64, or None if the embeddings are in memory."""
        return self.image.rows if isinstance(self.image, StoredRows) else None

    @property
    def at_once(self) -> int:
        """Number of rows that may be loaded at once."""
        if not isinstance(self.image, StoredRows):
            return max(1, len(self))
        columns = [column for column in (self.image, self.text, self.views) if isinstance(column, StoredRows)]
        return max(1, self.image.max_bytes // sum(column.row_bytes for column in columns))

    def load(self) -> Features:
        """Return these rows with their embeddings in memory."""
        everything = slice(None)
        views = None if self.views is None else self.views[everything]
        return Features(self.image[everything], self.text[everything], self.tokens, views, self.states)

    def hash_into(self, digest: Hash) -> None:
        """Add the embeddings to a digest, in the order of the rows."""
        for column in (self.image, self.text, *(() if self.views is None else (self.views,))):
            for start in range(0, len(self), self.at_once):
                digest.update(np.ascontiguousarray(column[start : start + self.at_once]).tobytes())

    def in_fast_order(self) -> tuple[Features, NDArray[np.int64] | None]:
        """Return these rows in the fastest order to read or compute, and the new position of each row, (n,).

        The order is by text length if text layers are unfrozen (to need less padding), else by row in the file.
        Positions are None if the order does not change.
        """
        if "text" in self.states:
            order = np.argsort(self.states["text"].lengths(), kind="stable")
        elif self.places is not None:
            order = np.argsort(self.places, kind="stable")
        else:
            return self, None
        return self.take(order), np.argsort(order)


def _take(column: Column, rows: NDArray[np.int64]) -> Column:
    return column.take(rows) if isinstance(column, StoredRows) else column[rows]
