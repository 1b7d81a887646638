"""Units that a bootstrap draws: whole groups of copies, because copies are not independent of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class ResamplingUnits:
    """Counts of groups of rows. Each row is of one of P kinds; groups that hold the same kinds are counted together.

    Attributes
    ----------
    counts
        (P + M,) int64: how many groups are a single row, for each of the P kinds; then how many groups of several rows
        there are, for each of M different contents.
    contents
        (P, M): rows of each kind in a group of several rows; None where every group is a single row.
    n_kinds
        P.
    """

    counts: NDArray[np.int64]
    contents: csr_array | None
    n_kinds: int

    def draw(self, generator: np.random.Generator, replicates: int) -> NDArray[np.int64]:
        """Draw as many groups as there are, with replacement, and count their rows by kind: (replicates, P) int64.

        Drawing groups one by one and counting them (Efron 1979; for groups Davison and Hinkley, Bootstrap Methods and
        their Application, 1997, section 3.8) is the same as one multinomial draw over the kinds of groups.
        """
        n_groups = int(self.counts.sum())
        drawn = generator.multinomial(n_groups, self.counts / max(n_groups, 1), size=replicates)
        if self.contents is None:
            return drawn
        rows_of_copies: NDArray[np.int64] = (self.contents @ drawn[:, self.n_kinds :].T).T
        return drawn[:, : self.n_kinds] + rows_of_copies


def resampling_units(
    kinds: NDArray[np.int64], n_kinds: int, groups: NDArray[np.int64] | None = None
) -> ResamplingUnits:
    """Count the groups that a bootstrap of n rows draws.

    Parameters
    ----------
    kinds
        (n,): the kind of each row, below ``n_kinds``.
    groups
        (n,) group number of each row, from 0. Rows with the same number are copies. Default: no copies.
    """
    if groups is None:
        return ResamplingUnits(np.bincount(kinds, minlength=n_kinds), None, n_kinds)
    group_sizes = np.bincount(groups)
    size_of_row = group_sizes[groups]
    single = np.bincount(kinds[size_of_row == 1], minlength=n_kinds)
    counts, members, ends = [single], [], [np.zeros(1, dtype=np.int64)]
    for size in (2 + np.flatnonzero(np.bincount(group_sizes)[2:])).tolist():
        contents, n_alike = _contents_of_groups(kinds, groups, np.flatnonzero(size_of_row == size), size)
        counts.append(n_alike)
        members.append(contents.ravel())
        ends.append(ends[-1][-1] + size * np.arange(1, len(contents) + 1))
    if not members:
        return ResamplingUnits(single, None, n_kinds)
    from scipy.sparse import csc_array

    rows, columns = np.concatenate(members), np.concatenate(ends)
    matrix = csc_array((np.ones(len(rows), dtype=np.int64), rows, columns), shape=(n_kinds, len(columns) - 1))
    return ResamplingUnits(np.concatenate(counts), matrix.tocsr(), n_kinds)


def _contents_of_groups(
    kinds: NDArray[np.int64], groups: NDArray[np.int64], rows: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the different contents of groups of one size, (M, size) sorted kinds, and how many groups hold each, (M,).

    Parameters
    ----------
    kinds, groups
        (n,) each.
    rows
        The rows of all groups of this size.
    """
    by_group = rows[np.lexsort((kinds[rows], groups[rows]))]
    contents = np.ascontiguousarray(kinds[by_group].astype(np.int64).reshape(-1, size))
    as_bytes = contents.view(f"V{contents.itemsize * size}").ravel()  # one value for each group, faster than rows
    _, first, n_alike = np.unique(as_bytes, return_index=True, return_counts=True)
    return contents[first], n_alike
