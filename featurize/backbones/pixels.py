"""The result of a transformers image processor, in fewer steps.

transformers' processors resize with Pillow, crop, rescale and normalise, and copy the image to floats several times.
Rescaling and normalising depend only on a pixel's value and channel, so a table of 256 values per channel, made by the
processor itself, gives the same result in one step.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...cache.errors import BackboneError


def checked_resize(processor: Any, resize: int) -> int:
    """Return ``resize`` if the processor crops afterwards, and to no more than ``resize`` pixels.

    Raises
    ------
    BackboneError
        The processor does not crop, or crops to more, which would add a black frame.
    """
    crop = processor.crop_size["height"] if getattr(processor, "do_center_crop", False) else None
    if crop is None:
        raise BackboneError("this model's processor does not crop, so --resize has no effect: leave it out")
    if resize < crop:
        raise BackboneError(f"--resize {resize} is less than the model's crop of {crop} pixels: give {crop} or more")
    return resize


@dataclass(frozen=True)
class Preparer:
    """Prepares one RGB image, bit for bit as ``processor`` does.

    Attributes
    ----------
    processor
        An image processor of transformers, with the Pillow backend.
    settings
        Settings that each call of the processor gets.
    size, crop
        Size before cropping, and of the crop, if there is one.
    table
        The processor's result for each channel and value, (3, 256). None: the processor does something else too, so it
        is called for each image.
    """

    processor: Any
    settings: dict[str, Any]
    size: dict[str, int]
    crop: dict[str, int] | None
    table: NDArray[np.float32] | None = None

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the model's input, (3, H, W) float32."""
        return self.processed(image) if self.table is None else self._looked_up(image, self.table)

    def processed(self, image: Image.Image, **settings: Any) -> NDArray[np.float32]:
        """Return the output of the processor itself, (3, H, W) float32."""
        # For an image three pixels high, the processor would mistake rows for channels.
        prepared = self.processor(
            image, return_tensors="np", input_data_format="channels_last", **self.settings, **settings
        )
        return np.asarray(prepared["pixel_values"][0], dtype=np.float32)

    def _looked_up(self, image: Image.Image, table: NDArray[np.float32]) -> NDArray[np.float32]:
        width, height = image.size
        if self.size.get("shortest_edge"):
            short = self.size["shortest_edge"]
            long = int(short * max(width, height) / min(width, height))
            width, height = (short, long) if width <= height else (long, short)
        else:
            width, height = self.size["width"], self.size["height"]
        image = image.resize((width, height), resample=self.processor.resample)
        if self.crop is not None:
            left, top = (width - self.crop["width"]) // 2, (height - self.crop["height"]) // 2
            image = image.crop((left, top, left + self.crop["width"], top + self.crop["height"]))
        values = np.asarray(image)
        pixels = np.empty((3, *values.shape[:2]), np.float32)
        for channel in range(3):
            np.take(table[channel], values[:, :, channel], out=pixels[channel], mode="clip")
        return pixels


def make_preparer(processor: Any, resize: int | None) -> Preparer:
    """Return a preparer, with a table if that gives the same bits as the processor on a few samples.

    Parameters
    ----------
    resize
        Short side in pixels before the centre crop. None: the processor's own.

    Raises
    ------
    BackboneError
        The processor does not crop, or crops to more than ``resize``.
    """
    size = dict(processor.size or {})
    if resize is not None:
        size = {"shortest_edge": checked_resize(processor, resize)}
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
    plain = Preparer(processor, {} if resize is None else {"size": size}, size, crop)
    grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    try:
        table = plain.processed(Image.fromarray(grey), do_resize=False, do_center_crop=False)
        if table.shape != (3, 1, 256):
            return plain
        quick = replace(plain, table=np.ascontiguousarray(table[:, 0]))
        is_same = all(np.array_equal(quick(sample), plain(sample)) for sample in _samples())
    except Exception:  # other processors raise any exception; they are then called for each image
        return plain
    return quick if is_same else plain


def _samples() -> list[Image.Image]:
    """Return a wide, a tall, a small and a square image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (301, 301, 3), dtype=np.uint8)
    return [Image.fromarray(noise[:height, :width]) for height, width in ((150, 301), (301, 131), (3, 5), (256, 256))]
