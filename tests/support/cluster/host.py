"""One host, from outside: its namespaces are made, it is told what it needs to know, it ends."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support.cluster.needs import tool
from tests.support.cluster.processes import children, in_namespace, pid_namespace

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where a login looks for programs."""

_FIRST_PROCESS = Path(__file__).with_name("first_process.py")
_NAMESPACES = ("--net", "--pid", "--uts", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc")
_START_SECONDS = 20.0


class Host:
    """A host that starts; :meth:`identify`, :meth:`plugged_in` and :meth:`wait_until_ready`, in this order, see to
    the rest. In between others can be started: that is why these are four.

    Attributes:
        first_process: its number on this machine.
        namespace: the name of the pid namespace.
        furniture: processes that belong to the host itself, by their numbers on this machine.
        first_furniture: those that a start brings.
    """

    def __init__(self, name: str, wish: dict[str, Any], log: Path) -> None:
        """``wish`` is what first_process.py wants to know."""
        self._name, self._log = name, log
        self.first_process = 0
        self.namespace = ""
        self.furniture = self.first_furniture = frozenset[int]()
        # -I and -S: no site-packages, whose start-up hooks may take a second and more.
        python = [sys.executable, "-I", "-S", str(_FIRST_PROCESS), json.dumps(wish)]
        with log.open("ab") as errors:
            self._unshare = subprocess.Popen(
                [tool("unshare"), *_NAMESPACES, *python],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd="/",
                env={"PATH": SYSTEM_PATH},
                start_new_session=True,
            )

    def identify(self) -> None:
        """Wait until it has its namespaces. Raises RuntimeError, with its log, where it has not."""
        self._hear("made")
        [self.first_process] = children(self._unshare.pid)
        self.namespace = pid_namespace(self.first_process) or ""

    def plugged_in(self) -> None:
        """Tell it that eth0 is there."""
        assert self._unshare.stdin is not None
        self._unshare.stdin.write(b"plugged in\n")
        self._unshare.stdin.flush()

    def wait_until_ready(self) -> None:
        """Wait until it takes logins. Raises RuntimeError, with its log, where it does not."""
        self._hear("ready")
        self.adopt()
        self.first_furniture = self.furniture

    def adopt(self) -> None:
        """All that runs there now is furniture."""
        self.furniture = frozenset(process.outside for process in in_namespace(self.namespace))

    def end(self) -> None:
        """Let the first process end, and wait until the kernel has ended all others."""
        for pipe in (self._unshare.stdin, self._unshare.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self._unshare.wait(20)
        except subprocess.TimeoutExpired:  # then by force: --kill-child
            self._unshare.kill()
            self._unshare.wait()

    def _hear(self, word: str) -> None:
        assert self._unshare.stdout is not None
        ready, _, _ = select.select([self._unshare.stdout], [], [], _START_SECONDS)
        line = os.read(self._unshare.stdout.fileno(), 100).decode().strip() if ready else "nothing"
        if line != word:
            log = self._log.read_text(errors="replace")
            raise RuntimeError(f"{self._name} did not start: {word!r} was due, and it said {line!r}\n{log}")
