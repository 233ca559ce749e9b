"""The memory verdict of a plan: whether its ranks fit into device memory."""

from __future__ import annotations

from collections.abc import Sequence

from dstrain.estimate.memory import USABLE, StageMemory
from dstrain.planning.layout import Layout

TIGHT = 0.9
"""Above this fraction of what may be filled it is tight: the estimate is not exact, and memory gets fragmented."""


def memory_needed(layout: Layout, needs: Sequence[StageMemory], accelerator: str) -> tuple[int, int]:
    """Bytes needed of one device's memory, and the stage that needs most; on CPUs of a host's, by all its ranks."""
    fullest = max(range(len(needs)), key=lambda stage: needs[stage].total)
    if accelerator != "cpu":
        return needs[fullest].total, fullest
    sums = [0] * len(layout.hosts)
    for rank in range(layout.world_size):
        sums[layout.host(rank)] += needs[layout.stage(rank)].total
    return max(sums), fullest


def memory_verdict(
    layout: Layout, needs: Sequence[StageMemory], memory_bytes: int | None, accelerator: str
) -> str:
    """``fits``, ``tight`` or ``does not fit``, and by how much; empty where the memory is not known."""
    if memory_bytes is None:
        return ""
    needed, fullest = memory_needed(layout, needs, accelerator)
    usable = USABLE * memory_bytes
    who = f"a rank of stage {fullest} needs" if layout.pipeline > 1 else "a rank needs"
    if accelerator == "cpu" and layout.world_size > 1:
        who = "the ranks of a host need"
    sum_ = f"{who} about {_gb(needed)} of the {_gb(usable)} that can be filled of {_gb(memory_bytes)}"
    if needed > usable:
        return f"does not fit: {sum_}, {_gb(needed - usable)} too much"
    left = f"{sum_}, {_gb(usable - needed)} to spare"
    return f"tight: {left}" if needed > TIGHT * usable else f"fits: {left}"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
