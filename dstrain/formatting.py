"""Text that people read: numbers in words, and nothing for the terminal to carry out."""

from __future__ import annotations

import re

# Control characters but newline and tab, line and paragraph separators, halves of characters, and what reverses the
# direction of text (Unicode Annex 9).
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]"
)


def plain(text: str) -> str:
    """``text`` for a terminal: whatever it would carry out, or use to show something else, is written as an escape."""
    return _ACTIVE.sub(lambda found: ascii(found.group())[1:-1], text)


def format_count(number: int, noun: str) -> str:
    """``1 stage``, ``1,000 stages``."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def format_bytes(size: float) -> str:
    """Bytes as people read them: three digits, and more only of terabytes."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.0f} TB" if size >= 100 else f"{size:.3g} TB"
