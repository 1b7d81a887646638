import contextlib
import io

import numpy as np
import pytest
from mmcli.cache import DataError
from mmcli.featurize.pairs.image import augment, decode_image
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


def logo(mode, **options):
    """A black disc on transparent ground, and the same on white."""
    from PIL import ImageDraw

    alpha = Image.new("L", (60, 40), 0)
    ImageDraw.Draw(alpha).ellipse([10, 5, 50, 35], fill=255)
    on_white = Image.new("RGB", alpha.size, "white")
    on_white.paste("black", mask=alpha)
    transparent = Image.merge("RGBA", (*Image.new("RGB", alpha.size).split(), alpha))
    if mode == "P":
        transparent = Image.new("P", alpha.size, 1)
        transparent.putpalette([0, 0, 0, 1, 2, 3])
        transparent.paste(0, mask=alpha)
        options["transparency"] = 1
    elif mode == "RGB":
        transparent = Image.composite(Image.new("RGB", alpha.size), Image.new("RGB", alpha.size, (1, 2, 3)), alpha)
        options["transparency"] = (1, 2, 3)
    else:
        transparent = transparent.convert(mode)
    return transparent, on_white, options


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("PNG", "RGBA"), ("PNG", "LA"), ("PNG", "P"), ("PNG", "RGB"), ("WEBP", "RGBA"), ("GIF", "P"), ("TIFF", "RGBA")],
)
def test_what_is_transparent_is_white(kind, mode):
    transparent, on_white, options = logo(mode)
    found = decode_image(encoded(transparent, kind, **options, **({"lossless": True} if kind == "WEBP" else {})))
    assert np.array_equal(np.asarray(found), np.asarray(on_white))


def test_half_transparent_pixels_are_mixed_with_white():
    half = Image.new("RGBA", (4, 4), (100, 0, 0, 128))
    assert np.allclose(np.asarray(decode_image(encoded(half)))[0, 0], [177, 127, 127], atol=1)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(np.uint16, 256), (np.int32, 256), (np.int32, 1), (np.float32, 1 / 255), (np.float32, 1)]
)
def test_deep_greys_look_like_the_same_picture_in_eight_bits(dtype, scale):
    eight = np.random.default_rng(0).integers(0, 256, (40, 60), dtype=np.uint8)
    deep = (eight.astype(np.float64) * scale).astype(dtype)
    found = np.asarray(decode_image(encoded(Image.fromarray(deep), "TIFF")))
    assert np.abs(found[..., 0].astype(int) - eight).max() <= (1 if dtype == np.float32 else 0)


def test_grey_levels_without_a_scale_say_so():
    for levels in ([[0.5, np.nan]], [[-3.0, 2.0]]):
        with pytest.raises(DataError, match="grey levels below zero or not finite"):
            decode_image(encoded(Image.fromarray(np.array(levels, np.float32)), "TIFF"))


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_png_with_megabytes_of_comments_is_read(place):
    import zlib

    raw = encoded(noise())
    content = b"Comment\0\0" + zlib.compress(b"a" * 3_000_000)
    chunk = b"zTXt" + content
    chunk = len(content).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    cut = 33 if place == "before" else len(raw) - 12  # after IHDR, or before IEND
    found = decode_image(raw[:cut] + chunk + raw[cut:])
    assert np.array_equal(np.asarray(found), np.asarray(noise()))


def test_damaged_exif_data_do_not_cost_the_picture():
    image = noise()
    raw = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert decode_image(raw).size == image.size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "MPO"])
def test_every_format_is_decoded(kind):
    assert decode_image(encoded(noise(), kind)).size == noise().size


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
