"""``dstrain verify``: the same config in one process and in other layouts, and how far they are apart."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dstrain.cli.options import choices, given, layers
from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from rich.console import Console

    from dstrain.api.planning import Planned
    from dstrain.config.loader import ResolvedConfig
    from dstrain.planning.layout_choice import LayoutChoice
    from dstrain.runs.run_folder import RunFolder

# fp32 agrees to this at least; more only where one process itself spreads further.
FLOOR = 1e-5


@click.command("verify")
@layers
@choices
@click.option(
    "--layouts", metavar="A,B,..", help="Such as zero2-pp4,zero1-pp2-dp2. Default: all that --ranks hold."
)
@click.option("--ranks", type=click.IntRange(1), help="Ranks of the layouts. Default: the GPUs; 4 on CPU.")
@click.option(
    "--tiny", is_flag=True, help="Shrink the model to a few small blocks, and samples to 64 tokens."
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
    """Train your config in one process and in other layouts, and compare every step and the last weights.

    Each layout is a real, launched run of --steps steps (default 8). The table goes to verify.json and
    verify.md in the runs folder too. Exit code 1 when a layout trains another model.
    """
    from rich.console import Console

    from dstrain.api.tiny_model import shrink_model
    from dstrain.config.loader import load_config, override
    from dstrain.launch.devices import local_devices
    from dstrain.planning.layout_choice import LayoutChoice, layouts_for

    console = Console()
    chosen = {"steps": 8} | given(flags)
    resolved = load_config(recipe=recipe, config_file=config_file, settings=settings, flags=chosen)
    folder = Path(resolved.config.runs_dir) / f"verify-{time.strftime('%Y-%m-%d-%H%M%S')}"
    quiet = {"eval_every": 0, "sample_tokens": 0, "save_every": 0, "save_weights": True, "check_every": 1}
    quiet |= {"runs_dir": str(folder)}
    quiet |= {"hostfile": None, "launcher": "local", "nodes": None, "processes": None}
    if tiny:
        quiet |= {
            "model": str(shrink_model(resolved, folder / "model")),
            "seq_len": min(64, resolved.config.seq_len),
        }
    resolved = override(resolved, quiet)
    precision = resolved.config.precision
    wanted = (
        list(dict.fromkeys(LayoutChoice.parse(name) for name in layouts.split(",")))
        if layouts
        else layouts_for(ranks or local_devices().count or 4, precision)
    )
    for choice in wanted:
        refusal = choice.refusal(precision)
        if refusal:
            raise DstrainError(f"{choice.name}: {refusal.reason}", where="--layouts", hint=refusal.instead)
    verify(resolved, wanted, folder, console)


def verify(resolved: ResolvedConfig, wanted: list[LayoutChoice], folder: Path, console: Console) -> None:
    """Run the references and the layouts, print and write the table. Raises DstrainError if one differs."""
    from dstrain.planning.layout_choice import LayoutChoice
    from dstrain.report.comparison import bound_from, compare_runs

    config = resolved.config
    alone = LayoutChoice(zero=0 if config.precision == "fp32" else 1)
    sizes = _micro_batches(config.global_batch, config.micro_batch)
    console.print(f"{config.model}, {config.precision}, {config.steps} steps; runs in {folder}")
    references = []
    for size in sizes:
        console.print(f"one process, micro-batches of {size} ...")
        planned, reference = _plan(resolved, alone, {"micro_batch": size}, f"one-process-micro-batch-{size}")
        if planned.plan.model.dropout:
            raise DstrainError(
                "the model drops activations at random, and which ones depends on the layout",
                where=str(resolved.origin("model")),
                hint="set the dropout probabilities in its config.json to 0 to compare layouts",
            )
        run, _ = _train(planned, reference)
        references.append(run)
    bound = bound_from(references, FLOOR)
    rows = []
    for choice in wanted:
        console.print(f"{choice.name} ...")
        try:
            planned, layout_config = _plan(resolved, choice, {}, choice.name)
        except DstrainError as error:  # this model, batch or machine can't have the layout
            rows.append({"layout": choice.name, "verdict": f"refused: {error.message}", "seconds": 0.0})
            continue
        run, seconds = _train(planned, layout_config)
        found = compare_runs(run, references[0])
        verdict = "equal" if found.within(bound) else "DIFFERS"
        rows.append(
            {"layout": choice.name, **asdict(found), "verdict": verdict, "seconds": round(seconds, 1)}
        )
    _write(folder, rows, asdict(bound), console)
    differing = [row["layout"] for row in rows if row["verdict"] == "DIFFERS"]
    if all(row["verdict"].startswith("refused") for row in rows):
        raise DstrainError("none of the layouts could be tried", where="--layouts", hint=rows[0]["verdict"])
    if differing:
        raise DstrainError(f"not the model that one process trains: {', '.join(differing)}", exit_code=1)


def _micro_batches(global_batch: int, wanted: int | None) -> list[int]:
    """Three sizes for one process: the sums of a step in three orders."""
    divisors = [size for size in range(1, global_batch + 1) if global_batch % size == 0 and size <= 32]
    first = wanted if wanted in divisors else divisors[len(divisors) // 2]
    return [first, *[size for size in divisors if size != first][:2]]


def _plan(
    resolved: ResolvedConfig, choice: LayoutChoice, more: dict[str, Any], name: str
) -> tuple[Planned, ResolvedConfig]:
    from dstrain.api.planning import plan_for
    from dstrain.config.loader import override

    config = override(resolved, choice.flags() | {"name": name} | more)
    return plan_for(config), config


def _train(planned: Planned, config: ResolvedConfig) -> tuple[RunFolder, float]:
    """Run a plan to its end; the run folder, and how many seconds it took."""
    from dstrain.api.execute import execute_quietly
    from dstrain.api.preflight import new_run_folder

    folder = new_run_folder(config, resume=False)
    began = time.monotonic()
    execute_quietly(planned, config, folder)
    return folder, time.monotonic() - began


def _write(folder: Path, rows: list[dict[str, Any]], bound: dict[str, float], console: Console) -> None:
    """The table on the terminal, as JSON and as Markdown."""
    from rich.table import Table

    from dstrain.files import write_atomically, write_json

    columns = ("layout", "loss", "grad_norm", "weights", "verdict", "seconds")
    allowed = {"layout": "allowed", **bound, "verdict": "", "seconds": ""}
    cells = [[_cell(row.get(column, "")) for column in columns] for row in [*rows, allowed]]
    table = Table(title="largest relative differences from one process")
    for column in columns:
        table.add_column(column)
    for row in cells:
        table.add_row(*row)
    console.print(table)
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(row)} |" for row in cells]
    lines += ["", "Allowed: 1e-5, or twice the spread of one-process runs with other micro-batches."]
    write_json(folder / "verify.json", {"bound": bound, "layouts": rows})
    write_atomically(folder / "verify.md", "\n".join(lines) + "\n")
    console.print(f"written to {folder / 'verify.json'} and verify.md", soft_wrap=True)


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) and value < 0.1 else str(value)
