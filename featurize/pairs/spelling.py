"""Labels and pairs are joined by guid; what is left over on both sides may differ in spelling alone."""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import Any

from .pair import natural_key


@dataclass(frozen=True)
class Join:
    """How the guids of labels and of pairs fit together.

    Attributes
    ----------
    joined
        Labels whose pair is there.
    labels_without_pair, pairs_without_label
        What is left over on either side.
    label, pair
        An example of each: two that differ in spelling alone, where there are such; else the first, or "" for none.
    alike
        Labels left over that differ from a pair left over in spelling alone.
    differ_in
        In what most of them differ; "" where there are none.
    """

    joined: int
    labels_without_pair: int
    pairs_without_label: int
    label: str = ""
    pair: str = ""
    alike: int = 0
    differ_in: str = ""

    def describe(self) -> str:
        """Return a sentence on what is left over, with an example of each spelling; "" where nothing is to be said."""
        if self.alike:
            return (
                f"{self.alike:,} labels and pairs differ only in {self.differ_in}: "
                f"the label is of {self.label!r}, the pair is called {self.pair!r}"
            )
        if self.labels_without_pair and self.pairs_without_label:
            return f"for example, there is a label of {self.label!r}, and a pair called {self.pair!r}"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Return this as plain data."""
        return asdict(self)


def _without_folder(guid: str) -> str:
    return PurePosixPath(guid.replace("\\", "/")).name


def _without_suffix(guid: str) -> str:
    return re.sub(r"\.(jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|txt)$", "", guid, flags=re.IGNORECASE)


def _without_zeros(guid: str) -> str:
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", guid)


def _without_fraction(guid: str) -> str:
    return guid.removesuffix(".0")


def _without_spaces(guid: str) -> str:
    return re.sub(r"[\s_-]+", "", guid)


_SPELLINGS: dict[str, Callable[[str], str]] = {
    "leading zeros": _without_zeros,
    "a file suffix": _without_suffix,
    "capitals": str.casefold,
    "a folder": _without_folder,
    "a fraction .0": _without_fraction,
    "spaces, hyphens and underscores": _without_spaces,
    "the form of characters": lambda guid: unicodedata.normalize("NFKC", guid),
}


def _plain(guid: str) -> str:
    """Return a guid without everything in which spellings differ."""
    for respelled in (_without_folder, _without_suffix, _without_fraction, _without_zeros, _without_spaces):
        guid = respelled(guid)
    return unicodedata.normalize("NFKC", guid).casefold()


def join_of(labels: Collection[str], pairs: Collection[str]) -> Join:
    """Compare the guids of labels with those of pairs; both are looked up by ``in``."""
    if not labels:
        return Join(0, 0, 0)
    labels_left = [guid for guid in labels if guid not in pairs]
    pairs_left = [guid for guid in pairs if guid not in labels]
    joined = len(labels) - len(labels_left)
    label, pair = labels_left[0] if labels_left else "", min(pairs_left, key=natural_key, default="")
    for differ_in, spelling in {**_SPELLINGS, "spelling": _plain}.items() if labels_left and pairs_left else ():
        names = {spelling(guid): guid for guid in pairs_left}
        alike = [guid for guid in labels_left if spelling(guid) in names]
        if len(alike) * 2 > min(len(labels_left), len(pairs_left)):
            label, pair = alike[0], names[spelling(alike[0])]
            return Join(joined, len(labels_left), len(pairs_left), label, pair, len(alike), differ_in)
    return Join(joined, len(labels_left), len(pairs_left), label, pair)


def alike_names(names: Iterable[str]) -> list[list[str]]:
    """Return the groups of names that differ in capitals, spaces, hyphens or the form of characters alone."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(unicodedata.normalize("NFKC", _without_spaces(name)).casefold(), []).append(name)
    return [group for group in groups.values() if len(group) > 1]
