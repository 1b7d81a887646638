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
from dataclasses import dataclass
from typing import Any

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

    Attributes
    ----------
    identity
        Everything that changes an embedding: hashes of weights, processor and tokenizer files, image loading,
        text decoding and cleaning, dtype. The fingerprint depends on nothing else.
    backbone
        ``{"name", "revision"}`` for loading the weights again. Not in the fingerprint, so that a folder may be moved.
    dataset
        ``{"data", "labels"}``: absolute paths of the raw pairs and of the labels file (or None).
    versions
        Library versions that computed the rows.
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
        parts = {name: getattr(self, name) for name in ("identity", "backbone", "dataset", "versions")}
        return {"schema": SCHEMA, "fingerprint": self.fingerprint} | {
            name: json.dumps(value, sort_keys=True, ensure_ascii=False) for name, value in parts.items()
        }
