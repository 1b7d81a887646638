"""Joining labels and pairs by guid, and explaining guids that differ only in spelling."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from .pair import natural_key


@dataclass(frozen=True)
class Join:
    """How the guids of labels and of pairs fit together.

    ``label`` and ``pair`` are guids of an unmatched label and an unmatched pair that differ only in spelling, if there
    are any; else the first unmatched ones, or "".
    """

    joined: int  # labels that have a pair
    labels_without_pair: int
    pairs_without_label: int
    label: str = ""
    pair: str = ""
    alike: int = 0  # unmatched labels that differ from an unmatched pair only in spelling
    differ_in: str = ""  # what most of these differ in

    def describe(self) -> str:
        """Return a sentence about unmatched labels and pairs, with an example, or "" if there is nothing to say."""
        if self.alike:
            return (
                f"{self.alike:,} labels and pairs differ only in {self.differ_in}: "
                f"for example, the label names {self.label!r} and the pair is called {self.pair!r}"
            )
        if self.labels_without_pair and self.pairs_without_label:
            return f"For example, a label names {self.label!r}, and a pair is called {self.pair!r}"
        return ""


def _without_spaces(guid: str) -> str:
    return re.sub(r"[\s_-]+", "", guid)


_RESPELLINGS: dict[str, Callable[[str], str]] = {
    "leading zeros": lambda guid: re.sub(r"(?<![0-9])0+(?=[0-9])", "", guid),
    "a file suffix": lambda guid: re.sub(
        r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|txt)$", "", guid, flags=re.IGNORECASE
    ),
    "capitals": str.casefold,
    "a folder": lambda guid: PurePosixPath(guid.replace("\\", "/")).name,
    "a fraction .0": lambda guid: guid.removesuffix(".0"),
    "spaces, hyphens and underscores": _without_spaces,
    "the form of characters": lambda guid: unicodedata.normalize("NFKC", guid),
}


def _plain(guid: str) -> str:
    """Return a guid in a form that is equal for all spellings."""
    for name in ("a folder", "a file suffix", "a fraction .0", "leading zeros", "spaces, hyphens and underscores"):
        guid = _RESPELLINGS[name](guid)
    return unicodedata.normalize("NFKC", guid).casefold()


def join_of(labels: Collection[str], pairs: Collection[str]) -> Join:
    """Compare the guids of labels with the guids of pairs."""
    if not labels:
        return Join(0, 0, 0)
    unmatched_labels = [guid for guid in labels if guid not in pairs]
    unmatched_pairs = [guid for guid in pairs if guid not in labels]
    counts = len(labels) - len(unmatched_labels), len(unmatched_labels), len(unmatched_pairs)
    if not (unmatched_labels and unmatched_pairs):
        return Join(*counts, next(iter(unmatched_labels), ""), min(unmatched_pairs, key=natural_key, default=""))
    for differ_in, respell in {**_RESPELLINGS, "spelling": _plain}.items():
        pair_of = {respell(guid): guid for guid in unmatched_pairs}
        alike = [guid for guid in unmatched_labels if respell(guid) in pair_of]
        if len(alike) * 2 > min(len(unmatched_labels), len(unmatched_pairs)):
            return Join(*counts, alike[0], pair_of[respell(alike[0])], len(alike), differ_in)
    return Join(*counts, unmatched_labels[0], min(unmatched_pairs, key=natural_key))


def alike_names(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of names that differ only in capitals, spaces, hyphens or the form of characters."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFKC", _without_spaces(name)).casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
