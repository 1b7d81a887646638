"""A cache of earlier versions of decoding and cleaning is brought up to date, row by row."""

import pytest
from conftest import content
from mmcli.cache import CacheError
from mmcli.featurize import FeaturizeOptions, featurize

OPTIONS = FeaturizeOptions(dtype="float32")


def first_version(monkeypatch):
    """Decode, clean and record as the first version did."""
    import re

    from mmcli.featurize import identity as steps
    from mmcli.featurize.pairs import hashing as reading
    from mmcli.featurize.pairs import image
    from mmcli.featurize.pairs.text import WINDOWS, decode_text
    from PIL import Image

    def clean_text(text):
        for pattern, by in ((r"http\S+", " "), (r"@\w+", " "), (r"#(\w+)", r"\1"), (r"\s+", " ")):
            text = re.sub(pattern, by, text)
        return text.strip().lower()

    def decode(raw, encoding=None):
        text, codec = decode_text(raw)
        return (raw.decode("gbk"), "gbk") if codec == WINDOWS else (text, codec)

    monkeypatch.setattr(reading, "clean_text", clean_text)
    monkeypatch.setattr(reading, "decode_text", decode)
    monkeypatch.setattr(image, "_in_rgb", lambda picture: Image.Image.convert(picture, "RGB"))
    for name in ("IMAGE_DECODING", "TEXT_DECODING", "TEXT_CLEANING"):
        monkeypatch.setattr(steps, name, 1)


@pytest.mark.parametrize("clean", [True, False])
def test_a_cache_of_earlier_steps_is_brought_up_to_date(pairs, tmp_path, free, monkeypatch, clean):
    from PIL import Image

    folder, labels = pairs(20)
    (folder / "1.txt").write_text("http://t.cn/x今天 ok")
    (folder / "2.txt").write_bytes("Müller dort".encode("cp1252"))
    logo = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    logo.putpixel((20, 20), (9, 9, 9, 255))
    (folder / "3.jpg").unlink()
    logo.save(folder / "3.png")
    Image.new("RGBA", (40, 40), (1, 2, 3, 255)).save(folder / "21.png")  # no transparent pixel
    (folder / "21.txt").write_text("opaque http://a.b/c")
    out, options = tmp_path / "f.h5", FeaturizeOptions(dtype="float32", clean=clean)
    with monkeypatch.context() as earlier:
        first_version(earlier)
        featurize(folder, labels, out, options)
    before, images, texts = content(out), free.images, free.texts
    summary = featurize(folder, labels, out, FeaturizeOptions())
    changed = {"1", "2", "3"}
    assert (summary.computed, summary.unchanged) == (3, 18)
    assert (free.images - images, free.texts - texts) == (1, 2)
    featurize(folder, labels, tmp_path / "fresh.h5", options)
    assert content(out) == content(tmp_path / "fresh.h5")
    assert {guid for guid in before if before[guid] != content(out)[guid]} == changed - (set() if clean else {"1"})
    assert featurize(folder, labels, out, options).computed == 0


def test_a_row_that_cannot_be_checked_is_not_brought_up_to_date_without_a_word(pairs, tmp_path, free, monkeypatch):
    folder, labels = pairs(6)
    out = tmp_path / "f.h5"
    with monkeypatch.context() as earlier:
        first_version(earlier)
        featurize(folder, labels, out, OPTIONS)
    (folder / "2.jpg").unlink()
    with pytest.raises(CacheError, match=r"1 of its pairs are no longer in .* cannot be read"):
        featurize(folder, labels, out, OPTIONS)
    assert featurize(folder, labels, out, FeaturizeOptions(prune=True, max_reject_rate=1)).rows == 5
