import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmcli.featurize.text import clean_text, decode_text


@pytest.mark.parametrize(
    ("raw", "text", "codec"),
    [
        (b"plain", "plain", "utf-8"),
        ("gr\u00fcn \U0001f600".encode(), "gr\u00fcn \U0001f600", "utf-8"),
        ("\ufeffmark".encode(), "mark", "utf-8"),
        ("\u4f60\u597d".encode("gbk"), "\u4f60\u597d", "gbk"),
        ("\u20ac \U00020087".encode("gb18030"), "\u20ac \U00020087", "gb18030"),
        (b"caf\xe9", "caf\u00e9", "latin-1"),
        ("wide".encode("utf-16"), "wide", "utf-16"),
        (b"\xff\xfe\x00", "\u00ff\u00fe\x00", "latin-1"),
        (b"", "", "utf-8"),
    ],
)
def test_decode(raw, text, codec):
    assert decode_text(raw) == (text, codec)


@given(st.binary())
def test_every_byte_string_decodes(raw):
    text, codec = decode_text(raw)
    assert codec in ("utf-8", "gbk", "gb18030", "latin-1", "utf-16")
    assert isinstance(text, str)


@given(st.text())
def test_utf8_is_taken_as_it_is(text):
    if not text.startswith("\ufeff"):
        assert decode_text(text.encode("utf-8", "ignore"))[0] == text.encode("utf-8", "ignore").decode()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("RT @ann_b: So #HappyDay!\n http://t.co/x1", "rt : so happyday!"),
        ("https://x.y/z?q=1 end", "end"),
        ("# alone and #Tag#Two", "# alone and tagtwo"),
        ("  MANY\t spaces \n", "many spaces"),
        ("smile \U0001f600 ?!", "smile \U0001f600 ?!"),
        ("@only http://t.co/a", ""),
        ("#\u5929\u6c14 GOOD", "\u5929\u6c14 good"),
    ],
)
def test_clean(text, cleaned):
    assert clean_text(text) == cleaned


@given(st.text())
def test_cleaned_text_has_no_stray_space_and_cleaning_keeps_plain_words(text):
    cleaned = clean_text(text)
    assert cleaned == " ".join(cleaned.split())
    assert clean_text("word " + text).startswith("word")
