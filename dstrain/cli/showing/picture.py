"""The layout as a picture: hosts and devices, each with its rank, stage, replica and layers."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SQUARE
from rich.console import Console, Group, RenderableType
from rich.text import Text

from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.formatting import format_count
from dstrain.planning.layout import Layout, Place
from dstrain.planning.plan import Plan

# More hosts and devices than these are alike: the first ones stand for them.
_HOSTS_SHOWN = 2
_DEVICES_SHOWN = 16
_LETTERS = 9  # of a device, at least
_BLOCK = "block "
# One stage has one colour on all hosts: what has the same colour holds the same layers.
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "white", "bright_cyan")


def picture(plan: Plan, console: Console) -> RenderableType:
    """Hosts downwards, devices from left to right; a host whose devices are too many for the line gets several."""
    layout = plan.layout
    places = list(layout.places())
    by_host = [[place for place in places if place.host == host.name] for host in layout.hosts]
    shown = by_host if len(by_host) <= _HOSTS_SHOWN + 1 else by_host[:_HOSTS_SHOWN]  # no "1 more host"
    cell = 3 + max(_LETTERS, *(len(line) for place in places for line in _lines(plan, place)))
    width = max(len(host[0].host) for host in by_host)
    # A name that leaves no room beside it for a device, or for a whole pipeline that would fit, stands above.
    beside = _columns(len(by_host[0]), layout.pipeline, (console.width - width - 2) // cell)
    below = _columns(len(by_host[0]), layout.pipeline, (console.width - 1) // cell)
    above = not beside or beside < min(layout.pipeline, below)
    parts: list[RenderableType] = [Text(_title(plan), style="bold")]
    for host in shown:
        parts += _host(plan, host, max(1, below if above else beside), 0 if above else width)
    if len(shown) < len(by_host):
        last = by_host[-1]
        parts.append(
            Text(
                f"... and {format_count(len(by_host) - len(shown), 'more host')} like these, the last one"
                f" {last[0].host}"
                f" with ranks {last[0].rank} to {last[-1].rank}"
            )
        )
    parts.append(Text(_legend(plan), style="dim"))
    return Group(*parts)


def _title(plan: Plan) -> str:
    layout = plan.layout
    ranks = f"{format_count(layout.pipeline, 'stage')} x {format_count(layout.data_parallel, 'replica')}"
    where = f"{format_count(len(layout.hosts), 'host')} x {format_count(layout.hosts[0].slots, 'device')}"
    return (
        f"{ranks} = {format_count(layout.world_size, 'rank')} on {where} ({plan.device or plan.accelerator})"
    )


def _columns(devices: int, pipeline: int, room: int) -> int:
    """Devices in a line: as many as there is room for, and whole pipelines where there is room for one."""
    fitting = max(0, min(devices, room))
    return fitting - fitting % pipeline if pipeline < fitting < devices else fitting


def _host(plan: Plan, places: Sequence[Place], columns: int, width: int) -> list[RenderableType]:
    """One host. ``columns``: devices in a line; ``width``: of its name, or 0 where that stands above."""
    name = Text(places[0].host, style="bold")
    shown = places[:_DEVICES_SHOWN]
    parts: list[RenderableType] = [
        _devices(plan, shown[start : start + columns]) for start in range(0, len(shown), columns)
    ]
    if len(shown) < len(places):
        parts.append(f"... up to {plan.accelerator}:{places[-1].local_rank} with rank {places[-1].rank}")
    if not width:
        return [name, *parts]
    grid = FoldingTable(Column(least=width), Column(), gap=1)
    for number, part in enumerate(parts):
        grid.add_row(name if number == 0 else "", part)
    return [grid]


def _devices(plan: Plan, places: Sequence[Place]) -> FoldingTable:
    """Devices side by side, as boxes."""
    blocks = [_lines(plan, place) for place in places]
    table = FoldingTable(*(Column(name, least=_LETTERS) for name, *_ in blocks), lines=SQUARE, head="dim")
    table.add_row(
        *(
            Text("\n".join(lines), style=_colour(place.stage))
            for (_, *lines), place in zip(blocks, places, strict=True)
        )
    )
    return table


def _lines(plan: Plan, place: Place) -> list[str]:
    """What stands in the box of a device, its name first."""
    return [
        f"{plan.accelerator}:{place.local_rank}",
        f"rank {place.rank}",
        f"stage {place.stage}",
        f"replica {place.replica}",
        *(_short(plan.model.layers, chunk) for chunk in place.chunks),
    ]


def _short(names: Sequence[str], chunk: range) -> str:
    """``embed-b7``, ``b8-b15``, ``b24-head``."""
    ends = [
        names[at].replace(_BLOCK, "b") for at in ((chunk[0], chunk[-1]) if len(chunk) > 1 else (chunk[0],))
    ]
    return "-".join(ends)


def _colour(stage: int) -> str:
    return _COLOURS[stage % len(_COLOURS)]


def _legend(plan: Plan) -> str:
    layout: Layout = plan.layout
    said = []
    if layout.pipeline > 1:
        said.append("each replica's micro-batches pass through the stages and back")
    if layout.data_parallel > 1:
        said.append("replicas of a stage sum their gradients")
    if layout.world_size == 1:
        said.append("one process trains the whole model")
    return "; ".join(said)
