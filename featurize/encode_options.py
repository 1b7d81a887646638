"""What the encoder computes for each pair."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .identity import is_cleaned
from .pairs.hashing import TOWERS


@dataclass(frozen=True)
class EncodeOptions:
    """What the encoder computes for each pair.

    Attributes
    ----------
    clean
        Whether to clean texts.
    encoding
        Codec of all texts. None: detect it for each text.
    views
        Augmented views per image.
    tokens
        Whether to keep last hidden states.
    dtype
        Type of stored embeddings.
    batch_size
        Images, including views, per call of the encoder. Text batches hold at most ``batch_size * 77 / 4`` tokens.
        None: the encoder's own batch size.
    towers
        Which towers to run. Only the files that these need are read.
    below
        Number of layers to skip at the top of each tower. If positive, the states that enter these layers are kept
        instead of embeddings (``image_tokens`` and ``text_tokens`` in ``dtype``, and ``text_ids``).
    """

    clean: bool = True
    encoding: str | None = None
    views: int = 0
    tokens: bool = False
    dtype: type[np.float16] | type[np.float32] = np.float32
    batch_size: int | None = None
    towers: tuple[str, ...] = TOWERS
    below: int = 0

    @classmethod
    def for_identity(
        cls, identity: dict[str, Any], towers: tuple[str, ...] = TOWERS, tokens: bool = False, below: int = 0
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
