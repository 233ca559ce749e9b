"""The way out for bytes that are not UTF-8: an encoding is named only where they look like it."""

from __future__ import annotations

import pytest

from dstrain.text_encoding import way_to_utf8

WESTERN, OTHER, DAMAGED = "iconv -f WINDOWS-1252 ", "iconv -f ENCODING ", "iconv -c -f UTF-8 "
TEXTS = {
    "French": ("café, été, cœur, ça", "cp1252", WESTERN),
    "German": ("Größe: 5 µm ± 3 °C", "iso8859-1", WESTERN),
    "Portuguese": ("ação, não", "iso8859-1", WESTERN),
    "English, with signs of Windows": (
        "it\u2019s \u201cquoted\u201d \u2013 really\u2026 5 \u20ac",
        "cp1252",
        WESTERN,
    ),
    "Polish": ("zażółć gęślą jaźń", "iso8859-2", OTHER),
    "Polish, of Windows": ("łódź jest dużym miastem", "cp1250", OTHER),
    "Turkish": ("ışık, değil", "iso8859-9", OTHER),  # noqa: RUF001
    "Russian": ("Привет, мир", "cp1251", OTHER),
    "Russian, KOI8": ("Привет, мир", "koi8-r", OTHER),
    "Greek": ("Ελληνικά", "iso8859-7", OTHER),
    "Hebrew": ("שלום", "cp1255", OTHER),
    "Japanese": ("日本語の文章です。", "shift-jis", OTHER),
    "Japanese in English": ("a テスト of words", "shift-jis", OTHER),
    "Japanese, EUC": ("日本語の文章です。", "euc-jp", OTHER),
    "Chinese": ("这是一个中文文本", "gb18030", OTHER),
    "Chinese, traditional": ("這是一個中文文本", "big5", OTHER),
    "Korean": ("한국어 문장", "euc-kr", OTHER),
}


def way(content: bytes, *, more_is_utf8: bool = False) -> str:
    with pytest.raises(UnicodeDecodeError) as error:
        content.decode()
    return way_to_utf8(content, error.value.start, more_is_utf8=more_is_utf8)


@pytest.mark.parametrize("name", TEXTS)
def test_an_encoding_is_named_where_the_bytes_look_like_it(name: str) -> None:
    text, encoding, wanted = TEXTS[name]
    assert wanted in way(text.encode(encoding))
    assert wanted in way(b"a line of ASCII\n" * 10_000 + (f"{text}\n" * 20).encode(encoding))


def test_a_text_in_utf8_with_a_damaged_byte_is_not_converted() -> None:
    text = "größe, 日本語\n".encode() * 20
    assert DAMAGED in way(text + b"caf\xe9\n" + text)
    assert DAMAGED in way(text[:-3])
    assert DAMAGED in way(b'{"text": "caf\xe9"}\n', more_is_utf8=True)
    assert WESTERN in way(b'{"text": "caf\xe9"}\n')


def test_what_lies_far_from_the_place_is_not_looked_at() -> None:
    assert WESTERN in way(b"caf\xe9\n" + b"a" * 2**17 + "Привет".encode("cp1251"))
