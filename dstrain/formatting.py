"""Human-readable numbers: counts, bytes."""

from __future__ import annotations


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
