"""The command line in a process of its own, and what it ended with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from tests.support.forking.program import Program


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


def one_message(said: Said, words: Sequence[str]) -> None:
    """It ended with one message to the user, which holds these words."""
    assert said.code == 2, said
    assert "Traceback" not in said.err + said.out
    assert sum(line.startswith("error:") for line in said.err.lower().splitlines()) == 1, said.err
    assert len(said.err) < 1200, "one message"
    assert not [word for word in words if word not in said.err], said.err


def start(place: Path, environment: Mapping[str, str], *arguments: str, change: str = "") -> CommandLine:
    """Start the command line in a process of its own, in which first the code ``change`` is run."""
    program = ["-m", "dstrain.cli.main"]
    if change:
        program = ["-c", f"{change}\nfrom dstrain.cli.main import main\nmain()"]
    return CommandLine([sys.executable, *program, *arguments], cwd=place, env=environment)


class Child(Program):
    """What `dstrain.api.child_process` needs of ``Popen``."""

    def __new__(cls, argv: Sequence[str], **options: Any) -> Any:
        # It learns where the hub and its cache are when it is imported.
        return Popen(argv, **options) if "dstrain.model.weights.hub" in argv else super().__new__(cls)

    def __init__(self, argv: Sequence[str], *, env: Mapping[str, str], stdout: int | None, **_: Any) -> None:
        super().__init__(argv, cwd=os.getcwd(), env=env)
        self._speaks = stdout is None

    @property
    def stderr(self) -> list[str]:
        self.wait(200)
        if self._speaks:
            sys.stdout.write(self.out)
        return self.err.splitlines(keepends=True)

    @property
    def returncode(self) -> int | None:
        return self.poll()


class CommandLine(Program):
    """A command line that was started."""

    def said(self, timeout: float = 250) -> Said:
        """Wait for its end. Raises TimeoutError."""
        return Said(self.wait(timeout), self.out, self.err)
