"""What this package itself does to images and texts before a backbone sees them, by version."""

from typing import Any

from .backbones.base import OFFLINE, Backbone

VIEW_SEED = 0
# Raise one where the step gives another result for any input. A cache of an earlier version is brought up to date by
# `featurize`, which encodes the rows whose image or text comes out otherwise (`reading.compare`).
IMAGE_DECODING = 2  # 2: transparent pixels on white, deep grey levels by their scale
TEXT_DECODING = 2  # 2: Windows-1252, UTF-16 without a byte order mark
TEXT_CLEANING = 2  # 2: URLs and mentions end where Chinese or Thai begins


def identity_of(
    backbone: Backbone, dtype: str, clean: bool, resize: int | None, encoding: str | None = None
) -> dict[str, Any]:
    """Return all that changes an embedding."""
    text: dict[str, Any] = {"decoding": TEXT_DECODING, "cleaning": TEXT_CLEANING if clean else 0}
    return {
        "backbone": backbone.identity(),
        "dtype": dtype,
        "image": {"decoding": IMAGE_DECODING, "resize": resize},
        "text": text if encoding is None else text | {"encoding": encoding},
        "augmentation": {"version": 1, "seed": VIEW_SEED},
    }


def is_cleaned(identity: dict[str, Any]) -> bool:
    """Say whether texts of this identity are cleaned."""
    return bool(identity["text"]["cleaning"])


def is_earlier(found: dict[str, Any], now: dict[str, Any]) -> bool:
    """Say whether ``found`` is ``now`` but for earlier versions of the steps.

    Earlier versions did not record the tokenizer and the configuration of the offline backbone.
    """
    if found == now:
        return False
    try:
        steps = (("image", "decoding"), ("text", "decoding"), ("text", "cleaning"))
        if any(found[side][step] > now[side][step] for side, step in steps):
            return False
        backbone = found["backbone"]
        if backbone["kind"] == OFFLINE:
            backbone = now["backbone"] | backbone
        image, text = (
            found[side] | {step: now[side][step] for of, step in steps if of == side} for side in ("image", "text")
        )
        return (
            is_cleaned(found) == is_cleaned(now)
            and found
            | {
                "backbone": backbone,
                "image": image,
                "text": text,
            }
            == now
        )
    except (KeyError, TypeError):
        return False
