"""The identity of features, which is everything that changes an embedding, and the options that decide it."""

import codecs
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.errors import DataError
from ..cache.store import FeatureCache
from .backbones.base import DEFAULT_BACKBONE, OFFLINE, Backbone
from .pairs.hashing import SIDES

VIEW_SEED = 0
# Raise a version if the step gives another result for any input. `featurize` then upgrades caches of earlier versions:
# it encodes the rows whose image or text is decoded or cleaned differently now (`compare_rows` in `pairs/hashing.py`).
IMAGE_DECODING = 2  # 2: transparent pixels become white, deep grey levels are scaled
TEXT_DECODING = 2  # 2: Windows-1252, UTF-16 without a byte order mark
TEXT_CLEANING = 2  # 2: URLs and mentions end where Chinese or Thai begins


@dataclass(frozen=True)
class FeaturizeOptions:
    """Options of ``featurize``, as in the command's help. None means: as in the cache, or the default without one."""

    backbone: str | None = None  # default: DEFAULT_BACKBONE
    revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    views: int = 0
    tokens: bool = False
    clean: bool | None = None  # default: True
    encoding: str | None = None  # default: detected for each text
    resize: int | None = None  # default: the model's own
    batch_size: int | None = None
    max_reject_rate: float = 0.05
    prune: bool = False
    columns: Mapping[str, str] | None = None  # of a manifest, see ``cache.labels.columns_of``
    image_root: str | Path | None = None  # folder of the images of a manifest


def complete_options(options: FeaturizeOptions, cached: FeatureCache | None) -> FeaturizeOptions:
    """Fill in options that were not given from the cache, so that adding pairs needs no flags."""
    if options.encoding is not None:
        try:
            options = replace(options, encoding=codecs.lookup(options.encoding).name)
        except LookupError as error:
            raise DataError(
                f"unknown encoding {options.encoding!r}: give one that Python knows, such as cp1251"
            ) from error
    if cached is None:
        return replace(options, backbone=options.backbone or DEFAULT_BACKBONE, clean=options.clean is not False)
    identity, recorded = cached.header.identity, cached.header.backbone
    if options.backbone is None:
        options = replace(options, backbone=recorded["name"], revision=options.revision or recorded["revision"])
    return replace(
        options,
        dtype=identity["dtype"] if options.dtype == "auto" else options.dtype,
        clean=is_cleaned(identity) if options.clean is None else options.clean,
        encoding=options.encoding or identity["text"].get("encoding"),
        resize=options.resize or identity["image"]["resize"],
        views=max(options.views, cached.n_views),
        tokens=options.tokens or cached.has_tokens,
    )


@dataclass(frozen=True)
class EncodeOptions:
    """What the encoder computes for each pair.

    ``batch_size`` counts images, including views; text batches hold at most ``batch_size * 77 / 4`` tokens. If
    ``below`` is positive, that many layers at the top of each tower are skipped, and the states that enter them are
    kept instead of embeddings (``image_tokens``, ``text_tokens`` and ``text_ids``).
    """

    clean: bool = True
    encoding: str | None = None  # of all texts; None: detected for each text
    views: int = 0  # per image
    tokens: bool = False  # whether to keep last hidden states
    dtype: type[np.float16] | type[np.float32] = np.float32  # of stored embeddings
    batch_size: int | None = None  # None: the encoder's own
    towers: tuple[str, ...] = SIDES  # only the files that these need are read
    below: int = 0

    @classmethod
    def for_identity(
        cls, identity: dict[str, Any], towers: tuple[str, ...] = SIDES, tokens: bool = False, below: int = 0
    ) -> "EncodeOptions":
        """Return the options that give features of ``identity``."""
        return cls(
            clean=is_cleaned(identity),
            encoding=identity["text"].get("encoding"),
            tokens=tokens,
            dtype=np.float16 if identity["dtype"] == "bfloat16" else np.float32,
            towers=towers,
            below=below,
        )


def identity_of(
    backbone: Backbone, dtype: str, clean: bool, resize: int | None, encoding: str | None = None
) -> dict[str, Any]:
    """Return everything that changes an embedding."""
    text: dict[str, Any] = {"decoding": TEXT_DECODING, "cleaning": TEXT_CLEANING if clean else 0}
    return {
        "backbone": backbone.identity(),
        "dtype": dtype,
        "image": {"decoding": IMAGE_DECODING, "resize": resize},
        "text": text if encoding is None else text | {"encoding": encoding},
        "augmentation": {"version": 1, "seed": VIEW_SEED},
    }


def is_cleaned(identity: dict[str, Any]) -> bool:
    """Whether texts of this identity are cleaned."""
    return bool(identity["text"]["cleaning"])


def is_earlier(stored: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether ``stored`` differs from ``now`` only in earlier versions of the steps.

    Earlier versions did not record the tokenizer and the configuration of the offline backbone.
    """
    if stored == now:
        return False
    steps = (("image", "decoding"), ("text", "decoding"), ("text", "cleaning"))
    try:
        if any(stored[side][step] > now[side][step] for side, step in steps) or is_cleaned(stored) != is_cleaned(now):
            return False
        upgraded = copy.deepcopy(stored)
        for side, step in steps:
            upgraded[side][step] = now[side][step]
        if stored["backbone"]["kind"] == OFFLINE:
            upgraded["backbone"] = now["backbone"] | stored["backbone"]
        return upgraded == now
    except (KeyError, TypeError):
        return False
