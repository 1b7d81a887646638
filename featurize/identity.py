"""The identity of features: everything that changes an embedding, including the versions of our own steps."""

import copy
from typing import Any

from .backbones.base import OFFLINE, Backbone

VIEW_SEED = 0
# Raise a version if the step gives another result for any input. `featurize` then upgrades caches of earlier versions:
# it encodes the rows whose image or text is decoded or cleaned differently now (`pairs/changes.py`).
IMAGE_DECODING = 2  # 2: transparent pixels become white, deep grey levels are scaled
TEXT_DECODING = 2  # 2: Windows-1252, UTF-16 without a byte order mark
TEXT_CLEANING = 2  # 2: URLs and mentions end where Chinese or Thai begins


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
        if any(stored[side][step] > now[side][step] for side, step in steps):
            return False
        if is_cleaned(stored) != is_cleaned(now):
            return False
        upgraded = copy.deepcopy(stored)
        for side, step in steps:
            upgraded[side][step] = now[side][step]
        if stored["backbone"]["kind"] == OFFLINE:
            upgraded["backbone"] = now["backbone"] | stored["backbone"]
        return upgraded == now
    except (KeyError, TypeError):
        return False
