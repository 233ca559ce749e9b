"""One attempt at a run: `dstrain run` or `dstrain resume`, its processes by their parts, and their end."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dstrain.runs.checkpoint.manifest import MANIFEST
from dstrain.runs.run_folder import RunFolder
from dstrain.runs.this_machine import Process, read_process
from dstrain.supervise.process_tree import family, kill
from tests.support.arguments import layered
from tests.support.forking import becoming
from tests.support.forking.program import Program
from tests.support.torture import in_rank

RANK, LAUNCHER, COMMAND, GUARD, ALL = "rank", "launcher", "command", "guard", "all"
_MODULES = {
    becoming.RANK: RANK,
    becoming.NODE_LAUNCHER: LAUNCHER,
    "deepspeed.launcher.runner": LAUNCHER,
    "dstrain.supervise.subreaper": GUARD,
}
# The guard waits 5 s for ranks that it has told to end, and the supervisor 10 s after a failure.
_END_SECONDS = 40.0
POLL_SECONDS = 0.002


class Attempt:
    """A started command, and all that belongs to it.

    Args:
        arguments: of ``dstrain``.
        place: the folder in which it is called.
        folder: of its run.
        number: from 1; its own output lies in ``attempt-<number>.log`` among the records.
        hindered: see `in_rank`.
        real: start real interpreters instead of forks; then nothing is recorded and nobody is hindered.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        place: Path,
        folder: RunFolder,
        number: int,
        hindered: dict[str, Any] | None = None,
        real: bool = False,
    ) -> None:
        self.folder = folder
        self.number = number
        records = place / "records" / folder.name
        records.mkdir(parents=True, exist_ok=True)
        self.output = records / f"attempt-{number}.log"
        # With real interpreters nothing is recorded, and the lines for the user are counted.
        self._told = folder.launcher_log if real else records / "rank-0.jsonl"
        self._step_sign = b"\nstep " if real else b"\n"
        self._told_before = self._told.stat().st_size if self._told.exists() else 0
        self._started = time.time_ns()
        environment = dict(os.environ) | {
            in_rank.RECORDS: str(records),
            in_rank.ATTEMPT: str(number),
            in_rank.HINDERED: json.dumps(hindered or {}),
            becoming.BEFORE_A_RANK: in_rank.__name__,
            "OMP_NUM_THREADS": "1",
        }
        self._roots: dict[int, Process] = {}  # the command and its guard: each leads a session
        self._seen: dict[int, Process] = {}
        command = [sys.executable, "-m", "dstrain.cli.main", *layered(arguments)]
        self._process: subprocess.Popen[bytes] | Program
        if real:
            with self.output.open("ab") as output:
                self._process = subprocess.Popen(
                    command,
                    cwd=place,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        else:
            self._process = Program(command, cwd=place, env=environment, out=self.output, err=self.output)
        self.pid: int = self._process.pid
        self._look()

    def exit_code(self) -> int | None:
        """Of the command itself; negative for a signal, None while it runs."""
        return self._process.poll()

    def parts(self) -> dict[str, list[Process]]:
        """The living processes by their parts in the run."""
        found: dict[str, list[Process]] = {}
        for process in self.left():
            part = COMMAND if process.pid == self.pid else _part(process.pid)
            if part is not None:
                found.setdefault(part, []).append(process)
        return found

    def steps(self) -> int:
        """How many steps this attempt has computed so far."""
        return _new_bytes(self._told, self._told_before).count(self._step_sign)

    def new_marks(self) -> set[str]:
        """What this attempt has made in ``checkpoints/``: see `_marks`."""
        return {mark for mark, moment in _marks(self.folder.checkpoints).items() if moment > self._started}

    def wait_until(self, sign: Callable[[], bool], seconds: float = 120.0) -> bool:
        """Whether the sign was seen; False where the command ended before.

        Raises:
            AssertionError: neither happened in that time.
        """
        deadline = time.monotonic() + seconds
        for poll in itertools.count():
            if sign():
                return True
            if self.exit_code() is not None:
                return sign()
            assert time.monotonic() < deadline, f"attempt {self.number} waits for something for {seconds} s"
            if poll % 50 == 0:
                self._look()
            time.sleep(POLL_SECONDS)
        raise AssertionError

    def wait(self, seconds: float = 120.0) -> int:
        """Wait for the end of the command; its exit code."""
        self.wait_until(lambda: self.exit_code() is not None, seconds)
        code = self.exit_code()
        assert code is not None
        return code

    def wait_a_moment(self, seconds: float) -> None:
        time.sleep(seconds)

    def kill_part(self, part: str, draws: random.Random) -> None:
        """SIGKILL to one process of a part, or to all processes. Where the part is done already, to the command."""
        parts = self.parts()
        if part == ALL:
            self.kill([process for processes in parts.values() for process in processes])
            return
        if part not in parts:
            words = [json.loads(path.read_text()) for path in self.folder.logs.glob("rank-*.status.json")]
            assert not any(word["state"] == "failed" for word in words), (
                f"it failed before {part} was killed: {words}"
            )
        self.kill([draws.choice(parts.get(part) or parts[COMMAND])])

    def kill(self, victims: Sequence[Process]) -> None:
        for process in victims:
            kill(process, signal.SIGKILL)

    def left(self) -> list[Process]:
        """What still runs of it. None of them is a stranger with the number of one that has ended."""
        self._look()
        return [process for process in self._seen.values() if _runs(process)]

    def _look(self) -> None:
        """Note all that belongs to it by now."""
        command = read_process(self.pid)
        if not self._roots and command is not None and self.exit_code() is None:
            self._roots[self.pid] = self._seen[self.pid] = command
        for root in list(self._roots.values()):
            now = read_process(root.pid)
            if now is None or now.start != root.start:
                continue
            for process in family(root.pid):
                self._seen[process.pid] = process
                if _part(process.pid) == GUARD:
                    self._roots[process.pid] = process

    def wait_until_all_have_ended(self) -> None:
        """The command, and all that it started: by themselves, as nobody helps.

        Raises:
            AssertionError: something goes on.
        """
        deadline = time.monotonic() + _END_SECONDS
        while left := self.left():
            told = {process.pid: _part(process.pid) for process in left}
            assert time.monotonic() < deadline, f"attempt {self.number} is dead, and {told} run on"
            time.sleep(POLL_SECONDS * 10)

    def end(self) -> None:
        """For a test that gives up: nothing is left running."""
        for _ in range(200):
            left = self.left()
            if not left:
                return
            self.kill(left)
            time.sleep(0.02)


def _runs(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.start == process.start and not now.zombie


def _new_bytes(path: Path, start: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(start)
            return file.read()
    except FileNotFoundError:
        return b""


def _part(pid: int) -> str | None:
    """What a process does in the run: by its arguments."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    for module, part in _MODULES.items():
        if f" -m {module} " in arguments or (part == GUARD and f"from {module} import" in arguments):
            return part
    return None


def _marks(checkpoints: Path) -> dict[str, int]:
    """How far saves have come, and when (nanoseconds since 1970): ``aside`` (one was begun), ``files`` (something
    lies in it), ``manifest``, ``named`` and ``removing`` (an old one)."""
    found: dict[str, int] = {}
    try:
        names = os.listdir(checkpoints)
    except FileNotFoundError:
        return found
    for name in names:
        folder = checkpoints / name
        if name.endswith(".partial"):
            _note(found, "aside", folder, "st_ctime_ns")
            _note(found, "manifest", folder / MANIFEST)
            for file in folder.glob("state/*"):
                _note(found, "files", file)
        elif name.endswith(".removed"):
            _note(found, "removing", folder, "st_ctime_ns")
        else:
            _note(found, "named", folder / MANIFEST)
    return found


def _note(found: dict[str, int], mark: str, path: Path, time_of: str = "st_mtime_ns") -> None:
    with suppress(OSError):  # gone meanwhile
        found[mark] = max(found.get(mark, 0), getattr(path.stat(), time_of))
