"""Decoding and cleaning texts."""

import codecs
import re
import unicodedata

# A codec's name is stored with each row. If you change a function's result, raise the version in `identity.py`.
UTF8, GBK, GB18030, WINDOWS, LATIN = "utf-8", "gbk", "gb18030", "cp1252", "latin-1"

# Characters of a URL (RFC 3986), and Latin and Cyrillic letters, which browsers show unescaped. Chinese or Thai text
# follows a URL without a space, so it ends the URL. twitter-text has the same rule.
_IN_URL = r"!#-;=?-Z\[\]_a-z~À-ÖØ-öø-ɏЀ-ӿ"
_URL = re.compile(rf"https?[{_IN_URL}]+…?|https?…", re.IGNORECASE)  # "…" where Twitter cut a text within its link
_MENTION = re.compile(r"@[A-Za-z0-9_]+")
_HASHTAG = re.compile(r"#(\w+)")
_SPACE = re.compile(r"\s+")

_CONTROL = re.compile(rb"[\x00-\x08\x0b\x0e-\x1f]")
_FREQUENT = re.compile("[ -ɏ\u3000-ヿ一-鿿＀-\uffef]")  # Latin, kana and Chinese, with their punctuation
_COMMON = range(0xB0, 0xD8)  # first bytes of GBK's common characters
_SYMBOLS = range(0xA1, 0xA9)  # first bytes of its punctuation, full-width letters, accented letters and kana
# Signs that a text is not Western: a capital within a word, a bracket or a quote on the wrong side of a letter, or a
# character that no keyboard has.
_NOT_WESTERN = re.compile(
    r"[a-zß-öø-ÿšœž][À-ÖØ-ÞŠŒŽŸ]|[a-zA-ZÀ-ÿ][“„«‹¡¿‘‚£€¢]|[”»›™®ºª²³¼½¾´•][a-zA-ZÀ-ÿ]"
    r"|[^\x00-\x7fÀ-ÖØ-öø-ÿŠŒŽŸšœž“”‘’‚„«»‹›¡¿…–—\xa0€£¢¥§©®™°ºª²³¼½¾´·•]"
)


def decode_text(raw: bytes, encoding: str | None = None) -> tuple[str, str]:
    """Decode ``raw`` with ``encoding``, or with the first codec that fits.

    The codecs are UTF-8 (a byte order mark is dropped), GBK, GB18030, Windows-1252 and Latin-1. UTF-16 is recognised by
    its byte order mark or its control characters. Western text whose bytes are also valid GBK is read as Windows-1252.

    Returns
    -------
    text, codec : str, str

    Raises
    ------
    UnicodeDecodeError
        ``raw`` is not valid in ``encoding``.
    """
    if encoding is not None:
        return raw.decode(encoding), encoding
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and (text := _decoded(raw, "utf-16")) is not None:
        return text, "utf-16"
    if _CONTROL.search(raw) and (utf16 := _unmarked_utf16(raw)) is not None:
        return utf16
    if (text := _utf8(raw)) is not None:
        return text, UTF8
    for codec in (GBK, GB18030):
        text = _decoded(raw, codec)
        if text is not None and not _is_western(text, raw):
            return text, codec
    text = _decoded(raw, WINDOWS)
    return (raw.decode(LATIN), LATIN) if text is None else (text, WINDOWS)


def _decoded(raw: bytes, codec: str) -> str | None:
    try:
        return raw.decode(codec)
    except UnicodeDecodeError:
        return None


def _utf8(raw: bytes) -> str | None:
    """Decode UTF-8, even if the text was cut within its last character."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        whole = raw[: error.start]
        is_cut = error.reason == "unexpected end of data" and not whole.isascii()
        return whole.decode("utf-8-sig") if is_cut else None


def _unmarked_utf16(raw: bytes) -> tuple[str, str] | None:
    """Decode UTF-16 without a byte order mark: its bytes hold control characters, its text holds none."""
    if len(raw) % 2:
        return None
    is_utf8 = _utf8(raw) is not None
    candidates: list[tuple[int, int, str, str]] = []
    for codec in ("utf-16le", "utf-16be"):
        text = _decoded(raw, codec)
        if text is not None and all(letter.isspace() or unicodedata.category(letter)[0] != "C" for letter in text):
            zeros = raw[codec == "utf-16le" :: 2].count(0)  # high bytes of Latin letters, spaces and line breaks
            frequent = len(_FREQUENT.findall(text))
            is_likely = 2 * zeros >= len(text) if is_utf8 else zeros > 0 or 2 * frequent >= len(text)
            if is_likely:
                candidates.append((zeros, frequent, text, codec))
    return max(candidates)[2:] if candidates else None


def _is_western(text: str, raw: bytes) -> bool:
    """Whether ``text``, decoded as GBK or GB18030, is really Western text in Windows-1252.

    In GBK, an accented letter or a curly quote forms one character with the letter after it. So "grüßt" becomes rare
    Chinese characters. Real Chinese text has mostly common characters, whose bytes do not look like Western words.
    """
    if _decoded(raw, WINDOWS) is None:
        return False
    western = chinese = 0
    for run in re.finditer(r"[^\x00-\x7f]+", text):
        as_windows = run[0].encode(GB18030).decode(WINDOWS)
        around = text[max(run.start() - 1, 0) : run.start()] + as_windows + text[run.end() : run.end() + 1]
        encoded = [letter.encode(GB18030) for letter in run[0]]
        known = [
            (code[0] in _COMMON and code[1] >= 0x80) or (code[0] in _SYMBOLS and unicodedata.category(letter) != "Co")
            for letter, code in zip(run[0], encoded, strict=True)
        ]
        rare = len(known) - sum(known)
        chinese += sum(known)
        if _NOT_WESTERN.search(around):
            chinese += rare
        else:
            western += rare
    return western > chinese


def clean_text(text: str) -> str:
    r"""Drop URLs and mentions, unwrap hashtags, lower-case, collapse white space. Keep punctuation and emoji.

    Examples
    --------
    >>> clean_text("RT @ann: So #HappyDay!\n http://t.co/x1")
    'rt : so happyday!'
    >>> clean_text("http://t.cn/A6x今天天气真好")
    '今天天气真好'
    """
    text = _URL.sub(" ", text)
    text = _MENTION.sub(" ", text)
    text = _HASHTAG.sub(r"\1", text)
    return _SPACE.sub(" ", text).strip().lower()
