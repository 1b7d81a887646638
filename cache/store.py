"""Reading a feature cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import CacheError
from .features import Features, StoredRows, StoredTokens, Tokens, check_finite, read_tokens, token_row_bytes
from .hdf5 import (
    StoredFile,
    cannot_open,
    damage_is_clear,
    finite_rows,
    open_hdf5,
    read_rows,
    row_bytes,
    slices,
    stamp_of,
    window_rows,
)
from .labels import guid_of
from .schema import EMBEDDINGS, Header, describe_difference, fingerprint_of, read_header

_ROWS_AT_ONCE = 4096


@dataclass(eq=False)
class FeatureCache:
    """One HDF5 file of embeddings, rows matched by guid.

    Open it with :meth:`open`. Use it as a context manager, or call :meth:`close`.

    Examples
    --------
    >>> cache = FeatureCache.open("artifacts/features.h5")      # doctest: +SKIP
    >>> image, text = cache.embeddings(["4597", "26"])          # doctest: +SKIP
    >>> image.shape, image.dtype                                # doctest: +SKIP
    ((2, 512), dtype('float32'))
    """

    path: Path
    file: h5py.File
    header: Header

    @classmethod
    def open(cls, path: str | Path) -> FeatureCache:
        """Open the cache at ``path`` and check that it is one.

        Raises
        ------
        CacheError
            No such file, not a cache, damaged, or another schema.
        """
        path = Path(path)
        if path.is_dir():
            raise CacheError(f"{path} is a folder: give a cache file, such as {path / 'features.h5'}")
        if not path.is_file():
            if path.with_name(path.name + ".parts").is_dir():
                raise CacheError(
                    f"no feature cache at {path} yet, but beside it what an interrupted `mmcli featurize` had "
                    "finished: run the same command again, and it goes on"
                )
            raise CacheError(
                f"no feature cache at {path}: make it with `mmcli featurize DATA --out {path}`, or give its path"
            )
        with damage_is_clear(path, "its structure"):
            try:
                file = open_hdf5(path)
            except OSError as error:
                raise cannot_open(path, error) from error
        try:
            with damage_is_clear(path, "its header"):
                return cls(path, file, read_header(path, file))
        except BaseException:
            file.close()
            raise

    def check(self, expected: dict[str, Any], name: str) -> None:
        """Check that the identity of this cache is ``expected``, the identity of backbone ``name``.

        Raises
        ------
        CacheError
            The identities differ. The message names the differences.
        """
        if self.fingerprint != fingerprint_of(expected):
            raise CacheError(
                f"{self.path} holds features of {self.header.backbone['name']}, which do not fit {name} ("
                + "; ".join(describe_difference(self.header.identity, expected)[:4])
                + "): use the options of this cache, or give another --out"
            )

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self.file["guid"].shape[0])

    def __contains__(self, guid: object) -> bool:
        return isinstance(guid, str) and guid_of(guid) in self.row_of

    @property
    def dim(self) -> int:
        """Length d of an embedding."""
        return int(self.file["image"].shape[1])

    @property
    def n_views(self) -> int:
        """Number of augmented views per image."""
        return int(self.file["image_views"].shape[1]) if "image_views" in self.file else 0

    @property
    def has_tokens(self) -> bool:
        """Whether the file holds the towers' last hidden states."""
        return "image_tokens" in self.file

    @property
    def has_cleaned(self) -> bool:
        """Whether the file holds digests of cleaned texts. Files of the first version of mmcli do not."""
        return "row/cleaned_sha256" in self.file

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of everything the embeddings depend on."""
        return self.header.fingerprint

    @cached_property
    def guids(self) -> list[str]:
        """The guid of each row, in file order, in composed form (NFC)."""
        return [guid_of(name) for name in self._strings("guid")]

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row number by guid."""
        return {guid: row for row, guid in enumerate(self.guids)}

    def rows(self, guids: Iterable[str]) -> NDArray[np.int64]:
        """Return the row number of each guid, (n,) int64.

        Raises
        ------
        CacheError
            A guid is not in the cache.
        """
        guids = [guid_of(guid) for guid in guids]
        missing = [guid for guid in guids if guid not in self.row_of]
        if missing:
            raise CacheError(
                f"{len(missing)} of {len(guids)} pairs are not in {self.path}, the first is {missing[0]!r}: "
                "featurize their folder, or remove them from the list"
            )
        return np.fromiter((self.row_of[guid] for guid in guids), dtype=np.int64, count=len(guids))

    def embeddings(self, guids: Sequence[str] | None = None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return image and text embeddings, each (n, d) float32, in the order of ``guids`` (default: file order)."""
        rows = np.arange(len(self)) if guids is None else self.rows(guids)
        return self.read("image", rows).astype(np.float32), self.read("text", rows).astype(np.float32)

    def features(
        self,
        guids: Sequence[str],
        tokens: bool = False,
        views: bool = False,
        max_bytes: int | None = None,
        of_rows: int | None = None,
    ) -> Features:
        """Return the inputs of a head, in the order of ``guids``.

        Parameters
        ----------
        tokens, views
            Whether to return token states, and embeddings of augmented images.
        max_bytes
            Embeddings, or token states, that take more memory stay in the file and are read when needed.
        of_rows
            Number of rows, including these, whose token states share ``max_bytes``. Default: these rows.

        Raises
        ------
        CacheError
            The cache has no tokens, no views, or not all guids; a number is not finite; or the file is damaged.
        """
        again = f"run `mmcli featurize {self.header.dataset['data']} --out {self.path}"
        if tokens and not self.has_tokens:
            raise CacheError(f"{self.path} holds no token states: {again} --tokens`")
        if views and not self.n_views:
            raise CacheError(f"{self.path} holds no augmented views: {again} --views 4`")
        rows = self.rows(guids)
        names = ["image", "text", *(["image_views"] if views else [])]
        file = StoredFile(self.path.absolute(), stamp_of(self.file))
        kept: Tokens | StoredTokens | None = None
        if tokens:
            size = token_row_bytes(self.file) * (len(rows) if of_rows is None else of_rows)
            if max_bytes is not None and size > max_bytes:
                kept = StoredTokens(file, rows, max_bytes)
            else:
                kept = read_tokens(self.file, self.path, rows)
        columns: list[StoredRows | NDArray[Any]] = []
        for name in names:
            if max_bytes is not None and len(rows) * self.row_bytes(views) > max_bytes:
                columns.append(StoredRows(file, name, rows, max_bytes))
            else:
                values = self.read(name, rows)
                check_finite(self.path, name.replace("image_views", "image view"), values, guids)
                columns.append(values)
        return Features(columns[0], columns[1], kept, columns[2] if views else None)

    def read(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return dataset ``name`` at ``rows`` (any order, repeats allowed), first axis (n,).

        Raises
        ------
        CacheError
            A checksum shows that the file is damaged.
        """
        return read_rows(self.file, self.path, name, rows)

    def text_tokens(self, row: int) -> NDArray[np.float16]:
        """Return the last hidden states of one text, (L, w_t) float16."""
        with damage_is_clear(self.path, "text_tokens"):
            start, stop = self.file["text_offsets"][row : row + 2]
            return self.file["text_tokens"][int(start) : int(stop)]

    def digests(self) -> list[tuple[bytes, bytes]]:
        """Return each row's (sha256 of image bytes, sha256 of text bytes), 32 bytes each."""
        everything = np.arange(len(self))
        images, texts = (self.read(f"row/{side}_sha256", everything) for side in ("image", "text"))
        return [(image.tobytes(), text.tobytes()) for image, text in zip(images, texts, strict=True)]

    def _strings(self, name: str) -> list[str]:
        with damage_is_clear(self.path, name):
            dataset = self.file[name]
            spans = slices(len(dataset), _ROWS_AT_ONCE)
            return [value.decode() for span in spans for value in dataset[span].tolist()]

    def codecs(self) -> list[str]:
        """Return the codec that decoded each row's text."""
        return self._strings("row/codec")

    def describe(self) -> dict[str, Any]:
        """Return a description of the file and its origin, as plain data."""
        return {
            "cache": str(self.path),
            "rows": len(self),
            "dim": self.dim,
            "stored_as": str(self.file["image"].dtype),
            "views": self.n_views,
            "tokens": self.has_tokens,
            "bytes": self.path.stat().st_size,
            "fingerprint": self.fingerprint,
            "backbone": self.header.backbone,
            "dataset": self.header.dataset,
            "codecs": dict(sorted(Counter(self.codecs()).items())),
            "truncated": int(self.read("row/truncated", np.arange(len(self))).sum()),
            "identity": self.header.identity,
            "versions": self.header.versions,
        }

    def row_bytes(self, views: bool = False) -> int:
        """Return the size of a row's pooled embeddings in bytes, with its views if wanted."""
        names = ("image", "text", *(["image_views"] if views else []))
        return sum(row_bytes(self.file[name]) for name in names if name in self.file)

    def embedding_names(self) -> list[str]:
        """Return the names of the dense embedding datasets in this file."""
        return [name for name in EMBEDDINGS if name in self.file]

    def unsound(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Return which rows have a number that is not finite, and which an all-zero embedding, each (n,) bool."""
        not_finite, zero = np.zeros((2, len(self)), dtype=bool)
        for name in self.embedding_names():
            for span in slices(len(self), window_rows(self.file[name])):
                values = self.read(name, np.arange(span.start, span.stop))
                not_finite[span] |= ~finite_rows(values)
                zero[span] |= ~values.reshape(len(values), -1).any(axis=1)
        return not_finite, zero


def verify(cache: FeatureCache, digests_now: Callable[[str], tuple[bytes, bytes] | None]) -> dict[str, list[str]]:
    """Return the guids of rows whose source ``changed`` or is ``gone``, or with ``non_finite`` or ``all_zero`` numbers.

    ``digests_now`` returns the current (sha256 of image bytes, sha256 of text bytes) of a guid, or None if a file is
    gone. It is called from several threads. A CacheError says that the cache file itself is damaged.
    """
    changed: list[str] = []
    gone: list[str] = []
    digests = cache.digests()
    with ThreadPoolExecutor() as pool:
        for span in slices(len(cache), _ROWS_AT_ONCE):  # in blocks, because a pool queues all its input
            guids = cache.guids[span]
            for guid, stored, now in zip(guids, digests[span], pool.map(digests_now, guids), strict=True):
                if now is None:
                    gone.append(guid)
                elif now != stored:
                    changed.append(guid)
    not_finite, zero = ([cache.guids[row] for row in np.flatnonzero(rows)] for rows in cache.unsound())
    return {"changed": changed, "gone": gone, "non_finite": not_finite, "all_zero": zero}
