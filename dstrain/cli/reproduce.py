"""``dstrain reproduce RUN``: the same run again, and whether every step has the same bits."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dstrain.cli.options import choices, given
from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from rich.console import Console

    from dstrain.config.loader import ResolvedConfig
    from dstrain.plan.run_folder import RunFolder
    from dstrain.record.differences import Difference

DIFFERS = 1
_SHOWN = 12  # differences in full; there may be hundreds of packages


@click.command("reproduce")
@click.argument("run")
@choices
@click.option(
    "--image",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="In the container image that RUN was made in, or in this one.",
)
def command(run: str, settings: tuple[str, ...], image: str | None, **flags: Any) -> None:
    """Train RUN (a run folder, or its name below runs/) again beside it, and compare step by step.

    Bit-equal on the same kind of device; else the first step that differs, and what was recorded of RUN that is
    another now. Flags that are given change a choice on purpose. Exit code 1 when it differs.
    """
    from rich.console import Console

    from dstrain.cli.planning import plan_for
    from dstrain.cli.resume import find_run
    from dstrain.cli.running.execute import execute
    from dstrain.cli.running.starting import new_run_folder
    from dstrain.record.differences import differences
    from dstrain.record.record import read_launches

    folder = find_run(run)
    launches = read_launches(folder)
    first = _first_launch(launches)
    if image is not None:
        _in_image(folder, image or first["image"], settings, given(flags))
    resolved = _again(folder, first, given(flags), settings)
    again = new_run_folder(resolved, resume=False)
    console = Console()
    planned = plan_for(resolved)
    console.print(
        f"{folder.name}, once more as {again.name}: {planned.plan.batch.in_words()}", soft_wrap=True
    )
    execute(planned, resolved, again, console, dry_run=False)
    found = differences(first, _first_launch(read_launches(again)))
    _conclude(folder, again, found, launches, console)


def _in_image(
    folder: RunFolder, image: str | None, settings: tuple[str, ...], flags: dict[str, Any]
) -> NoReturn:
    """Become the same command in a container. Raises DstrainError."""
    from dstrain.launch.container import in_image

    if image is None:
        raise DstrainError(
            f"{folder.name} was not made in an image, or nobody told it in which",
            where="--image",
            hint="--image NAME; or leave it out, and the run is repeated with what is installed here",
        )
    try:
        run = folder.path.relative_to(Path.cwd())
    except ValueError:
        raise DstrainError(
            f"{folder.path} is not below this folder, which is all that the container sees",
            where="--image",
            hint="change to the folder that the run was started from",
        ) from None
    words = ["reproduce", str(run), *(word for setting in settings for word in ("--set", setting))]
    for key, value in flags.items():
        name = key.replace("_", "-")
        words += (
            [f"--{name}" if value else f"--no-{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    argv, environment = in_image(image, words)
    os.execvpe(argv[0], argv, environment)


def _first_launch(launches: list[dict[str, Any]]) -> dict[str, Any]:
    """The launch that trained the first steps: the last one that began with step 1."""
    return [launch for launch in launches if launch["first_step"] == 1][-1]


def _again(
    folder: RunFolder, first: dict[str, Any], flags: dict[str, Any], settings: tuple[str, ...]
) -> ResolvedConfig:
    """The run's own choices, those that followed from its machines included, under another name."""
    from dstrain.config.loader import override, read_config

    known = {
        "runs_dir": str(folder.path.parent),
        "name": _free_name(folder),
        "data_parallel": first["layout"]["data_parallel"],
        "micro_batch": first["batch"]["micro_batch"],
        "partition": _blocks(first["layout"]["cut"]),
    }
    resolved = read_config(folder.config)
    # A run that was resumed has the choices of its last launch in its config.
    began_with = {key: value for key, value in first["config"].items() if key not in known}
    if resolved.config.init == "random" and not Path(first["model"]["file"]).is_file():
        began_with["model"] = str(folder.model)
    return override(override(resolved, began_with | known), flags, settings)


def _blocks(cut: list[int]) -> str:
    """A cut as ``partition`` has it: the number of blocks of each span. One span: ``auto``."""
    if len(cut) == 2:
        return "auto"
    blocks = [end - start for start, end in itertools.pairwise(cut)]
    return ",".join(map(str, [blocks[0] - 1, *blocks[1:-1], blocks[-1] - 1]))


def _free_name(folder: RunFolder) -> str:
    names = (f"{folder.name}-again{f'-{number}' if number > 1 else ''}" for number in range(1, 10_000))
    return next(name for name in names if not (folder.path.parent / name).exists())


def _conclude(
    run: RunFolder,
    again: RunFolder,
    found: list[Difference],
    launches: list[dict[str, Any]],
    console: Console,
) -> None:
    """Say what came out. Raises DstrainError where the two runs differ."""
    from dstrain.plan.run_folder import write_json
    from dstrain.report.repetition import compare_bits

    repetition = compare_bits(run, again)
    write_json(
        again.path / "reproduction.json",
        {
            "of": run.name,
            "equal": repetition.equal,
            "steps": repetition.steps,
            "deviation": str(repetition.deviation) if repetition.deviation else None,
            "differences": [str(difference) for difference in found],
        },
    )
    for difference in found[:_SHOWN]:
        console.print(f"differs  {difference}", soft_wrap=True, markup=False, highlight=False)
    if len(found) > _SHOWN:
        console.print(
            f"         and {len(found) - _SHOWN} more: {again.path / 'reproduction.json'}", soft_wrap=True
        )
    if repetition.equal:
        console.print(f"bit-equal: all {repetition.steps} steps of {run.name}", soft_wrap=True)
        return
    if repetition.deviation is None:
        raise DstrainError(
            f"the {repetition.steps} steps that both have are bit-equal, and only one of them has step"
            f" {repetition.missing}",
            where=again.name,
            exit_code=DIFFERS,
        )
    raise DstrainError(
        str(repetition.deviation),
        where=again.name,
        hint=_cause(repetition.deviation.step, found, launches),
        exit_code=DIFFERS,
    )


def _cause(step: int, found: list[Difference], launches: list[dict[str, Any]]) -> str:
    if found:
        return f"what is another than then: {'; '.join(str(difference) for difference in found[:3])}"
    later = [launch for launch in launches if 1 < launch["first_step"] <= step]
    if later and later[-1].get("layout") != launches[0].get("layout"):
        return f"the run went on in another layout from step {later[-1]['first_step']} on, which adds in another order"
    return (
        "nothing that was recorded is another: a kernel that does not add in the same order each time;"
        " runs with --deterministic can be repeated to the bit"
    )
