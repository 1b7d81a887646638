"""A dataset of raw pairs: a folder of ``<guid>.jpg`` + ``<guid>.txt``, or a manifest."""

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
    """Raw pairs, in natural order of guid, and their labels.

    Attributes
    ----------
    data, labels_path
        Absolute paths. The cache records them, so that later commands need no flags.
    pairs
        Every pair that has a file, a row in the manifest, or a label.
    labels
        Label (or None) by guid, as in the labels file; empty without a labels file.
    join
        How labels and pairs fit together.
    manifest
        Guids in the order of the manifest; None for a folder.
    unused_columns
        Columns of the manifest that mmcli does not use.
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

        A guid that occurs only in ``labels`` becomes a pair with a ``problem``.

        Raises
        ------
        DataError
            No such folder, manifest or labels file, no pair in it, or a header that mmcli does not understand.
        """
        data = Path(os.path.abspath(data))
        labels_path = None if labels is None else Path(os.path.abspath(labels))
        source: Folder | Manifest
        if data.is_dir():
            source = Folder.scan(data, labels_path)
        elif data.is_file():
            source = Manifest.read(data)
            if source.has_labels and labels_path is None:
                labels_path = data
        else:
            raise DataError(f"no such folder or manifest: {data}: give the path of the pairs")
        if not source:
            raise DataError(
                f"no pairs in {data}: expected files <guid>.jpg (or {', '.join(IMAGE_SUFFIXES[1:])}) and <guid>.txt"
                + _in_subfolders(data)
            )
        by_guid = Labels() if labels_path is None else read_labels(labels_path)
        join = join_of(by_guid, source)
        if by_guid and join.joined == 0:
            raise DataError(
                f"none of the {len(by_guid)} guids in {labels_path} is in {data}: give the labels of these pairs. "
                + join.describe()
            )
        manifest, unused = (list(source), source.unused) if isinstance(source, Manifest) else (None, [])
        for guid in by_guid:
            source.expect(guid)
        return cls(data, labels_path, source.in_order(), by_guid, join, manifest, unused)

    @property
    def order(self) -> list[str]:
        """Guids in the order of the manifest, or in natural order for a folder."""
        return self.manifest or [pair.guid for pair in self.pairs if not pair.absent]


def _in_subfolders(folder: Path) -> str:
    """Return a hint if there are images in a subfolder, else an empty string."""
    if not folder.is_dir():
        return ""
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        if any(path.suffix.lower() in IMAGE_SUFFIXES for path in below.iterdir()):
            return f"; there are images in {below.name}/: give that folder, or a manifest that names the files"
    return ""
