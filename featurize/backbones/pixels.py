"""What an image processor does to one picture, without its detours. Importing this imports transformers.

transformers' processors resize with Pillow, crop, rescale and normalise; on the way they copy the picture to floats
several times. What they do to a pixel depends on its value and channel alone, so a table of 256 values per channel,
made by the processor itself, does the same in one step.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...cache.errors import BackboneError


def checked_resize(processor: Any, resize: int) -> int:
    """Return ``resize`` where the processor crops to no more than that after resizing the short side.

    Raises
    ------
    BackboneError
        It does not crop, or to more: the picture would get a black frame.
    """
    crop = processor.crop_size["height"] if getattr(processor, "do_center_crop", False) else None
    if crop is None:
        raise BackboneError("this model's processor does not crop, so --resize has no meaning for it: leave it out")
    if resize < crop:
        raise BackboneError(f"--resize {resize} is less than the {crop} pixels to which the model crops")
    return resize


class Preparer:
    """Prepares one RGB image, bit for bit as ``processor`` does.

    Parameters
    ----------
    processor
        An image processor of transformers, with the Pillow backend.
    resize
        Short side in pixels before the centre crop; None for the processor's own.

    Raises
    ------
    BackboneError
        ``resize`` has no meaning for the processor, or is less than it crops to.
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
        """Return the pixels that the model takes, (3, H, W)."""
        return self._quick(image) if self.is_plain else self._processed(image)

    def _processed(self, image: Image.Image, **settings: Any) -> NDArray[np.float32]:
        # Said explicitly: of a picture three pixels high, the processor would take the rows for channels.
        prepared = self.processor(
            image, return_tensors="np", input_data_format="channels_last", **self.asked, **settings
        )
        return np.asarray(prepared["pixel_values"][0], dtype=np.float32)

    def _learn_table(self) -> bool:
        """Take what becomes of each value of each channel, (3, 256); return whether no more than that is done."""
        grey = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        try:
            table = self._processed(Image.fromarray(grey), do_resize=False, do_center_crop=False)
            if table.shape != (3, 1, 256):
                return False
            self.table = np.ascontiguousarray(table[:, 0])
            return all(np.array_equal(self._quick(each), self._processed(each)) for each in _samples())
        except Exception:  # processors of other kinds raise as they like; what cannot be imitated is used itself
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
    """Return a wide, a high, a small and a square picture of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (301, 301, 3), dtype=np.uint8)
    return [Image.fromarray(noise[:height, :width]) for height, width in ((150, 301), (301, 131), (3, 5), (256, 256))]
