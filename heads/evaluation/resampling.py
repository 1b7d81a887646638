"""What a bootstrap draws: groups of copies, each as a whole, because copies are not independent of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class Units:
    """Groups of rows. Rows of one kind are alike; groups that hold the same kinds of rows are counted together.

    Attributes
    ----------
    counts
        (P + M,) int64: groups of one row, by the P kinds of rows, then groups of several rows, by their contents.
    contents
        (P, M): rows of each kind in a group of several rows; None where every group has one row.
    n_kinds
        P.
    """

    counts: NDArray[np.int64]
    contents: csr_array | None
    n_kinds: int

    def draw(self, generator: np.random.Generator, replicates: int) -> NDArray[np.int64]:
        """Count the rows of each kind, (replicates, P) int64, in as many groups as there are, drawn with replacement.

        Drawing groups and counting them (Efron 1979; for groups Davison and Hinkley, Bootstrap Methods and their
        Application, 1997, section 3.8) is one multinomial draw over the kinds of groups.
        """
        n_groups = int(self.counts.sum())
        drawn = generator.multinomial(n_groups, self.counts / max(n_groups, 1), size=replicates)
        if self.contents is None:
            return drawn
        of_several: NDArray[np.int64] = (self.contents @ drawn[:, self.n_kinds :].T).T
        return drawn[:, : self.n_kinds] + of_several


def units_of(kinds: NDArray[np.int64], n_kinds: int, groups: NDArray[np.int64] | None = None) -> Units:
    """Return what a bootstrap of n rows draws.

    Parameters
    ----------
    kinds
        (n,): the kind of each row, below ``n_kinds``.
    groups
        (n,) group number of each row, from 0: rows with the same number are copies; default: no copies.
    """
    if groups is None:
        return Units(np.bincount(kinds, minlength=n_kinds), None, n_kinds)
    sizes = np.bincount(groups)
    size_of = sizes[groups]
    alone = np.bincount(kinds[size_of == 1], minlength=n_kinds)
    counts, members, starts = [alone], [], [np.zeros(1, dtype=np.int64)]
    for size in (2 + np.flatnonzero(np.bincount(sizes)[2:])).tolist():
        rows = np.flatnonzero(size_of == size)
        rows = rows[np.lexsort((kinds[rows], groups[rows]))]
        held = np.ascontiguousarray(kinds[rows].astype(np.int64).reshape(-1, size))
        _, first, count = np.unique(held.view(f"V{8 * size}").ravel(), return_index=True, return_counts=True)
        counts.append(count)
        members.append(held[first].ravel())
        starts.append(starts[-1][-1] + size * np.arange(1, len(first) + 1))
    if not members:
        return Units(alone, None, n_kinds)
    from scipy.sparse import csc_array  # here, because importing it takes a tenth of a second

    places, ends = np.concatenate(members), np.concatenate(starts)
    contents = csc_array((np.ones(len(places), dtype=np.int64), places, ends), shape=(n_kinds, len(ends) - 1))
    return Units(np.concatenate(counts), contents.tocsr(), n_kinds)
