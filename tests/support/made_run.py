"""A folder with a run of two steps and its export, which each command of a test finds as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.support.e2e import CommandLine, Said, start

ARGUMENTS = (
    "--model", "model", "--tokenizer", "bytes", "--data", "text.jsonl", "--seq-len", "32", "--global-batch", "2",
    "--micro-batch", "1", "--steps", "2", "--set", "sample_tokens=0",
)  # fmt: skip
COMMANDS = {
    "plan": ("plan", *ARGUMENTS),
    "run": ("run", "--name", "new", *ARGUMENTS),
    "resume": ("resume", "old", "--steps", "4"),
    "checkpoints": ("checkpoints", "old", "--verify"),
    "export": ("export", "old", "out"),
    "generate": ("generate", "exported", "abc", "--tokens", "4"),
}
"""By the name of the command; ``old`` is the run, ``exported`` its export."""


@dataclass(frozen=True)
class MadeRun:
    """The folder.

    Attributes:
        place: where commands stand; ``tmp`` is their TMPDIR, ``cache`` their cache.
        kept: a copy of it.
    """

    place: Path
    kept: Path

    def call(
        self, *arguments: str, more: Mapping[str, str] | None = None, seconds: float = 60, cold: bool = False
    ) -> Said:
        """Run a command as the folder stands. Raises TimeoutError."""
        with self.start(*arguments, more=more, cold=cold) as command:
            return command.said(seconds)

    def start(
        self, *arguments: str, more: Mapping[str, str] | None = None, cold: bool = False
    ) -> CommandLine:
        """Start it. ``cold``: with an empty cache."""
        own = {"TMPDIR": str(self.place / "tmp"), "DSTRAIN_CACHE": str(self.place / "cache")}
        own |= {"DS_ACCELERATOR": "cpu", "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).parents[2])}
        if cold:
            shutil.rmtree(self.place / "cache", ignore_errors=True)
        return start(self.place, os.environ | own | dict(more or {}), *arguments)

    def restore(self) -> None:
        """Make it as it was."""
        for path in self.place.iterdir():
            if path.is_symlink() or path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path)
        shutil.copytree(self.kept, self.place, symlinks=True, dirs_exist_ok=True)

    def left(self) -> list[str]:
        """What is half written, or lies in TMPDIR."""
        found = (
            path
            for name in ("tmp/*", "**/*.part", "**/*.tmp", "**/*.partial")
            for path in self.place.glob(name)
        )
        return [str(path.relative_to(self.place)) for path in found if "torchinductor" not in path.name]


def make_run(base: Path, materials: Path) -> MadeRun:
    """Train and export it below ``base``."""
    made = MadeRun(base / "place", base / "kept")
    (made.place / "tmp").mkdir(parents=True)
    for name in ("model", "text.jsonl"):
        (made.place / name).symlink_to(materials / name)
    for command in (("run", "--name", "old", *ARGUMENTS), ("export", "old", "exported")):
        said = made.call(*command, seconds=200)
        assert said.code == 0, said
    shutil.rmtree(made.place / "tmp")
    (made.place / "tmp").mkdir()
    shutil.copytree(made.place, made.kept, symlinks=True)
    return made


def one_error(said: Said) -> str | None:
    """What is wrong with how a command failed: it should be one message with a way out; None where it is."""
    if "Traceback" in said.err + said.out:
        return "a traceback"
    messages = [line for line in said.err.splitlines() if line.startswith("error: ")]
    if said.code not in (1, 2):
        return f"exit code {said.code}"
    if len(messages) != 1:
        return f"{len(messages)} error messages"
    return None if "  hint: " in said.err else "no way out"
