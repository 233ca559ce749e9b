"""Hooks as a user may write them, for runs on several hosts."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from dstrain.files import write_atomically
from dstrain.runs.control_key import find_key
from dstrain.runs.run_folder import NODE_RANK, RunFolder


class OnEveryRank:
    """Writes down where it was called and for which steps, a file a rank."""

    every_rank = True

    def on_start(self, info: Any) -> None:
        self.file = Path(info.folder) / f"watched-{info.rank}.json"
        self.steps: list[int] = []

    def on_step(self, info: Any) -> None:
        self.steps.append(info.step)

    def on_end(self, info: Any) -> None:
        self.file.write_text(json.dumps({"host": socket.gethostname(), "steps": self.steps}))


class KeyBackwards:
    """Writes the key of the rank's control connection, as the rank found it, so that no search for the key finds it
    there: with its last digit first. The rank has taken it out of its environment; what it was started with stays in
    /proc."""

    every_rank = True

    def on_start(self, info: Any) -> None:
        folder = RunFolder(info.folder, int(os.environ.get(NODE_RANK, 0)))
        file = Path(info.folder) / f"key-backwards-{info.rank}"
        started_with = os.fsdecode(Path("/proc/self/environ").read_bytes()).split("\0")
        variables = dict(each.split("=", 1) for each in started_with if "=" in each)
        write_atomically(file, find_key(variables, folder.control_key).hex()[::-1], private=True)
