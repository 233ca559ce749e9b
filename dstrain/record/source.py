"""The user's own folder under git: its revision, and what stands there but is not committed."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import dataclass
from pathlib import Path

_SECONDS = 20
_LARGEST = 2**20  # bytes of an untracked file whose content still counts; of a larger one only its size does


@dataclass(frozen=True)
class Source:
    """A folder's state under git.

    Attributes:
        folder: the top of the repository.
        revision: of HEAD; None before the first commit.
        changes: a hash of the diff and of untracked files; None where there are none.
        diff: what ``git apply`` takes on top of ``revision``; untracked files are not in it.
        untracked: their names.
    """

    folder: str
    revision: str | None
    changes: str | None
    diff: str
    untracked: tuple[str, ...]


def source_of(folder: Path, *, besides: Path) -> Source | None:
    """The state of the repository that ``folder`` lies in; None where it lies in none, or there is no git.

    ``besides``: the folder that run folders lie in; what is in it does not count.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    root = Path(top.strip())
    revision = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    against = ("HEAD",) if revision else ()
    diff = _git(root, "diff", "--binary", "--no-ext-diff", "--no-textconv", "--no-color", *against) or ""
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z") or ""
    runs = besides.resolve()
    untracked = tuple(
        name for name in sorted(listed.split("\0")) if name and runs not in (root / name).resolve().parents
    )
    digest = hashlib.sha256(diff.encode())
    for name in untracked:
        digest.update(name.encode(errors="surrogateescape") + b"\0" + _content(root / name))
    changed = bool(diff or untracked)
    return Source(
        folder=str(root),
        revision=revision.strip() if revision else None,
        changes=digest.hexdigest()[:16] if changed else None,
        diff=diff,
        untracked=untracked,
    )


def _content(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        return path.read_bytes() if path.is_file() and size <= _LARGEST else str(size).encode()
    except OSError:
        return b"?"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says; None where it fails or is not there."""
    try:
        done = subprocess.run(
            # The user's own settings must not decide what the diff looks like, nor a lock stand in the way.
            [
                "git",
                "-c",
                "core.quotePath=false",
                "-c",
                "core.fsmonitor=false",
                "--no-optional-locks",
                *arguments,
            ],
            cwd=folder,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            timeout=_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
