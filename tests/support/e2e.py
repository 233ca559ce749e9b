"""The command line in a process of its own, and what it ended with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.child_process import ChildProcess
from tests.support.arguments import layered
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
    return CommandLine([sys.executable, *program, *layered(arguments)], cwd=place, env=environment)


class Child(Program):
    """A `ChildProcess` that is forked."""

    def __new__(cls, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Any:
        # It learns where the hub and its cache are when it is imported; what is forked is offline.
        of_data = module in ("dstrain.data.listing.hub_datasets", "dstrain.data.streaming.hub_shards")
        if module == "dstrain.model.weights.hub" or (of_data and environment.get("HF_HUB_OFFLINE") != "1"):
            return ChildProcess(module, arguments, environment)
        return super().__new__(cls)

    def __init__(self, module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        super().__init__([sys.executable, "-m", module, *arguments], cwd=os.getcwd(), env=environment)

    def lines(self) -> list[str]:
        self.wait(200)
        return self.err.splitlines()

    @property
    def returncode(self) -> int | None:
        return self.poll()


class CommandLine(Program):
    """A command line that was started."""

    def said(self, timeout: float = 250) -> Said:
        """Wait for its end. Raises TimeoutError."""
        return Said(self.wait(timeout), self.out, self.err)
