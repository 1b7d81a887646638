"""Where each row of the new cache file comes from, and which pairs are still to be computed."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..cache.errors import CacheError
from ..cache.parts import parts_folder, read_parts
from ..cache.schema import Header
from ..cache.store import FeatureCache
from ..cache.verify import soundness
from .encode import How
from .identity import is_cleaned, is_earlier
from .pairs.dataset import Dataset
from .pairs.folder import MadeWhenAsked
from .pairs.hashing import Comparison, compare
from .pairs.pair import Pair, natural_key

BLOCK_ROWS = 256  # what a crash can cost at most, but for the blocks that are under way

Row = tuple[str, Path, int]  # guid, file, row in it


class Plan:
    """For each pair of the dataset, by its number: the file and the row that hold its features, if any does.

    Eight bytes of memory per pair, beside the names of the rows of the cache.

    Attributes
    ----------
    files
        Files that rows come from.
    gone
        Cached rows that are kept though their pairs are no longer there.
    unreadable
        Guids of cached rows that are kept though their pairs cannot be read now.
    parts
        Usable parts of an interrupted run.
    reusable
        By tower, of which rows of the cache the embeddings may stand for equal images and texts of other pairs, (N,);
        None for all.
    resumed, unchanged, pruned
        Pairs found in parts, pairs found in the cache, cached rows that are dropped.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        self.files: list[Path] = []
        self.kept: list[Row] = []
        self.gone = self.resumed = self.unchanged = self.pruned = 0
        self.unreadable: list[str] = []
        self.parts: list[Path] = []
        self.reusable: dict[str, NDArray[np.bool_]] | None = None
        self._spare: dict[str, tuple[int, Path, int]] = {}  # rows of pairs that changed: number, file, row
        self._file = np.full(len(pairs), -1, np.int32)
        self._row = np.zeros(len(pairs), np.int32)
        self._cut = np.empty(0, np.int64)  # numbers of pairs, in which blocks are cut
        self._under_way: dict[str, int] = {}

    def put(self, number: int, path: Path, row: int) -> None:
        """Say where the features of a pair are."""
        if not self.files or self.files[-1] != path:
            self.files.append(path)
        self._file[number], self._row[number] = len(self.files) - 1, row

    def set_aside(self, number: int, path: Path, row: int) -> None:
        """Remember the row of a pair that is not what it was, for the case that the pair cannot be read."""
        self._spare[self.pairs[number].guid] = number, path, row

    def keep(self, guid: str) -> bool:
        """Keep the row of a pair that cannot be read, if one was set aside; say whether."""
        if guid not in self._spare:
            return False
        self.put(*self._spare.pop(guid))
        self.unreadable.append(guid)
        return True

    def cut_blocks(self) -> None:
        """Cut what is not found yet into blocks.

        It is done before finished rows are taken out: a block that is computed again after a crash, or whose neighbour
        had rejects, holds the same pairs as in an uninterrupted run, hence gives the same bits.
        """
        self._cut = np.flatnonzero(self._file < 0)

    def numbers_todo(self) -> NDArray[np.int64]:
        """Return the numbers of the pairs of which nothing is found yet, (n,)."""
        return self._cut[self._file[self._cut] < 0]

    def count_todo(self) -> int:
        """Return how many pairs are to be computed."""
        return len(self.numbers_todo())

    def todo(self) -> Iterator[Pair]:
        """Yield the pairs that are to be computed."""
        return (self.pairs[number] for number in self.numbers_todo().tolist())

    def blocks(self) -> Iterator[list[Pair]]:
        """Yield them in blocks."""
        for start in range(0, len(self._cut), BLOCK_ROWS):
            numbers = self._cut[start : start + BLOCK_ROWS]
            block = {self.pairs[number].guid: number for number in numbers[self._file[numbers] < 0].tolist()}
            if block:
                self._under_way |= block
                yield [self.pairs[number] for number in block.values()]

    def found(self, path: Path, guids: Sequence[str]) -> None:
        """Say that the rows of ``path`` are those pairs, which a block gave."""
        for row, guid in enumerate(guids):
            self.put(self._under_way.pop(guid), path, row)

    def rows(self) -> Sequence[Row]:
        """Return what the new file is to hold, in natural order of guid."""
        numbers = np.flatnonzero(self._file >= 0)

        def make(place: int) -> Row:
            number = int(numbers[place])
            return self.pairs[number].guid, self.files[self._file[number]], int(self._row[number])

        rows = MadeWhenAsked(len(numbers), make)
        return sorted([*rows, *self.kept], key=lambda row: natural_key(row[0])) if self.kept else rows


def make_plan(out: Path, dataset: Dataset, header: Header, how: How, cached: FeatureCache | None, prune: bool) -> Plan:
    """Find what the cache and the parts of an interrupted run have.

    Raises
    ------
    CacheError
        The cache is of another backbone or of other data, or cannot be made anew because pairs of it are gone.
    """
    plan = Plan(dataset.pairs)
    if cached is not None:
        _take_from_cache(plan, out, dataset, header, how, cached, prune)
    plan.cut_blocks()
    _resume(plan, out, header, how)
    return plan


def _take_from_cache(
    plan: Plan, out: Path, dataset: Dataset, header: Header, how: How, cached: FeatureCache, prune: bool
) -> None:
    earlier = is_earlier(cached.header.identity, header.identity)
    if not earlier:
        cached.check(header.identity, header.backbone["name"])
    complete = holds_what_is_asked(cached, how)
    number_of: dict[str, int] = {}
    absent: dict[str, int] = {}  # named by a label, and no longer there
    for number, pair in enumerate(dataset.pairs):
        (absent if pair.absent else number_of)[pair.guid] = number
    found = _compare(cached, dataset.pairs, number_of, earlier and cached.has_cleaned)
    _refuse_other_dataset(cached, dataset, int(found.same_bytes.sum()))
    if earlier:
        text = np.ones(len(cached), dtype=bool) if is_cleaned(header.identity) else found.text
        plan.reusable = {"image": found.image, "text": text}
    sound = np.ones(len(cached), dtype=bool)
    if complete:
        finite, zero = soundness(cached)
        sound = finite & ~zero  # what `mmcli cache verify` finds is computed again
    for row, guid in enumerate(cached.guids):
        if guid not in number_of:
            plan.gone += 1
            plan.pruned += prune
            if not prune and guid in absent:  # nothing is lost unless asked for
                plan.put(absent[guid], out, row)
            elif not prune:
                plan.kept.append((guid, out, row))
        elif found.same[row] and sound[row] and complete:
            plan.put(number_of[guid], out, row)
            plan.unchanged += 1
        elif sound[row] and not prune and ((complete and not earlier) or not found.readable[row]):
            plan.set_aside(number_of[guid], out, row)
            if not found.readable[row]:
                plan.keep(guid)
    if plan.kept and out not in plan.files:
        plan.files.append(out)
    lost = plan.gone - plan.pruned + len(plan.unreadable)
    if lost and (earlier or not complete):
        why = "its texts are cleaned otherwise" if earlier else "views, tokens or digests of cleaned texts are new"
        raise CacheError(
            f"{out} would be brought up to date ({why}), but {lost} of its pairs are no longer in {dataset.data}, or "
            "cannot be read: bring them back, drop them with --prune, or give another --out"
        )


def holds_what_is_asked(cached: FeatureCache, how: How) -> bool:
    """Whether rows of a file can be taken as they are."""
    return cached.n_views == how.views and cached.has_tokens == how.tokens and cached.has_cleaned


def _compare(
    cached: FeatureCache, pairs: Sequence[Pair], number_of: dict[str, int], is_earlier: bool = False
) -> Comparison:
    """Compare every row of a cache with its pair; one without a pair counts as unreadable."""
    rows = np.array([row for row, guid in enumerate(cached.guids) if guid in number_of], dtype=np.int64)
    found = compare(cached, rows, (pairs[number_of[cached.guids[row]]] for row in rows.tolist()), is_earlier)
    spread = np.zeros((4, len(cached)), dtype=bool)
    spread[:, rows] = [found.readable, found.same_bytes, found.image, found.text]
    return Comparison(*spread)


def _refuse_other_dataset(cached: FeatureCache, dataset: Dataset, same: int) -> None:
    if cached.header.dataset["data"] != str(dataset.data) and 2 * same < len(cached):
        raise CacheError(
            f"{cached.path} holds the pairs of {cached.header.dataset['data']}, of which {same} of {len(cached)} "
            f"are in {dataset.data}: give --out another file for other data"
        )


def _resume(plan: Plan, out: Path, header: Header, how: How) -> None:
    """Take the finished rows of an interrupted run, of pairs that have not changed since."""
    parts = plan.parts = read_parts(parts_folder(out, header.fingerprint), header)
    number_of = {plan.pairs[number].guid: number for number in plan.numbers_todo().tolist()} if parts else {}
    for path in parts:
        with FeatureCache.open(path) as part:
            if holds_what_is_asked(part, how):
                same = _compare(part, plan.pairs, number_of).same
                for row in np.flatnonzero(same).tolist():
                    plan.put(number_of[part.guids[row]], path, row)
    plan.resumed = len(number_of) - plan.count_todo() if parts else 0
