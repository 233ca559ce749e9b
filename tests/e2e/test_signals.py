"""Every signal in every phase of every command: the exit code, what is saved, and that nothing outlives the command.

A phase is held at a file operation (`tests.support.os_errors`) until the signal has arrived.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstrain.runs.checkpoint.manifest import complete_checkpoints
from dstrain.runs.this_machine import read_process
from dstrain.supervise.process_tree import family
from tests.support.made_run import ARGUMENTS, COMMANDS, MadeRun, make_run
from tests.support.os_errors import Site, pausing, sites

RANK = "dstrain.train.worker"
RUN = ("run", "--name", "new", *ARGUMENTS)


@dataclass(frozen=True)
class Phase:
    """``command`` is held at ``site``; ``trains``: ranks run, and can save."""

    command: Sequence[str]
    site: Site
    trains: bool = False


PHASES = {
    "measuring": Phase(
        COMMANDS["plan"], Site("dstrain.model.measuring.measure", "open to read", "model/config.json")
    ),
    "tokenizing": Phase(
        COMMANDS["plan"], Site("dstrain.data.prepare", "open to write", "cache/data/*.unfinished/tokens.bin")
    ),
    "doctor": Phase(("doctor",), Site("dstrain.cli.main", "stat", "runs")),
    "starting": Phase(RUN, Site(RANK, "open to read", "model/config.json"), trains=True),
    "training": Phase(RUN, Site(RANK, "stat", "runs/new/stop"), trains=True),
    "validating": Phase(RUN, Site(RANK, "write", "runs/new/metrics.jsonl"), trains=True),
    "saving": Phase(
        (*RUN, "--steps", "6", "--save-every", "1"),
        Site(RANK, "fsync", "runs/new/checkpoints/.step-*.partial/manifest.json"),
        trains=True,
    ),
    "resuming": Phase(
        COMMANDS["resume"],
        Site(RANK, "open to read", "runs/old/checkpoints/step-000002/zero_to_fp32.py"),
        trains=True,
    ),
    "listing": Phase(
        COMMANDS["checkpoints"],
        Site("dstrain.cli.main", "open to read", "runs/old/checkpoints/step-000002/zero_to_fp32.py"),
    ),
    "exporting": Phase(
        COMMANDS["export"],
        Site("dstrain.exporting.convert", "open to write", ".out.partial/config.json"),
    ),
    "generating": Phase(
        COMMANDS["generate"], Site("dstrain.exporting.generate", "open to read", "exported/config.json")
    ),
}
WITHOUT_TRAINING = {
    signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGQUIT: 131, signal.SIGUSR1: 75,
    signal.SIGUSR2: 75, signal.SIGPIPE: 0, signal.SIGTSTP: 0,
}  # fmt: skip
WITH_TRAINING = WITHOUT_TRAINING | dict.fromkeys(
    (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2), 75
)
# Each signal with a phase of both kinds, each phase with a signal.
COVERING = [
    ("measuring", signal.SIGQUIT), ("tokenizing", signal.SIGUSR2), ("doctor", signal.SIGTERM),
    ("starting", signal.SIGHUP), ("training", signal.SIGQUIT), ("training", signal.SIGUSR2),
    ("validating", signal.SIGTSTP), ("saving", signal.SIGINT), ("resuming", signal.SIGTERM),
    ("listing", signal.SIGHUP), ("exporting", signal.SIGINT), ("exporting", signal.SIGTSTP),
    ("generating", signal.SIGPIPE), ("generating", signal.SIGUSR1),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, materials: Path) -> MadeRun:
    return make_run(tmp_path_factory.mktemp("made"), materials)


def interrupt(made: MadeRun, name: str, number: signal.Signals) -> None:
    """Send a signal in a phase; see what becomes of the command."""
    phase = PHASES[name]
    log = made.place.parent / "log"
    go = log.with_name("log.go")
    for path in (log, go):
        path.unlink(missing_ok=True)
    made.restore()
    cold = phase.command[0] == "plan"
    with made.start(*phase.command, more=pausing(made.place, phase.site, log), cold=cold) as command:
        until = time.monotonic() + 60
        while not sites(log):
            assert command.poll() is None and time.monotonic() < until, (command.out, command.err)
            time.sleep(0.02)
        children = family(command.pid)
        os.kill(command.pid, number)
        time.sleep(0.3)
        if number == signal.SIGTSTP:
            assert command.poll() is None
            os.kill(command.pid, signal.SIGCONT)
        go.touch()
        said = command.said(60)
    told = f"{name}, {number.name}: {said}"
    expected = (WITH_TRAINING if phase.trains else WITHOUT_TRAINING)[number]
    assert said.code == expected, told
    assert "Traceback" not in said.err + said.out, told
    for child in children:
        now = read_process(child.pid)
        assert now is None or now.zombie or now.start != child.start, f"{told}: {child} lives on"
    if number != signal.SIGQUIT or not phase.trains:
        assert not made.left(), told
    else:
        assert not [path for path in made.left() if path.startswith("tmp/")], told
    assert complete_checkpoints(made.place / "runs" / "old" / "checkpoints"), told
    if phase.trains and expected in (0, 75):
        folder = made.place / "runs" / ("old" if phase.command[0] == "resume" else "new")
        assert complete_checkpoints(folder / "checkpoints"), told


@pytest.mark.parametrize(("phase", "number"), COVERING)
def test_a_signal(made: MadeRun, phase: str, number: signal.Signals) -> None:
    interrupt(made, phase, number)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phase", PHASES)
def test_every_signal(made: MadeRun, phase: str) -> None:
    for number in WITHOUT_TRAINING:
        interrupt(made, phase, number)
