"""Reading a feature cache."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from .errors import CacheError
from .features import Features
from .hdf5 import DAMAGE, cannot_open, damaged, open_hdf5
from .labels import guid_of
from .rows import StoredFile, StoredRows, check_finite, read_rows, row_bytes, stamp_of
from .schema import EMBEDDINGS, PER_ROW, SCHEMA, Header, describe_difference, fingerprint_of
from .tokens import StoredTokens, Tokens, read_tokens, tokens_bytes

_STRINGS_AT_ONCE = 1 << 16


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

    def __init__(self, path: Path, file: h5py.File, header: Header) -> None:
        self.path = path
        self.file = file
        self.header = header

    @classmethod
    def open(cls, path: str | Path, expected: dict[str, Any] | None = None) -> FeatureCache:
        """Open the cache at ``path`` and check that it is one.

        Parameters
        ----------
        path
            The HDF5 file.
        expected
            An identity. A cache with another identity is refused.

        Raises
        ------
        CacheError
            No such file, not a cache, damaged, another schema, or another identity.
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
        try:
            file = open_hdf5(path)
        except OSError as error:
            raise cannot_open(path, error) from error
        except DAMAGE as error:
            raise damaged(path, "its structure", error) from error
        try:
            header = _read_header(path, file)
            _check_structure(path, file)
            cache = cls(path, file, header)
            if expected is not None:
                cache.check(expected)
            return cache
        except DAMAGE as error:
            file.close()
            raise damaged(path, "its header", error) from error
        except BaseException:
            file.close()
            raise

    def check(self, expected: dict[str, Any], name: str = "something else") -> None:
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

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
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
    def token_widths(self) -> tuple[int, int]:
        """Return (w_i, w_t): widths of the last hidden states, or 0 without them."""
        if not self.has_tokens:
            return 0, 0
        return int(self.file["image_tokens"].shape[2]), int(self.file["text_tokens"].shape[1])

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
        guids
            Guids of the rows.
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
        data = self.header.dataset["data"]
        if tokens and not self.has_tokens:
            raise CacheError(
                f"{self.path} holds no token states: run `mmcli featurize {data} --out {self.path} --tokens`"
            )
        if views and not self.n_views:
            raise CacheError(
                f"{self.path} holds no augmented views: run `mmcli featurize {data} --out {self.path} --views 4`"
            )
        rows = self.rows(guids)
        names = ["image", "text", *(["image_views"] if views else [])]
        file = StoredFile(self.path.absolute(), stamp_of(self.file))
        kept: Tokens | StoredTokens | None = None
        if tokens:
            together = len(rows) if of_rows is None else of_rows
            size = tokens_bytes(self.file) * together / max(len(self), 1)
            if max_bytes is not None and size > max_bytes:
                kept = StoredTokens(file, rows, max_bytes)
            else:
                kept = read_tokens(self.file, self.path, rows)
        if max_bytes is not None and len(rows) * self.row_bytes(views) > max_bytes:
            stored = [StoredRows(file, name, rows, max_bytes) for name in names]
            return Features(stored[0], stored[1], kept, stored[2] if views else None)
        columns = [self.read(name, rows) for name in names]
        for name, values in zip(names, columns, strict=True):
            check_finite(self.path, name.replace("image_views", "image view"), values, guids)
        return Features(columns[0], columns[1], kept, columns[2] if views else None)

    def read(self, name: str, rows: NDArray[np.int64]) -> NDArray[Any]:
        """Return dataset ``name`` at ``rows`` (any order, repeats allowed), first axis (n,).

        Raises
        ------
        CacheError
            A checksum shows that the file is damaged.
        """
        try:
            dataset = self.file[name]
        except DAMAGE as error:
            raise damaged(self.path, name, error) from error
        return read_rows(dataset, self.path, rows)

    def text_tokens(self, row: int) -> NDArray[np.float16]:
        """Return the last hidden states of one text, (L, w_t) float16."""
        try:
            start, stop = self.file["text_offsets"][row : row + 2]
            return self.file["text_tokens"][int(start) : int(stop)]
        except DAMAGE as error:
            raise damaged(self.path, "text_tokens", error) from error

    def digests(self) -> list[tuple[bytes, bytes]]:
        """Return each row's (sha256 of image bytes, sha256 of text bytes), 32 bytes each."""
        everything = np.arange(len(self))
        images, texts = (self.read(f"row/{side}_sha256", everything) for side in ("image", "text"))
        return [(image.tobytes(), text.tobytes()) for image, text in zip(images, texts, strict=True)]

    def _strings(self, name: str) -> list[str]:
        try:
            dataset, strings = self.file[name], list[str]()
            for start in range(0, len(dataset), _STRINGS_AT_ONCE):
                strings += [value.decode() for value in dataset[start : start + _STRINGS_AT_ONCE].tolist()]
            return strings
        except DAMAGE as error:
            raise damaged(self.path, name, error) from error

    def codecs(self) -> list[str]:
        """Return the codec that decoded each row's text."""
        return self._strings("row/codec")

    def describe(self) -> dict[str, Any]:
        """Return a description of the file and its origin, as plain data."""
        codecs = Counter(self.codecs())
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
            "codecs": dict(sorted(codecs.items())),
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


def _read_header(path: Path, file: h5py.File) -> Header:
    schema = file.attrs.get("schema")
    if schema is None or "guid" not in file:
        raise CacheError(f"{path} is an HDF5 file, but not a feature cache of mmcli: give a file that mmcli made")
    if schema != SCHEMA:
        raise CacheError(
            f"{path} has schema {schema}, but this mmcli reads schema {SCHEMA}: featurize again with another --out, or "
            "use the version of mmcli that made it"
        )
    try:
        fields = {name: json.loads(file.attrs[name]) for name in ("identity", "backbone", "dataset", "versions")}
        stored = file.attrs["fingerprint"]
    except (KeyError, ValueError, TypeError) as error:
        raise CacheError(
            f"the header of {path} is damaged ({error}): restore a copy, or move the file away and run `mmcli "
            "featurize` again"
        ) from error
    header = Header(**fields)
    if header.fingerprint != stored:
        raise CacheError(
            f"{path} was changed by hand, its fingerprint does not fit its identity: restore a copy, or move the file "
            "away and run `mmcli featurize` again"
        )
    return header


def _check_structure(path: Path, file: h5py.File) -> None:
    """Check that each dataset has the recorded number of rows, because a damaged file may have lost some."""
    rows = len(file["guid"])
    stored = int(file.attrs.get("rows", rows))  # earlier versions did not write it
    lengths = {name: len(file[name]) for name in (*EMBEDDINGS, *PER_ROW) if name in file}
    if "text_tokens" in file:
        lengths["text_offsets"] = len(file["text_offsets"]) - 1
        lengths["text_tokens"] = rows if file["text_tokens"].ndim == 2 else -1
    for name, length in {"guid": rows, **lengths}.items():
        if length != stored:
            raise damaged(path, name, ValueError(f"{length} rows instead of {stored}"))
