"""Every file operation of every command fails once: one message with the place and the way out, and nothing is lost.

`tests.support.os_errors` finds the operations of a command in a run of it, and lets each of them fail.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.runs.checkpoint.manifest import complete_checkpoints
from dstrain.runs.run_folder import RunFolder, last_step
from tests.support.made_run import COMMANDS, MadeRun, make_run, one_error
from tests.support.os_errors import ERRNOS, Site, failing, sites, watched

# A command has its result before it removes what it needed for that; what can't be removed then stays.
_CLEANING = ("unlink", "rmdir", "list", "open to read", "stat")
# Of these the covering cells have all kinds of operations; the whole table takes minutes for each command.
_LIGHT = ("checkpoints", "generate", "export", "plan")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, materials: Path) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"), materials)


def sites_of(made: MadeRun, command: str) -> list[Site]:
    """The operations of a command that go on files of the user's, of the run's, or temporary ones."""
    log = made.place.parent / "log"
    log.unlink(missing_ok=True)
    made.restore()
    said = made.call(*COMMANDS[command], more=watched(made.place, log), cold=command == "plan", seconds=200)
    assert said.code == 0, said
    return [site for site in sites(log) if not site.module.startswith("deepspeed.")]


def complaints(made: MadeRun, command: str, site: Site, name: str) -> list[str]:
    """What is wrong with a command all of whose operations at a site fail with an errno."""
    log = made.place.parent / "log"
    log.unlink(missing_ok=True)
    made.restore()
    failure = failing(made.place, site, name, log)
    try:
        said = made.call(*COMMANDS[command], more=failure, cold=command == "plan")
    except TimeoutError as error:
        return [f"it hangs: {error}"]
    if not sites(log):
        return []  # it depends on the time whether the operation is needed
    wrong = []
    if said.code == 1 and "damaged: " in said.out:
        pass  # the table of `checkpoints` says it
    elif said.code == 0:
        if "Traceback" in said.err or "error: " in said.err:
            wrong.append("an error, and exit code 0")
    else:
        message = said.err[said.err.rfind("error: ") :]
        wrong += filter(None, [one_error(said)])
        # The folder above tells enough; what it has was read at once.
        parts = [part.strip(".") for part in site.path.split("*")[0].split("/") if part.strip(".")]
        parts = [part.removesuffix(".partial") for part in parts]
        if not any(part in message for part in parts or [made.place.name]):
            wrong.append("the message names no path")
        if os.strerror(getattr(errno, name)) not in message and not parts:
            wrong.append("the message gives no reason")
        if said.code == 2 and last_step(RunFolder(made.place / "runs" / "new").metrics):
            wrong.append("it has trained, and exit code 2 means that nothing was started")
    if site.call not in _CLEANING:
        wrong += [f"left: {path}" for path in made.left()]
    # A file that is not there, or is a link, is damage, and noted as such.
    gone = name in ("ENOENT", "ENOTDIR", "ELOOP") and "checkpoints/" in site.path
    if not gone and not complete_checkpoints(made.place / "runs" / "old" / "checkpoints"):
        wrong.append("the earlier checkpoint is lost")
    return [f"{command}: {site}: {name}: {each}\n{said.err[-1500:]}" for each in wrong]


def table(made: MadeRun, command: str, errnos: Callable[[int, Site], tuple[str, ...]]) -> list[str]:
    """What is wrong with a command whose n-th operation fails with each of the errnos that are chosen for it."""
    cells = [
        (site, name) for number, site in enumerate(sites_of(made, command)) for name in errnos(number, site)
    ]
    assert cells
    return [wrong for site, name in cells for wrong in complaints(made, command, site, name)]


def not_yet(seen: set[str]) -> Callable[[int, Site], tuple[str, ...]]:
    """The first operation of each kind that was not seen."""

    def choose(number: int, site: Site) -> tuple[str, ...]:
        if site.call in seen:
            return ()
        seen.add(site.call)
        return ERRNOS[site.call][number % len(ERRNOS[site.call]) :][:1]

    return choose


def test_an_operation_of_each_kind(made: MadeRun) -> None:
    """In `plan`, which begins with an empty cache and takes longest, those that no other command has."""
    wrong, seen = [], set()
    for command in _LIGHT:
        own: set[str] = set() if command != "plan" else seen
        wrong += table(made, command, not_yet(own))
        seen |= own
    assert not wrong, "\n".join(wrong)


# In the command line and in a rank, before the first step and behind the last.
_OF_A_RUN = [
    ("run", Site("dstrain.cli.main", "mkdir", "runs/new"), "EROFS"),
    ("run", Site("dstrain.cli.main", "stat", "runs/new/checkpoints/step-000002"), "EIO"),
    ("run", Site("dstrain.cli.main", "read", "runs/new/result.json"), "ESTALE"),
    ("run", Site("dstrain.train.worker", "read", "runs/new/plan.json"), "ESTALE"),
    ("run", Site("dstrain.train.worker", "write", "runs/new/.run-id.*.tmp"), "ENOSPC"),
    ("run", Site("dstrain.train.worker", "write", "runs/new/metrics.jsonl"), "EDQUOT"),
    ("run", Site("dstrain.train.worker", "rename", "runs/new/checkpoints/.step-*.partial"), "EIO"),
    ("run", Site("dstrain.train.worker", "rename", "runs/new/.result.json.*.tmp"), "EDQUOT"),
    (
        "resume",
        Site("dstrain.train.worker", "read", "runs/old/checkpoints/step-000002/zero_to_fp32.py"),
        "EIO",
    ),
    *(
        (command, Site(module, "open to read", "runs/old/checkpoints/step-000002/manifest.json"), "ELOOP")
        for command, module in (("export", "dstrain.exporting.convert"), ("resume", "dstrain.train.worker"))
    ),
]


@pytest.mark.parametrize(("command", "site", "name"), _OF_A_RUN, ids=str)
def test_an_operation_of_a_run(made: MadeRun, command: str, site: Site, name: str) -> None:
    wrong = complaints(made, command, site, name)
    assert sites(made.place.parent / "log"), "there is such an operation"
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", ("run", "resume"))
def test_every_operation(made: MadeRun, command: str) -> None:
    """With one errno each, which all have their turn."""
    wrong = table(
        made, command, lambda number, site: ERRNOS[site.call][number % len(ERRNOS[site.call]) :][:1]
    )
    assert not wrong, "\n".join(wrong)


@pytest.mark.full
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in ("run", "resume")])
def test_every_operation_with_every_errno(made: MadeRun, command: str) -> None:
    wrong = table(made, command, lambda number, site: ERRNOS[site.call])
    assert not wrong, "\n".join(wrong)
