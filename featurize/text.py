"""From a text file's bytes to the words that the backbone sees."""

import codecs
import re

# In the order of trial. GB18030 extends GBK; both are kept apart so that the cache can say which one it was.
CODECS = ("utf-8", "gbk", "gb18030", "latin-1")

_URL = re.compile(r"http\S+")
_MENTION = re.compile(r"@\w+")
_HASHTAG = re.compile(r"#(\w+)")
_SPACE = re.compile(r"\s+")


def decode_text(raw: bytes) -> tuple[str, str]:
    """Decode ``raw`` by the first codec that fits.

    UTF-8 (a byte order mark is dropped), then GBK, GB18030 and Latin-1, which fits anything. UTF-16 is taken only by
    its byte order mark.

    Returns
    -------
    text, codec : str, str
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return raw.decode("utf-16"), "utf-16"
        except UnicodeDecodeError:
            pass  # 0xFF 0xFE at the start of something else
    for codec in CODECS[:-1]:
        try:
            return raw.decode("utf-8-sig" if codec == "utf-8" else codec), codec
        except UnicodeDecodeError:
            continue
    return raw.decode(CODECS[-1]), CODECS[-1]


def clean_text(text: str) -> str:
    r"""Drop URLs and mentions, unwrap hashtags, lower-case, collapse white space; keep punctuation and emoji.

    Examples
    --------
    >>> clean_text("RT @ann: So #HappyDay!\n http://t.co/x1")
    'rt : so happyday!'
    """
    text = _URL.sub(" ", text)
    text = _MENTION.sub(" ", text)
    text = _HASHTAG.sub(r"\1", text)
    return _SPACE.sub(" ", text).strip().lower()
