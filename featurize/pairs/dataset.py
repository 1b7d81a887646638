"""The raw pairs: a folder of ``<guid>.jpg`` + ``<guid>.txt``, or a manifest."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...cache.errors import DataError
from ...cache.labels import Labels, read_labels
from .folder import Folder
from .image import IMAGE_SUFFIXES
from .manifest import Manifest
from .pair import Pair
from .spelling import Join, join_of


@dataclass(frozen=True)
class Dataset:
    """Raw pairs in natural order of guid, and their labels.

    Attributes
    ----------
    data, labels_path
        Absolute locations, recorded in the cache so that later commands need no flags.
    pairs
        Every pair that is there or that a label names.
    labels
        Label (or None) by guid, as in the labels file; empty without one.
    join
        How labels and pairs fit together.
    manifest
        Guids in the order of the manifest; None for a folder.
    unused_columns
        Columns of the manifest that are not looked at.
    """

    data: Path
    labels_path: Path | None
    pairs: Sequence[Pair]
    labels: Labels
    join: Join = field(default_factory=lambda: join_of((), ()))
    manifest: list[str] | None = None
    unused_columns: list[str] = field(default_factory=list)

    @classmethod
    def open(cls, data: str | Path, labels: str | Path | None = None) -> "Dataset":
        """List the pairs of ``data``, a folder or a manifest (.csv, .jsonl, .parquet).

        A guid that ``labels`` names and that is not there becomes a pair with a ``problem``.

        Raises
        ------
        DataError
            No such folder or labels file; no pair in it; a header that is not understood.
        """
        data = Path(os.path.abspath(data))
        labels_path = None if labels is None else Path(os.path.abspath(labels))
        found: Folder | Manifest
        if data.is_dir():
            found = Folder(data, labels_path)
        elif data.is_file():
            found = Manifest(data)
            if found.has_labels and labels_path is None:
                labels_path = data
        else:
            raise DataError(f"no such folder or manifest: {data}: say where the pairs are")
        if not found:
            raise DataError(
                f"no pairs in {data}: expected files <guid>.jpg (or {', '.join(IMAGE_SUFFIXES[1:])}) and <guid>.txt"
                + _in_subfolders(data)
            )
        by_guid = Labels() if labels_path is None else read_labels(labels_path)
        join = join_of(by_guid, found)
        if by_guid and join.joined == 0:
            raise DataError(
                f"none of the {len(by_guid)} guids in {labels_path} is in {data}: is it the right file? "
                + join.describe()
            )
        listed, unused = (list(found), found.unused) if isinstance(found, Manifest) else (None, [])
        for guid in by_guid:
            found.expect(guid)
        return cls(data, labels_path, found.in_order(), by_guid, join, listed, unused)

    @property
    def order(self) -> list[str]:
        """Guids of the pairs in the order of the manifest; of a folder, in natural order."""
        return self.manifest or [pair.guid for pair in self.pairs if not pair.absent]


def _in_subfolders(folder: Path) -> str:
    """Say where images are that are not looked at."""
    if not folder.is_dir():
        return ""
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in below.iterdir()):
            return f"; there are images in {below.name}/: give that folder, or a manifest that names the files"
    return ""
