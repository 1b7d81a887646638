"""Decoding an image, and seeded augmented views of it."""

import hashlib
import io
from random import Random

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from ..cache.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What a file may really be, whatever its name says. Not EPS: Pillow would hand it to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
WIDEST = 100  # long side over short side


def decode_image(raw: bytes) -> Image.Image:
    """Decode ``raw`` to an upright RGB image (the EXIF rotation is applied).

    Raises
    ------
    DataError
        Saying in a few words what is wrong with the bytes: empty, not an image, cut off, larger than Pillow's limit
        against decompression bombs.
    """
    if not raw:
        raise DataError("image file is empty")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if max(image.size) > WIDEST * min(image.size):  # resizing its short side would need gigabytes
                raise DataError(f"image too narrow: {image.size[0]} x {image.size[1]} pixels")
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I") and np.asarray(image).max() > 255:
                # 16 bits of grey, which Pillow would clip to white
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            return image.convert("RGB")
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError("not an image") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"image too large (decompression bomb): {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever damaged bytes lead them to
        raise DataError(f"image damaged or cut off: {error}") from error


# Of one view; a change here needs a new `augmentation.version` in the identity.
CROP_SCALE = (0.8, 1.0)
JITTER = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.02}


def augment(image: Image.Image, seed: int, guid: str, view: int) -> Image.Image:
    """Return one augmented view: random resized crop (scale 0.8 to 1), flip 0.5, colour jitter 0.1/0.1/0.1/0.02.

    Seeded by (seed, guid, view): the same whatever the order of the pairs. Parameters as torchvision's
    ``RandomResizedCrop``, ``RandomHorizontalFlip`` and ``ColorJitter``; jitter is applied in a fixed order.
    """
    random = Random(hashlib.sha256(f"{seed}\0{guid}\0{view}".encode()).digest())
    image = image.crop(_random_crop(image.size, random))
    if random.random() < 0.5:
        image = ImageOps.mirror(image)
    for enhancer, amount in (
        (ImageEnhance.Brightness, JITTER["brightness"]),
        (ImageEnhance.Contrast, JITTER["contrast"]),
        (ImageEnhance.Color, JITTER["saturation"]),
    ):
        image = enhancer(image).enhance(random.uniform(1 - amount, 1 + amount))
    shift = round(random.uniform(-JITTER["hue"], JITTER["hue"]) * 255)
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _random_crop(size: tuple[int, int], random: Random) -> tuple[int, int, int, int]:
    width, height = size
    area = width * height * random.uniform(*CROP_SCALE)
    # Aspect between 3/4 and 4/3 of the image's own, as far as it fits.
    aspect = width / height * (0.75 ** random.uniform(-1, 1))
    crop_width = min(width, max(1, round((area * aspect) ** 0.5)))
    crop_height = min(height, max(1, round((area / aspect) ** 0.5)))
    left, top = random.randint(0, width - crop_width), random.randint(0, height - crop_height)
    return left, top, left + crop_width, top + crop_height
