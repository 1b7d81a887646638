"""The result of a transformers image processor, in fewer steps.

transformers' processors resize with Pillow, crop, rescale and normalise, and copy the image to floats several times.
Rescaling and normalising depend only on a pixel's value and channel, so a table of 256 values per channel, made by the
processor itself, gives the same result in one step.
"""

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


class Preparer:
    """Prepares one RGB image, bit for bit as ``processor`` does.

    Parameters
    ----------
    processor
        An image processor of transformers, with the Pillow backend.
    resize
        Short side in pixels before the centre crop. None: the processor's own.

    Raises
    ------
    BackboneError
        The processor does not crop, or crops to more than ``resize``.
    """

    def __init__(self, processor: Any, resize: int | None) -> None:
        self.processor = processor
        if resize is not None:
            resize = checked_resize(processor, resize)
        self.asked = {} if resize is None else {"size": {"shortest_edge": resize}}
        self.size = {"shortest_edge": resize} if resize is not None else dict(processor.size or {})
        self.crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", None) else None
        self.table = np.empty((3, 0), np.float32)
        self.is_plain = self._learn_table()

    def __call__(self, image: Image.Image) -> NDArray[np.float32]:
        """Return the model's input, (3, H, W) float32."""
        return self._quick(image) if self.is_plain else self._processed(image)

    def _processed(self, image: Image.Image, **settings: Any) -> NDArray[np.float32]:
        # For an image three pixels high, the processor would mistake rows for channels.
        prepared = self.processor(
            image, return_tensors="np", input_data_format="channels_last", **self.asked, **settings
        )
        return np.asarray(prepared["pixel_values"][0], dtype=np.float32)

    def _learn_table(self) -> bool:
        """Fill the table with the processor's result for each value and channel; return whether the table is enough."""
        grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        try:
            table = self._processed(Image.fromarray(grey), do_resize=False, do_center_crop=False)
            if table.shape != (3, 1, 256):
                return False
            self.table = np.ascontiguousarray(table[:, 0])
            return all(np.array_equal(self._quick(each), self._processed(each)) for each in _samples())
        except Exception:  # other processors raise any exception; they are then called for each image
            return False

    def _quick(self, image: Image.Image) -> NDArray[np.float32]:
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
            np.take(self.table[channel], values[:, :, channel], out=pixels[channel], mode="clip")
        return pixels


def _samples() -> list[Image.Image]:
    """Return a wide, a tall, a small and a square image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (301, 301, 3), dtype=np.uint8)
    return [Image.fromarray(noise[:height, :width]) for height, width in ((150, 301), (301, 131), (3, 5), (256, 256))]
