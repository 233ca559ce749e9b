"""Start dstrain's command line. This file alone knows a harness of the tests.

Each program is a fork of a python that has imported everything (`tests.support.forking`). With ``GOLDEN_REAL=1`` in the
environment each is a new interpreter, with PyTorch's default number of threads: slower, and what a user has.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tests.support.arguments import layered
from tests.support.forking.program import Program

GOLDEN = Path(__file__).resolve().parent
DATA = GOLDEN / "data"
MATERIALS = GOLDEN / "materials"
REPOSITORY = GOLDEN.parents[1]
PLACE_NAME = "a folder with spaces in its name, which has more than sixty characters"
"""Of the folder that commands run in: no path decides anything."""

_CARRIED = ("PATH", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL")


@dataclass(frozen=True)
class Said:
    """What a command ended with."""

    code: int
    out: str
    err: str


class Process(Protocol):
    """A command that was started."""

    pid: int

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""

    def kill(self) -> None:
        """SIGKILL, where it runs yet, and wait for the end."""

    def said(self, timeout: float = 200) -> Said:
        """Wait for its end."""


def environment(home: Path, cache: Path) -> dict[str, str]:
    """All of it: nothing that this machine's user has set decides anything but where programs and libraries are."""
    carried = {name: os.environ[name] for name in _CARRIED if name in os.environ}
    return carried | {
        "HOME": str(home),
        "DSTRAIN_CACHE": str(cache),
        "DS_ACCELERATOR": "cpu",
        "COLUMNS": "300",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONWARNINGS": "ignore",
    }


def make_place(above: Path) -> Path:
    """A folder below ``above`` with a model's config, a text and config files, for relative paths."""
    return Path(shutil.copytree(MATERIALS, above / PLACE_NAME))


def start(place: Path, environ: Mapping[str, str], *arguments: str, real: bool | None = None) -> Process:
    """Start ``dstrain ARGUMENTS`` in the folder ``place``.

    ``real``: as a new interpreter; by default where GOLDEN_REAL says so.
    """
    argv = [sys.executable, "-m", "dstrain.cli.main", *layered(arguments)]
    if real is None:
        real = bool(os.environ.get("GOLDEN_REAL"))
    return _Interpreter(argv, place, environ) if real else _Fork(argv, cwd=place, env=environ)


class _Fork(Program):
    def said(self, timeout: float = 200) -> Said:
        """Wait for its end. Raises TimeoutError."""
        return Said(self.wait(timeout), self.out, self.err)


class _Interpreter:
    def __init__(self, argv: list[str], place: Path, environ: Mapping[str, str]) -> None:
        self._out, self._err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            argv,
            cwd=place,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            start_new_session=True,
            # a program started in a shell's background ignores the interrupt, and so would its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def said(self, timeout: float = 200) -> Said:
        """Wait for its end. Raises subprocess.TimeoutExpired."""
        code = self._process.wait(timeout)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return Said(code, *texts)
