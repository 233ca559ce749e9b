"""The layout as a picture: hosts x devices, and on each device its rank, stage, replica and layers."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from dstrain.formatting import format_count
from dstrain.planning.layout import Layout, Place
from dstrain.planning.plan import Plan

# More hosts and devices than these are alike: the first ones stand for them.
_HOSTS_SHOWN = 2
_DEVICES_SHOWN = 16
_CELL = 13  # columns of the terminal that a device takes: its border, a space on each side, ten letters
_BLOCK = "block "
# One stage has one colour on all hosts: what has the same colour holds the same layers.
_COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "white", "bright_cyan")


def picture(plan: Plan, console: Console) -> RenderableType:
    """Hosts downwards, devices from left to right; a host whose devices are too many for the line gets several."""
    layout = plan.layout
    places = list(layout.places())
    by_host = [[place for place in places if place.host == host.name] for host in layout.hosts]
    shown = by_host if len(by_host) <= _HOSTS_SHOWN + 1 else by_host[:_HOSTS_SHOWN]  # no "1 more host"
    width = max(len(host[0].host) for host in by_host)
    columns = _columns(len(by_host[0]), layout.pipeline, console.width - width - 4)
    parts: list[RenderableType] = [Text(_title(plan), style="bold")]
    parts += [_host(plan, host, columns, width) for host in shown]
    if len(shown) < len(by_host):
        last = by_host[-1]
        parts.append(
            Text(
                f"... and {format_count(len(by_host) - len(shown), 'more host')} like these, the last one"
                f" {last[0].host}"
                f" with the ranks {last[0].rank} to {last[-1].rank}"
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


def _columns(devices: int, pipeline: int, width: int) -> int:
    """Devices in a line: as many as fit, and whole pipelines where one fits."""
    fitting = max(1, min(devices, width // _CELL))
    return fitting - fitting % pipeline if pipeline < fitting < devices else fitting


def _host(plan: Plan, places: Sequence[Place], columns: int, width: int) -> RenderableType:
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=width)
    grid.add_column()
    shown = places[:_DEVICES_SHOWN]
    for start in range(0, len(shown), columns):
        name = Text(places[0].host if start == 0 else "", style="bold")
        grid.add_row(name, _devices(plan, shown[start : start + columns]))
    if len(shown) < len(places):
        grid.add_row("", f"... up to {plan.accelerator}:{places[-1].local_rank} with rank {places[-1].rank}")
    return grid


def _devices(plan: Plan, places: Sequence[Place]) -> Table:
    table = Table(box=box.SQUARE, show_header=True, header_style="dim")
    for place in places:
        table.add_column(f"{plan.accelerator}:{place.local_rank}", min_width=9, no_wrap=True)
    names = plan.model.layers
    rows = (
        [f"rank {place.rank}" for place in places],
        [f"stage {place.stage}" for place in places],
        [f"replica {place.replica}" for place in places],
        ["\n".join(_short(names, chunk) for chunk in place.chunks) for place in places],
    )
    for row in rows:
        table.add_row(
            *(Text(cell, style=_colour(place.stage)) for cell, place in zip(row, places, strict=True))
        )
    return table


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
        said.append("a replica's micro-batches go from stage to stage and back")
    if layout.data_parallel > 1:
        said.append("replicas add up the gradients of the same stage")
    if layout.world_size == 1:
        said.append("one process trains the whole model")
    return "; ".join(said)
