"""``dstrain reproduce RUN``: repeats a run, and compares every step bit by bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dstrain.cli.options import GroupedOptions, choices, given, trust_option
from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from rich.console import Console

    from dstrain.api.reproducing import ReproduceResult
    from dstrain.runs.run_folder import RunFolder

DIFFERS = 1
_SHOWN = 12  # differences in full; there may be hundreds of packages


@click.command("reproduce", cls=GroupedOptions)
@click.argument("run")
@choices
@click.option(
    "--image",
    is_flag=False,
    flag_value="",
    metavar="[NAME]",
    help="Repeat it in the container image that RUN used, or in this one.",
)
@trust_option
def command(run: str, settings: tuple[str, ...], image: str | None, trust: bool, **flags: Any) -> None:
    """Repeat RUN (a run folder, or its name in runs/), and compare the two step by step.

    Bit-equal on the same kind of device; else the first number that differs, and what was recorded of RUN that is
    another now. Flags that are given change a choice on purpose. Exit code 1 when a number differs.
    """
    from dstrain.api.reproducing import reproduce
    from dstrain.api.resuming import find_run
    from dstrain.cli.showing.progress import ConsoleEvents
    from dstrain.cli.showing.tables import make_console

    if image is not None:
        _in_image(find_run(run), image, settings, given(flags), trust=trust)
    console = make_console()
    with ConsoleEvents(console, plans=False) as events:
        result = reproduce(run, changes=given(flags), settings=settings, trust=trust, events=events)
    _show(result, console)
    if result.stopped is not None:
        if result.deviation is not None:
            console.print(f"differs  {result.deviation}", soft_wrap=True)
        raise result.stopped
    if result.deviation is not None:
        raise DstrainError(
            str(result.deviation), where=result.again.name, hint=result.cause, exit_code=DIFFERS
        )


def _show(result: ReproduceResult, console: Console) -> None:
    """What was recorded that is another now; and, where no number differs, that all are equal."""
    for difference in result.differences[:_SHOWN]:
        console.print(f"differs  {difference}", soft_wrap=True)
    if len(result.differences) > _SHOWN:
        console.print(
            f"         and {len(result.differences) - _SHOWN} more: {result.again / 'reproduction.json'}",
            soft_wrap=True,
        )
    if result.equal:
        console.print(_equal(result), soft_wrap=True)


def _equal(result: ReproduceResult) -> str:
    repetition = result.repetition
    if repetition.of_run == repetition.of_again:
        return f"bit-equal: all {repetition.steps} steps of {result.run.name}"
    return (
        f"bit-equal: all {repetition.steps} steps that both runs have; {result.run.name} ends with step"
        f" {repetition.of_run}, and {result.again.name} with step {repetition.of_again}"
    )


def _in_image(
    folder: RunFolder, image: str, settings: tuple[str, ...], flags: dict[str, Any], *, trust: bool
) -> NoReturn:
    """Become the same command in a container. Raises DstrainError.

    Args:
        image: its name; empty: the one that the run was made in.
    """
    from dstrain.api.received import check_image
    from dstrain.api.reproducing import PATHS, changed_keys, recorded_image
    from dstrain.config.data_sources import paths_read
    from dstrain.config.origins import as_flags
    from dstrain.launch.container import in_image, refuse_unseen

    made_in, values = recorded_image(folder)
    if not image and made_in:
        check_image(folder, made_in, trust=trust)
    image = image or made_in or ""
    if not image:
        raise DstrainError(
            f"{folder.name} was not run in an image, or its image was not recorded (launch/docker.sh records it)",
            where="--image",
            hint="give --image NAME, or leave --image out to repeat the run with what is installed here",
        )
    try:
        run = Path(os.path.abspath(folder.path)).relative_to(Path.cwd())
    except ValueError:
        raise DstrainError(
            f"{folder.path} is not in the current folder, which is all that the container can see",
            where="--image",
            hint="change to the folder from which the run was started",
        ) from None
    changed = changed_keys(flags, settings)
    named = [
        (key, values[key])
        for key in PATHS
        if key != "data" and values.get(key) is not None and key not in changed
    ]
    read = {key: values.get(key) for key in ("data", "validation") if key not in changed}
    refuse_unseen([*named, *(("data", path) for path in paths_read({"data": None, **read}))])
    words = [
        "reproduce",
        str(run),
        *(["--trust"] if trust else []),
        *(word for setting in settings for word in ("--set", setting)),
    ]
    for key, value in flags.items():
        words += as_flags(key, value)
    argv, environment = in_image(image, words)
    os.execvpe(argv[0], argv, environment)
