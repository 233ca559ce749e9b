"""``dstrain verify``: trains one config in one process and in other layouts, and compares them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.options import GroupedOptions, choices, given, layers
from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from rich.console import Console

    from dstrain.api.verifying import VerifyResult


@click.command("verify", cls=GroupedOptions)
@layers
@choices
@click.option(
    "--layouts",
    metavar="A,B,..",
    help="Layouts to compare, such as zero2-pp4,zero1-pp2-dp2. Default: all that --ranks allow.",
)
@click.option("--ranks", type=click.IntRange(1), help="Number of ranks. Default: one per GPU; 4 on CPU.")
@click.option(
    "--tiny", is_flag=True, help="Reduce the model to a few small blocks, and samples to 64 tokens."
)
def command(
    recipe: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    layouts: str | None,
    ranks: int | None,
    tiny: bool,
    **flags: Any,
) -> None:
    """Train your config in one process and in other layouts, and compare every step and the final weights.

    Each layout is a real, launched run of --steps steps (default 8). The table goes to verify.json and
    verify.md in the runs folder too. Exit code 1 when a layout trains another model.
    """
    from dstrain.api.planning import load_config
    from dstrain.api.verifying import verify
    from dstrain.cli.showing.progress import ConsoleEvents
    from dstrain.cli.showing.tables import make_console

    config = load_config(config_file, recipe=recipe, settings=settings, flags=given(flags))
    console = make_console()
    names = layouts.split(",") if layouts else None
    result = verify(config, layouts=names, ranks=ranks, tiny=tiny, events=ConsoleEvents(console))
    _show(result, console)
    if result.unwritten is not None:
        raise result.unwritten
    if result.equal:
        return
    verdicts = {row.layout: row.verdict for row in result.rows}
    if all(verdict.startswith("refused") for verdict in verdicts.values()):
        raise DstrainError("none of the layouts could be run", where="--layouts", hint=result.rows[0].verdict)
    differing = [layout for layout, verdict in verdicts.items() if verdict == "DIFFERS"]
    if differing:
        raise DstrainError(
            f"these layouts do not train the same model as one process: {', '.join(differing)}", exit_code=1
        )
    failed = [layout for layout, verdict in verdicts.items() if verdict.startswith("failed")]
    raise DstrainError(f"these layouts failed during training: {', '.join(failed)}", exit_code=1)


def _show(result: VerifyResult, console: Console) -> None:
    from rich.box import HEAVY_HEAD
    from rich.text import Text

    from dstrain.api.verifying import COLUMNS
    from dstrain.cli.showing.tables import Column, FoldingTable

    table = FoldingTable(
        *(Column(column, gives=column in ("layout", "verdict")) for column in COLUMNS), lines=HEAVY_HEAD
    )
    for row in result.cells():
        table.add_row(*row)
    console.print(Text("largest relative differences from the run in one process", style="bold"))
    console.print(table)
    if result.unwritten is None:
        console.print(Text(f"written to {result.folder / 'verify.json'} and verify.md"), soft_wrap=True)
