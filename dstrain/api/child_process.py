"""Runs code that imports heavy libraries in a child process, so that the caller stays light."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import deque
from collections.abc import Mapping

from dstrain.api.events import SILENT, Events
from dstrain.errors import DstrainError

# How a line begins that is no error but says how far the work has come (dstrain.data.progress).
_PROGRESS = "dstrain: "


def run_module(
    module: str,
    *arguments: str,
    events: Events = SILENT,
    user_code: bool = False,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run ``python -m module`` to its end. Its progress becomes notes, its error message becomes ours.

    Args:
        user_code: it runs code of the user's: all that it prints to standard error becomes notes.
        environment: variables beside those of this process.

    Raises:
        DstrainError: it ended with another exit code than 0.
    """
    lines: deque[str] = deque(maxlen=1000)  # the user's code may print without end
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        errors="replace",
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if user_code or line.startswith(_PROGRESS):
                events.note(line.removeprefix(_PROGRESS).rstrip(), "progress")
            if not line.startswith(_PROGRESS):
                lines.append(line.rstrip())
    if process.returncode == 0:
        return
    if process.returncode == 2 and lines:
        raise DstrainError("\n".join(lines))
    raise DstrainError(f"{module} failed: {lines[-1] if lines else 'without an error message'}", exit_code=1)
