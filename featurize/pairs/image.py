"""Decoding images, and making seeded augmented views of them."""

import hashlib
import io
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError

from ...cache.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# Formats that are decoded, whatever the file is called. Not EPS, because Pillow would run Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
NOT_AN_IMAGE = "not an image"
WIDEST = 100  # largest ratio of long side to short side
_PNG = b"\x89PNG\r\n\x1a\n"
_COMMENTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def decode_image(raw: bytes) -> Image.Image:
    """Decode ``raw`` to an upright RGB image: the EXIF rotation is applied, and transparent pixels become white.

    Grey levels of 16 bits, 32 bits and floating point are scaled to 8 bits. Raise a DataError if the bytes are not a
    whole image, or it is larger than Pillow's limit against decompression bombs. If you change the result, raise the
    version in ``identity.py``.
    """
    if not raw:
        raise DataError("image file is empty")
    try:
        try:
            return _in_rgb(_loaded(raw))
        except ValueError:  # Pillow refuses a PNG with a megabyte of comments, although its pixels are sound
            return _in_rgb(_loaded(_without_comments(raw)))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(NOT_AN_IMAGE) from error
    except Image.DecompressionBombError as error:
        raise DataError(f"image too large (decompression bomb): {error}") from error
    except Exception as error:  # on damaged bytes, Pillow's decoders raise exceptions of any kind
        raise DataError(f"image damaged or cut off: {error}") from error


def is_image_file(path: str) -> bool:
    """Whether the file at ``path`` begins like an image that can be decoded."""
    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # on damaged bytes, Pillow's decoders raise exceptions of any kind
        return False


def _loaded(raw: bytes) -> Image.Image:
    """Return the image in ``raw``, upright, in its own mode."""
    with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
        if max(image.size) > WIDEST * min(image.size):  # resizing the short side would take gigabytes
            raise DataError(f"image too narrow: {image.size[0]} x {image.size[1]} pixels")
        image.load()
        try:
            return ImageOps.exif_transpose(image)
        except Exception:  # damaged EXIF data can raise anything, but the pixels are decoded
            return image.copy()


def _without_comments(raw: bytes) -> bytes:
    """Return a PNG file without its text and colour profile. Other files are returned unchanged."""
    if not raw.startswith(_PNG):
        return raw
    kept, start = [_PNG], len(_PNG)
    while start + 8 <= len(raw):
        end = start + 12 + int.from_bytes(raw[start : start + 4], "big")  # length, name, content, checksum
        if raw[start + 4 : start + 8] not in _COMMENTS:
            kept.append(raw[start:end])
        start = end
    return b"".join(kept)


def _in_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, layered).convert("RGB")
    return image.convert("RGB")


def _eight_bits(grey: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return grey levels, (H, W), in 8 bits, scaled from the smallest common bit depth that holds the largest level."""
    levels = grey.astype(np.float64)
    largest = levels.max(initial=0)
    if not np.isfinite(largest) or not np.isfinite(levels).all() or levels.min(initial=0) < 0:
        raise DataError("image with grey levels below zero or not finite: save it with 8 or 16 bits")
    is_fraction = grey.dtype.kind == "f" and largest <= 1
    scale = 1 / 255 if is_fraction else 1 if largest < 2**8 else 2**8 if largest < 2**16 else 2**24
    if largest >= 2**32:
        raise DataError("image with grey levels beyond 32 bits: save it with 8 or 16 bits")
    return (levels / scale).astype(np.uint8)


def decoded_as_in_version_1(raw: bytes) -> bool:
    """Whether version 1 of ``decode_image`` gave the same image: no transparent pixel, and 8 bits per channel."""
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if not image.has_transparency_data:
                return image.mode != "F" and not image.mode.startswith("I")
        return np.array_equal(np.asarray(_loaded(raw).convert("RGB")), np.asarray(decode_image(raw)))
    except Exception:  # on damaged bytes, Pillow's decoders raise exceptions of any kind
        return False


# Augmentation of one view. If you change it, raise `augmentation.version` in the identity.
CROP_SCALE = (0.8, 1.0)
JITTER = {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.02}


def augment(image: Image.Image, seed: int, guid: str, view: int) -> Image.Image:
    """Return one augmented view: random resized crop (scale 0.8 to 1), flip 0.5, colour jitter 0.1/0.1/0.1/0.02.

    The seed is (seed, guid, view), so views do not depend on the order of pairs. The parameters are those of
    torchvision's ``RandomResizedCrop``, ``RandomHorizontalFlip`` and ``ColorJitter``; the order of jitter is fixed.
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
    # The crop's aspect ratio is 3/4 to 4/3 of the image's, as far as it fits.
    aspect = width / height * (0.75 ** random.uniform(-1, 1))
    crop_width = min(width, max(1, round((area * aspect) ** 0.5)))
    crop_height = min(height, max(1, round((area / aspect) ** 0.5)))
    left, top = random.randint(0, width - crop_width), random.randint(0, height - crop_height)
    return left, top, left + crop_width, top + crop_height
