"""A python program that a test starts: a fork of one that has imported everything."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import tests.support.distributed.workers  # noqa: F401  sets the environment of the fork server, and what it imports
from tests.support.forking.becoming import become, is_python

HOOK = Path(__file__).with_name("hook")
"""A folder for PYTHONPATH: with it, commands on the hosts of tests/cluster are forks, and ranks are."""

_CONTEXT = multiprocessing.get_context("forkserver")
_NAMESPACES = ("net", "uts", "ipc", "pid", "mnt")

_Self = TypeVar("_Self", bound="Program")


class Program:
    """``python -m MODULE ...`` or ``python -c CODE ...``; leads a session, and has no standard input.

    Args:
        argv: begins with this python (``sys.executable``).
        cwd: the folder in which it starts.
        env: all of its environment.
        out, err: files for what it says, appended to; files of its own by default.
        host: number of a process, whose host it runs on (as with nsenter).

    Attributes:
        pid: its number; with ``host`` that of its parent, which entered the host and ends as it does.
    """

    def __init__(
        self,
        argv: Sequence[str | os.PathLike[str]],
        *,
        cwd: str | os.PathLike[str],
        env: Mapping[str, str],
        out: Path | None = None,
        err: Path | None = None,
        host: int | None = None,
    ) -> None:
        words = [os.fspath(word) for word in argv]
        if not is_python(words):
            raise ValueError(f"{words} is not this python with -m or -c")
        self.args = words
        self._folder = tempfile.TemporaryDirectory(prefix="program-")
        self._out = out or Path(self._folder.name) / "out"
        self._err = err or Path(self._folder.name) / "err"
        self._process = _CONTEXT.Process(
            target=_go_on,
            args=(words, os.fspath(cwd), dict(env), str(self._out), str(self._err), host),
            daemon=True,
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        """For a test that gives up: it runs no longer than that."""
        self.kill()

    @property
    def out(self) -> str:
        """What it said so far."""
        return _read(self._out)

    @property
    def err(self) -> str:
        return _read(self._err)

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; what it started and left behind is not waited for. Raises TimeoutError."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise TimeoutError(f"{self.args}: no end after {timeout} s\n{self.out[-3000:]}{self.err[-3000:]}")
        return code

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, where it runs yet, and wait for the end."""
        self.send_signal(signal.SIGKILL)
        self.wait(10)


def may_fork(environment: Mapping[str, str]) -> bool:
    """Whether its PYTHONPATH begins with `HOOK`. Behind another folder it does not count: that may hold other modules
    than those that were imported."""
    return environment.get("PYTHONPATH", "").split(os.pathsep)[0] == str(HOOK)


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _go_on(
    argv: list[str], place: str, environment: dict[str, str], out: str, err: str, host: int | None
) -> None:
    # Else it could not have children of its own.
    multiprocessing.current_process().daemon = False
    for standard, path in ((1, out), (2, err)):
        into = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(into, standard)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if host is not None:
        _enter(host)
    os.setsid()
    os.chdir(place)
    become(argv, environment)


def _enter(host: int) -> None:
    """Into the namespaces of a process; who returns is a child, since a process never changes its own number."""
    libc = ctypes.CDLL(None, use_errno=True)
    for handle in [os.open(f"/proc/{host}/ns/{kind}", os.O_RDONLY) for kind in _NAMESPACES]:
        if libc.setns(handle, 0):
            raise OSError(ctypes.get_errno(), "setns")
    child = os.fork()
    if child == 0:
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
        time.sleep(1)
    os._exit(code)
