"""A command on a host, as its user would have it: what it says, how it ends, signals that reach it."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.arguments import layered
from tests.support.cluster.needs import tool
from tests.support.cluster.plain_path import plain_python
from tests.support.cluster.processes import children, leads_session, send
from tests.support.forking.becoming import is_python
from tests.support.forking.program import Program, may_fork

TWO_STAGES = (
    *(
        "run",
        "--model",
        "model",
        "--data",
        "text.jsonl",
        "--zero",
        "1",
        "--pipeline",
        "2",
        "--data-parallel",
        "1",
    ),
    *("--seq-len", "32", "--global-batch", "4", "--micro-batch", "2", "--set", "validation=0.2"),
)
"""A run of the tests' materials on two ranks, one of each stage."""


def dstrain_argv(*arguments: str) -> list[str]:
    """The command line of this checkout, with the python of the tests."""
    return [plain_python(), "-m", "dstrain.cli.main", *layered(arguments)]


@dataclass(frozen=True)
class Result:
    """How a command ended. ``code`` is negative for a signal, as in ``subprocess``; ``seconds`` it took."""

    code: int
    out: str
    err: str
    seconds: float

    def __str__(self) -> str:
        return f"exit code {self.code} after {self.seconds:.1f} s\n{self.out}{self.err}"


class Command:
    """A command that runs on a host. It has a session of its own there, and no standard input.

    What it says goes to files and not through pipes: a process that it leaves behind would hold a pipe open.
    """

    def __init__(
        self, host: str, first_process: int, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path
    ) -> None:
        self.host, self.argv = host, list(argv)
        self._out, self._err = log.with_suffix(".out"), log.with_suffix(".err")
        self._started = time.monotonic()
        if may_fork(env) and is_python(self.argv):
            self._nsenter: subprocess.Popen[bytes] | Program = Program(
                self.argv, cwd=cwd, env=env, out=self._out, err=self._err, host=first_process
            )
            return
        # Python passes on an ignored SIGINT, which a test run in the background has.
        enter = [tool("env"), "--default-signal=INT,QUIT", tool("nsenter"), "--target", str(first_process)]
        enter += ["--net", "--pid", "--uts", "--ipc", "--mount"]
        # nsenter's own --wd would stand in the folder as it is outside.
        settle = [tool("env"), f"--chdir={cwd}", tool("setsid")]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._nsenter = subprocess.Popen(
                [*enter, "--", *settle, *argv],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=dict(env),
                start_new_session=True,
            )

    @property
    def out(self) -> str:
        """What it said so far."""
        return self._out.read_text(errors="replace")

    @property
    def err(self) -> str:
        return self._err.read_text(errors="replace")

    def running(self) -> bool:
        return self._nsenter.poll() is None

    def wait(self, timeout: float) -> Result:
        """Wait for its end; what it started and left behind is not waited for.

        Raises:
            TimeoutError: it took longer than ``timeout`` seconds, and has been killed.
        """
        try:
            code = self._nsenter.wait(timeout)
        except (subprocess.TimeoutExpired, TimeoutError):
            self.kill()
            said = f"{self.out[-3000:]}{self.err[-3000:]}"
            raise TimeoutError(f"{self.argv} on {self.host}: no end after {timeout} s\n{said}") from None
        return Result(code, self.out, self.err, time.monotonic() - self._started)

    def send_signal(self, number: signal.Signals) -> None:
        """To the command alone, not to what it started."""
        deadline = time.monotonic() + 5
        while self.running() and time.monotonic() < deadline:
            # nsenter forks to enter the pid namespace: its only child is the command, or will be: until it leads
            # its session, it is one of the programs that settle it, and may ignore the signal.
            for child in children(self._nsenter.pid):
                if leads_session(child) and send(child, number, parent=self._nsenter.pid):
                    return
            time.sleep(0.005)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
        self._nsenter.wait(10)
