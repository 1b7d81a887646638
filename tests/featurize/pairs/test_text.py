import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmcli.featurize.pairs.text import clean_text, decode_text


@pytest.mark.parametrize(
    ("raw", "text", "codec"),
    [
        (b"plain", "plain", "utf-8"),
        ("gr\u00fcn \U0001f600".encode(), "gr\u00fcn \U0001f600", "utf-8"),
        ("\ufeffmark".encode(), "mark", "utf-8"),
        ("\u4f60\u597d".encode("gbk"), "\u4f60\u597d", "gbk"),
        ("\u20ac \U00020087".encode("gb18030"), "\u20ac \U00020087", "gb18030"),
        (b"caf\xe9", "caf\u00e9", "cp1252"),
        (b"caf\xe9 \x81", "caf\u00e9 \u0081", "latin-1"),
        ("wide".encode("utf-16"), "wide", "utf-16"),
        (b"\xff\xfe\x00", "\u00ff\u00fe\x00", "cp1252"),
        (b"", "", "utf-8"),
    ],
)
def test_decode(raw, text, codec):
    assert decode_text(raw) == (text, codec)


WESTERN = [
    "it’s a great day", "Müller grüßt aus Köln", "“yes” – 100 €", "élève modèle", "mañana, año, niño", "Größe",
    "déjà vu", "naïve café", "blåbærsyltetøy på brød", "ÜBER alles, Ärger, Öl", "¿qué tal, señor?", "¡Arriba!",
    "©Disney 2015", "£5 only", "20°C outside", "½ cup", "créée", "l’été", "São Paulo, ação", "Ça va, garçon",
    "smörgåsbord", "Škoda", "œuvre", "don’t… stop", "«bonjour»", "Señor Peña’s", "ñ", "é", "“",
    "they’re", "süße Öhrchen", "fiancée", "Noël", "Zoë’s jalapeño", "LIBERTÉ, ÉGALITÉ", "coöperate",
    "½ tasse d’œufs", "pâté • 3 €",
]  # fmt: skip
CHINESE = [
    "今天天气真好", "weather 你好 good", "好", "I爱you", "囧", "真的囧rz", "這個產品很好用", "繁體中文測試", "我是學生",
    "日本の夜", "…", "it’s", "café", "很差", "very 差", "鞋子不错", "颜色跟图片不一样", "囍", "a鑫b", "王珺", "“好”",
    "物流快，包装好！", "陈喆很好", "刘翀", "tiene listo el vídeo – “rumba”…", "http://t.cn/A6x今天", "價格 100 元，貴",
]  # fmt: skip


@pytest.mark.parametrize("text", WESTERN)
def test_western_text_in_windows_1252_is_not_read_as_chinese(text):
    assert decode_text(text.encode("cp1252"))[0] == text


@pytest.mark.parametrize("text", CHINESE)
def test_chinese_text_in_gbk_is_not_read_as_western(text):
    assert decode_text(text.encode("gbk")) == (text, "gbk")


@pytest.mark.parametrize("text", ["今天天气真好\n", "hello 你好", "hello\r\n", "très bon", "Ελληνικά και", "한국어 말"])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_byte_order_mark(text, codec):
    found, name = decode_text(text.encode(codec))
    assert (found, name) == (text, codec.replace("-l", "l").replace("-b", "b"))


@pytest.mark.parametrize("raw", [b"hello\x00", b"good \x07\x07", "你好\x07\x07".encode("gbk"), b"caf\xe9\x00\x00"])
def test_a_stray_control_character_does_not_make_text_utf16(raw):
    assert not decode_text(raw)[1].startswith("utf-16")


@pytest.mark.parametrize("cut", [1, 2])
def test_utf8_that_was_cut_within_its_last_character_stays_utf8(cut):
    assert decode_text("très bon 很好".encode()[:-cut]) == ("très bon 很", "utf-8")


def test_an_encoding_that_is_asked_for_is_taken():
    assert decode_text("привет".encode("cp1251"), "cp1251") == ("привет", "cp1251")
    with pytest.raises(UnicodeDecodeError):
        decode_text("привет".encode("cp1251"), "utf-8")


@given(st.binary())
def test_every_byte_string_decodes(raw):
    text, codec = decode_text(raw)
    assert codec in ("utf-8", "gbk", "gb18030", "cp1252", "latin-1", "utf-16", "utf-16le", "utf-16be")
    assert len(codec) <= 8  # what the cache has room for
    assert isinstance(text, str)


@given(st.text(st.characters(exclude_characters="\x00")))  # with zero bytes it may be UTF-16: "0\\x00" is "0" in both
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
        ("http://t.cn/A6x今天天气真好", "今天天气真好"),
        ("@ann今天天气真好", "今天天气真好"),
        ("@ann_1さん、https://t.co/Ab-9を見て", "さん、 を見て"),
        ("http://t.co/x，很好。http://t.co/y。", "，很好。 。"),
        ("http://t.co/สวัสดี", "สวัสดี"),
        ("http://de.wikipedia.org/wiki/Köln now", "now"),
        ("https://ru.wikipedia.org/wiki/Москва now", "now"),
        ('<a href="http://x.y/z?a=1&b=%20">HELLO</a>', '<a href=" ">hello</a>'),
        ("HTTPS://T.CO/X end", "end"),
        ("cut http://t.co/ab… and http… end", "cut and end"),
        ("mail ann@example.org", "mail ann .org"),
    ],
)
def test_clean(text, cleaned):
    assert clean_text(text) == cleaned


@given(st.text())
def test_cleaned_text_has_no_stray_space_and_cleaning_keeps_plain_words(text):
    cleaned = clean_text(text)
    assert cleaned == " ".join(cleaned.split())
    assert clean_text("word " + text).startswith("word")
