"""The layout of a cache file (schema 1), and the fingerprint of everything that its embeddings depend on.

    /guid           (N,)        utf-8, fixed length
    /image          (N, d)      float16 or float32: projected, not normalised
    /text           (N, d)      as /image
    /image_views    (N, K, d)   only with views: embeddings of K seeded augmentations of each image
    /image_tokens   (N, P, w_i) only with tokens: last hidden states of the image tower, float16
    /text_tokens    (sum L, w_t) only with tokens: last hidden states of each text's own tokens, float16
    /text_offsets   (N + 1,)    row i's text tokens are text_tokens[text_offsets[i]:text_offsets[i + 1]]
    /row/image_sha256, /row/text_sha256  (N, 32) uint8: sha256 of the raw bytes
    /row/cleaned_sha256  (N, 32) uint8: sha256 of the cleaned text, which identifies duplicates
    /row/codec      (N,)        utf-8: codec that decoded the text
    /row/truncated  (N,)        bool: the text had more tokens than the backbone takes

Attributes: ``schema``, ``fingerprint``, and as JSON ``identity``, ``backbone``, ``dataset``, ``versions``.
"""

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import h5py

from .errors import CacheError
from .hdf5 import RESTORE, damage_is_clear

SCHEMA = 1
EMPTY_SHA256 = hashlib.sha256(b"").digest()  # of a text that is empty after cleaning

# Columns of a row, in the order of writing. text_tokens is ragged, so it is handled separately.
EMBEDDINGS = ("image", "text", "image_views", "image_tokens")
PER_ROW = ("row/image_sha256", "row/text_sha256", "row/cleaned_sha256", "row/codec", "row/truncated")


def fingerprint_of(identity: dict[str, Any]) -> str:
    """Return the sha256 (hex) of the canonical JSON of ``identity``."""
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


# Command-line options for entries of an identity.
_OPTION_OF = {
    "dtype": "--dtype",
    "image.resize": "--resize",
    "text.cleaning": "--no-clean-text",
    "text.encoding": "--encoding",
}


def describe_difference(actual: dict[str, Any], expected: dict[str, Any], prefix: str = "") -> list[str]:
    """Name each entry in which two identities differ, as ``entry: actual, not expected``."""
    lines: list[str] = []
    for key in sorted(actual.keys() | expected.keys()):
        left, right = actual.get(key), expected.get(key)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            lines += describe_difference(left, right, f"{prefix}{key}.")
        else:
            name = prefix + key
            option = f" ({_OPTION_OF[name]})" if name in _OPTION_OF else ""
            lines.append(f"{name}{option}: {_short(left)}, not {_short(right)}")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "present"
    text = "absent" if value is None else str(value)
    return text if len(text) <= 20 else text[:12] + "…"


@dataclass(frozen=True)
class Header:
    """The attributes of a cache file.

    ``identity`` is everything that changes an embedding: hashes of weights, processor and tokenizer files, image
    loading, text decoding and cleaning, dtype. The fingerprint depends on nothing else. ``backbone`` is ``{"name",
    "revision"}`` for loading the weights again, and not in the fingerprint, so that a folder may be moved. ``dataset``
    is ``{"data", "labels"}``: absolute paths of the raw pairs and of the labels file (or None). ``versions`` are those
    of the libraries that computed the rows.
    """

    identity: dict[str, Any]
    backbone: dict[str, Any]
    dataset: dict[str, Any]
    versions: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """The sha256 (hex) of ``identity``."""
        return fingerprint_of(self.identity)

    def to_attributes(self) -> dict[str, Any]:
        """Return the HDF5 attributes of this header."""
        parts = {name: json.dumps(value, sort_keys=True, ensure_ascii=False) for name, value in vars(self).items()}
        return {"schema": SCHEMA, "fingerprint": self.fingerprint} | parts


def read_header(path: Path, file: h5py.File) -> Header:
    """Return the header of an open file; raise a CacheError if it is no cache, or one of another schema or damaged."""
    schema = file.attrs.get("schema")
    if schema is None or "guid" not in file:
        raise CacheError(f"{path} is an HDF5 file, but not a feature cache of mmcli: give a file that mmcli made")
    if schema != SCHEMA:
        raise CacheError(
            f"{path} has schema {schema}, but this mmcli reads schema {SCHEMA}: featurize again with another --out, or "
            "use the version of mmcli that made it"
        )
    try:
        header = Header(**{field.name: json.loads(file.attrs[field.name]) for field in fields(Header)})
        stored = file.attrs["fingerprint"]
    except (KeyError, ValueError, TypeError) as error:
        raise CacheError(f"the header of {path} is damaged ({error}): {RESTORE}") from error
    if header.fingerprint != stored:
        raise CacheError(f"{path} was changed by hand, its fingerprint does not fit its identity: {RESTORE}")
    _check_lengths(path, file)
    return header


def _check_lengths(path: Path, file: h5py.File) -> None:
    """Check that each dataset has the recorded number of rows, because a damaged file may have lost some."""
    rows = len(file["guid"])
    stored = int(file.attrs.get("rows", rows))  # earlier versions did not write it
    lengths = {"guid": rows} | {name: len(file[name]) for name in (*EMBEDDINGS, *PER_ROW) if name in file}
    if "text_tokens" in file:
        lengths["text_offsets"] = len(file["text_offsets"]) - 1
        lengths["text_tokens"] = rows if file["text_tokens"].ndim == 2 else -1
    for name, length in lengths.items():
        with damage_is_clear(path, name):
            if length != stored:
                raise ValueError(f"{length} rows instead of {stored}")
