import contextlib
import io

import numpy as np
import pytest
from mmcli.cache import DataError
from mmcli.featurize.image import augment, decode_image
from PIL import Image


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(size=(60, 40), mode="RGB"):
    random = np.random.default_rng(0)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "LA"])
def test_every_mode_becomes_rgb(mode):
    assert decode_image(encoded(noise(mode=mode))).mode == "RGB"


def test_the_exif_rotation_is_applied():
    image = noise((60, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    assert decode_image(encoded(image, "JPEG", exif=exif)).size == (40, 60)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"this is no image", "not an image"),
        (encoded(noise(), "JPEG")[:-200], "cut off"),
        (encoded(noise(), "PNG")[:300], "cut off"),
        (encoded(noise((4000, 2))), "too narrow"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n", "not an image"),
    ],
)
def test_bad_bytes_say_what_is_wrong(raw, words):
    with pytest.raises(DataError, match=words):
        decode_image(raw)


def test_no_damage_gets_through_as_another_error():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    random = np.random.default_rng(0)
    for raw in (encoded(noise(), "JPEG", exif=exif), encoded(noise()), encoded(noise(), "WEBP", exif=exif)):
        for _ in range(300):
            damaged = bytearray(raw)
            for position in random.integers(0, min(len(raw), 300), 4):
                damaged[position] = random.integers(0, 256)
            with contextlib.suppress(DataError):
                assert decode_image(bytes(damaged)).mode == "RGB"


def test_sixteen_bits_of_grey_keep_their_shades():
    ramp = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
    grey = np.asarray(decode_image(encoded(Image.fromarray(ramp))))
    assert np.abs(grey[..., 0].astype(int) - (ramp >> 8)).max() == 0


def test_a_decompression_bomb_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="decompression bomb"):
        decode_image(encoded(noise()))


def test_a_view_depends_on_seed_guid_and_number_alone():
    image = noise((120, 90))
    first = np.asarray(augment(image, 0, "7", 1))
    augment(image, 0, "8", 0)
    assert np.array_equal(first, np.asarray(augment(image, 0, "7", 1)))
    for other in (augment(image, 0, "7", 2), augment(image, 0, "8", 1), augment(image, 1, "7", 1)):
        assert other.size != first.shape[1::-1] or not np.array_equal(first, np.asarray(other))


def test_a_view_keeps_most_of_the_image():
    image = noise((100, 100))
    for view in range(50):
        width, height = augment(image, 0, "1", view).size
        assert 0.7 <= width * height / 10_000 <= 1
