"""A signal to `dstrain run` on one host, while its ranks on two hosts start, train or save."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.runs.checkpoint.manifest import complete_checkpoints, half_written
from dstrain.runs.run_folder import RunFolder, last_step
from tests.support.cluster.commands import dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.runs import END_SECONDS
from tests.support.cluster.waiting import wait_until

pytestmark = pytest.mark.timeout(400)

ARGUMENTS = [
    *(
        "--model",
        "model",
        "--data",
        "text.jsonl",
        "--tokenizer",
        "bytes",
        "--zero",
        "1",
        "--data-parallel",
        "2",
    ),
    *(
        "--seq-len",
        "32",
        "--global-batch",
        "4",
        "--micro-batch",
        "2",
        "--steps",
        "100000",
        "--save-every",
        "5",
    ),
    *("--set", "sample_tokens=0", "--set", "eval_every=3", "--hostfile", "hosts"),
]
PHASES: dict[str, Callable[[RunFolder], bool]] = {
    "connecting": lambda folder: folder.launcher_log.exists(),
    "starting": lambda folder: folder.read_status(1) is not None,
    "training": lambda folder: last_step(folder.metrics) >= 2,
    "saving": lambda folder: bool(half_written(folder.checkpoints)),
}
SAVED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GO_ON = (signal.SIGPIPE, signal.SIGTSTP)
_number = itertools.count()


def interrupt(
    cluster: Cluster, environment: dict[str, str], place: Path, phase: str, number: signal.Signals
) -> None:
    (place / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    name = f"{phase}-{number.name}-{next(_number)}"
    folder = RunFolder(place / "runs" / name)
    argv = dstrain_argv("run", *ARGUMENTS, "--name", name)
    command = cluster.start("n1", argv, env=environment, cwd=place)
    wait_until(lambda: PHASES[phase](folder) or not command.running(), 120, what=phase)
    assert command.running(), command.wait(1)
    command.send_signal(number)
    if number in GO_ON:
        if number == signal.SIGTSTP:
            command.send_signal(signal.SIGCONT)
        step = last_step(folder.metrics)
        wait_until(lambda: last_step(folder.metrics) > step + 2, 60, what="that the run goes on")
        command.send_signal(signal.SIGINT)
    said = command.wait(2 * END_SECONDS)
    assert "Traceback" not in said.err + said.out, said
    wait_until(
        lambda: not [each for host in cluster.names for each in cluster.processes(host)],
        END_SECONDS,
        what="the end of all processes",
    )
    if number == signal.SIGQUIT:
        assert said.code == 131, said
    else:
        assert said.code == 75, said
        assert complete_checkpoints(folder.checkpoints) and not half_written(folder.checkpoints), said


def test_the_end_at_once(cluster: Cluster, environment: dict[str, str], shared_place: Path) -> None:
    interrupt(cluster, environment, shared_place, "training", signal.SIGQUIT)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("phase", PHASES)
def test_every_signal(cluster: Cluster, environment: dict[str, str], shared_place: Path, phase: str) -> None:
    for number in (*SAVED, *GO_ON, signal.SIGQUIT):
        interrupt(cluster, environment, shared_place, phase, number)
