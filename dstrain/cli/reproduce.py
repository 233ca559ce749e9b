"""``dstrain reproduce RUN``: the same run again, and whether every step has the same bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dstrain.cli.options import choices, given
from dstrain.errors import DstrainError

if TYPE_CHECKING:
    from dstrain.plan.run_folder import RunFolder

DIFFERS = 1


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

    Bit-equal on the same kind of device; else the first number that differs, and what was recorded of RUN that is
    another now. Flags that are given change a choice on purpose. Exit code 1 when a number differs.
    """
    from dstrain.cli.planning import plan_for
    from dstrain.cli.resume import find_run
    from dstrain.cli.running.execute import execute
    from dstrain.cli.running.repeating import choices_again
    from dstrain.cli.running.starting import new_run_folder, not_writable
    from dstrain.cli.showing.repetition import cause, show_repetition
    from dstrain.cli.showing.tables import make_console
    from dstrain.plan.run_folder import last_step, write_json
    from dstrain.record.record import first_launch, read_launches

    folder = find_run(run)
    launches = read_launches(folder)
    first = first_launch(launches, folder)
    if last_step(folder.metrics) == 0:
        raise DstrainError(
            "it has trained no step: there is nothing to compare with", where=str(folder.metrics)
        )
    if image is not None:
        _in_image(folder, image or first["image"], first["config"], settings, given(flags))
    resolved = choices_again(folder, first, given(flags), settings)
    again = new_run_folder(resolved, resume=False)
    console = make_console()
    planned = plan_for(resolved)
    console.print(
        f"{folder.name}, once more as {again.name}: {planned.plan.batch.in_words()}",
        soft_wrap=True,
        markup=False,
    )
    stopped = None
    try:
        execute(planned, resolved, again, console, dry_run=False)
    except DstrainError as error:  # what it has trained is compared all the same
        stopped = error
    if stopped is not None and last_step(again.metrics) == 0:
        raise stopped
    now = first_launch(read_launches(again), again)
    repetition, found = show_repetition(folder, again, first, now, console)
    record = {"of": folder.name, **repetition.to_record(), "differences": [str(one) for one in found]}
    try:
        write_json(again.reproduction, record)
    except OSError as error:
        raise not_writable(error, again) from error
    deviation = repetition.deviation
    if stopped is not None:
        if deviation is not None:
            console.print(f"differs  {deviation}", soft_wrap=True, markup=False, highlight=False)
        raise stopped
    if deviation is not None:
        hint = cause(deviation.step, launches, first, found)
        raise DstrainError(str(deviation), where=again.name, hint=hint, exit_code=DIFFERS)


def _in_image(
    folder: RunFolder,
    image: str | None,
    values: dict[str, Any],
    settings: tuple[str, ...],
    flags: dict[str, Any],
) -> NoReturn:
    """Become the same command in a container. Raises DstrainError."""
    from dstrain.cli.running.repeating import PATHS, changed_keys
    from dstrain.config.origins import as_flags
    from dstrain.launch.container import in_image, refuse_unseen

    if image is None:
        raise DstrainError(
            f"{folder.name} was not made in an image, or nobody told it in which (launch/docker.sh does)",
            where="--image",
            hint="--image NAME; or leave it out, and the run is repeated with what is installed here",
        )
    try:
        run = Path(os.path.abspath(folder.path)).relative_to(Path.cwd())
    except ValueError:
        raise DstrainError(
            f"{folder.path} is not below this folder, which is all that the container sees",
            where="--image",
            hint="change to the folder that the run was started from",
        ) from None
    changed = changed_keys(flags, settings)
    refuse_unseen({key: values[key] for key in PATHS if values[key] is not None and key not in changed})
    words = ["reproduce", str(run), *(word for setting in settings for word in ("--set", setting))]
    for key, value in flags.items():
        words += as_flags(key, value)
    argv, environment = in_image(image, words)
    os.execvpe(argv[0], argv, environment)
