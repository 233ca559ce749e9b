"""The process between supervisor and launcher that makes sure nothing outlives a run.

DeepSpeed's launcher leaves its ranks behind when it is killed, and they belong to nobody then. The subreaper
leads the run's session and is the parent of whatever is orphaned in it (PR_SET_CHILD_SUBREAPER). It holds
the read end of a pipe whose other end only the supervisor has: when that ends, by whatever signal, the run
ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import FrameType

from dstrain.runs.this_machine import Process
from dstrain.stop_signals import heeded
from dstrain.supervise.process_tree import family, kill, signal_name

_PR_SET_CHILD_SUBREAPER = 36
LEFT_BEHIND = "dstrain: the launcher ended before its ranks"
_POLL_SECONDS = 0.1
_ORPHAN_SECONDS = 5.0
# For ranks of other hosts to end with their connections, and their launchers with them.
_CONNECTION_SECONDS = 10.0
_TERMINATE, _LET_END = "terminate", "let-end"


def guarded(command: list[str], *, terminate: bool = True) -> list[str]:
    """``command`` run under a subreaper. To be started as a session leader, with a pipe as its standard input.

    ``terminate``: whether the launcher may get a SIGTERM, as `supervisor.supervise` has it.
    """
    # -I: the subreaper itself takes nothing from PYTHONPATH or the current folder; what it starts still does.
    root = str(Path(__file__).resolve().parents[2])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); "
        "from dstrain.supervise.subreaper import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-I", "-c", code, _TERMINATE if terminate else _LET_END, *command]


def main(arguments: list[str]) -> int:
    """Run a command (all but the first argument), wait until all it started is gone, return its exit code (128 + N
    for a signal)."""
    terminate, command = arguments[0] == _TERMINATE, arguments[1:]
    stopping = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True  # the whole group got the signal: wait for its ranks, however long they take

    def ignore(number: int, frame: FrameType | None) -> None:
        pass

    signal.signal(signal.SIGTERM, stop)
    # Not SIG_IGN, which the launcher would inherit: a handler ends at exec. What the caller ignores stays ignored.
    for number in heeded((signal.SIGINT, signal.SIGHUP)):
        signal.signal(number, ignore)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        launcher = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"dstrain: {command[0]} can't be started: {error.strerror}", file=sys.stderr)
        return 127
    code: int | None = None
    deadline: float | None = None  # when what is left gets killed
    while True:
        code = _reap(launcher, code)
        left = family(os.getpid()) if code is not None else []
        if code is not None and not left:
            return code
        if deadline is not None:
            if time.monotonic() > deadline:
                _signal_all(signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        elif code is not None and not stopping:
            now = datetime.now().astimezone().isoformat(timespec="milliseconds")
            print(f"{LEFT_BEHIND} ({_how(launcher)}, {len(left)} processes left) at {now}", flush=True)
            _signal_all(signal.SIGTERM)
            deadline = time.monotonic() + _ORPHAN_SECONDS
        elif (gone := _supervisor_is_gone()) and not terminate:
            deadline = time.monotonic() + _CONNECTION_SECONDS
        elif gone or (code is not None and _only_strays(left)):
            # Nobody waits for the run any more, or all that were told to stop have.
            _signal_all(signal.SIGTERM)
            deadline = time.monotonic() + _ORPHAN_SECONDS


def _how(launcher: subprocess.Popen[bytes]) -> str:
    if launcher.returncode < 0:
        return f"killed by {signal_name(-launcher.returncode)}"
    return f"exit code {launcher.returncode}"


def _only_strays(left: list[Process]) -> bool:
    """Whether none but processes of other sessions are left, which the stop of the group did not reach."""
    return all(process.session != os.getpid() for process in left)


def _reap(launcher: subprocess.Popen[bytes], code: int | None) -> int | None:
    """Collect ended orphans and the launcher; the launcher's exit code once it is known."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == launcher.pid:
            ended = os.waitstatus_to_exitcode(status)
            launcher.returncode = ended
            code = ended if ended >= 0 else 128 - ended


def _supervisor_is_gone() -> bool:
    """Wait one poll for the end of the pipe."""
    readable, _, _ = select.select([sys.stdin], [], [], _POLL_SECONDS)
    return bool(readable) and os.read(sys.stdin.fileno(), 1) == b""


def _signal_all(number: signal.Signals) -> None:
    for process in family(os.getpid()):
        kill(process, number)
