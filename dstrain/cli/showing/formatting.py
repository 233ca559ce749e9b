"""Formatting of durations, headings and layers in a plan."""

from __future__ import annotations

from collections.abc import Sequence

from dstrain.cli.showing.tables import Column, FoldingTable


def headed(heading: str, text: str, style: str = "bold") -> FoldingTable:
    """A text with its heading in front: ``batch  16 samples a step ...``; further lines stay beside the heading."""
    grid = FoldingTable(Column(style=style, least=7), Column(gives=True), gap=1)
    grid.add_row(heading, text)
    return grid


def format_layers(names: Sequence[str], chunk: range) -> str:
    """The layers of a chunk: ``embed .. block 7``."""
    first, last = names[chunk[0]], names[chunk[-1]]
    return first if first == last else f"{first} .. {last}"


def format_duration(seconds: float) -> str:
    """A time with the two units that matter: ``0.82 s``, ``3 min 20 s``, ``2 h 5 min``, ``12.4 days``."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if seconds < 2 * 86400:
        return f"{int(seconds) // 3600} h {int(seconds) % 3600 // 60} min"
    return f"{seconds / 86400:,.1f} days"
