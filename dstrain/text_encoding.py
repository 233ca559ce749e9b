"""What bytes that are not UTF-8 may be, and the way to make UTF-8 of them."""

from __future__ import annotations

import re

_CONVERT = "save it as UTF-8"
_HIGH = re.compile(rb"[\x80-\xff]+")
# Of Windows-1252, which has ISO-8859-1's too; without Icelandic's letters, which other encodings have others for.
_LETTERS = set(b"\x8a\x8c\x8e\x9a\x9c\x9e\x9f") | set(range(0xC0, 0x100)) - set(
    b"\xd0\xd7\xdd\xde\xf0\xf7\xfd\xfe"
)
_SIGNS = set(b"\x80\x82\x84\x85\x8b\x91\x92\x93\x94\x95\x96\x97\x99\x9b\xd7\xf7") | set(range(0xA0, 0xC0))
_INSIDE_WORDS = set(b"\x91\x92\x96\x97\xa0\xb4\xb7")  # apostrophes, dashes
_MOST_LOOKED_AT = 2**16


def way_to_utf8(content: bytes, place: int, *, more_is_utf8: bool = False) -> str:
    """The hint for a text with bytes that are none of UTF-8.

    An encoding is named only where the bytes look like it: with a wrong one, iconv spoils the text and says nothing.

    Args:
        content: of the text, as far as it was read.
        place: of the first byte that is none of UTF-8.
        more_is_utf8: characters beyond ASCII stand in front of ``content``, in UTF-8.
    """
    begin = max(place - _MOST_LOOKED_AT // 2, 0)
    begin = content.rfind(b"\n", 0, begin) + 1 if b"\n" in content[:begin] else begin
    near = content[begin : begin + _MOST_LOOKED_AT]
    if more_is_utf8 or _is_mostly_utf8(near):
        return "the rest is UTF-8: write it again from its source, or drop such bytes: iconv -c -f UTF-8 -t UTF-8"
    if _looks_western(near):
        return f"{_CONVERT}; it looks like Western European text: iconv -f WINDOWS-1252 -t UTF-8"
    return (
        f"{_CONVERT}: iconv -f ENCODING -t UTF-8, with the encoding that it was written in"
        " (GB18030, SHIFT_JIS, WINDOWS-1251, ...)"
    )


def _is_mostly_utf8(content: bytes) -> bool:
    """A few bytes of it are damaged, or of another text. By chance, two bytes of another encoding may be UTF-8."""
    valid = content.decode("utf-8", "ignore")
    characters = sum(not sign.isascii() for sign in valid)
    other = len(content) - len(valid.encode("utf-8"))
    return characters > 2 * other


def _looks_western(content: bytes) -> bool:
    """Each byte beyond ASCII is a letter or a sign of Western European languages, and stands where such a one does."""
    for found in _HIGH.finditer(content):
        signs = set(found[0]) - _LETTERS
        inside = content[: found.start()][-1:].isalpha() and content[found.end() :][:1].isalpha()
        letters = sum(byte in _LETTERS for byte in found[0])
        if letters > 2 or not signs <= (_INSIDE_WORDS if inside else _SIGNS):
            return False
    return True
