"""The git state of the user's folder: its revision and uncommitted changes."""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

UNKNOWN = "unknown"
"""In place of a hash where git could not say what was changed."""

_SECONDS = 20
# Bytes of an untracked file whose content still counts, and of all of them together; else only its size does.
_LARGEST_FILE, _LARGEST_TOGETHER = 2**20, 2**26
_LARGEST_DIFF = 2**25  # bytes that are kept; a larger one counts all the same
_NAMED = 100  # untracked files


@dataclass(frozen=True)
class Source:
    """A folder's state under git.

    Attributes:
        folder: the top of the repository.
        revision: of HEAD; None before the first commit.
        changes: a hash of the diff and of untracked files; None where there are none, `UNKNOWN` where git failed.
        diff: what ``git apply`` takes on top of ``revision``; untracked files are not in it. Empty where it is too
            large to be kept.
        untracked: how many there are.
        names: of the first of them.
    """

    folder: str
    revision: str | None
    changes: str | None
    diff: bytes
    untracked: int
    names: tuple[str, ...]


def source_of(folder: Path, *, besides: Path) -> Source | None:
    """The state of the repository that ``folder`` lies in; None where it lies in none, or there is no git.

    ``besides``: the folder that run folders lie in; what is in it does not count.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    if top is None:
        return None
    root = Path(os.fsdecode(top.rstrip(b"\n")))
    revision = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    against = ("HEAD",) if revision else ()
    as_ever = (
        "--submodule=short",
        "--no-ext-diff",
        "--no-textconv",
        "--no-color",
        "--src-prefix=a/",
        "--dst-prefix=b/",
    )
    diff = _git(root, "diff", "--binary", *as_ever, *against)
    listed = _git(root, "ls-files", "--others", "--exclude-standard", "-z")
    runs = Path(os.path.abspath(besides))
    untracked = tuple(
        name
        for name in sorted(os.fsdecode(listed or b"").split("\0"))
        if name and runs not in (root / name, *(root / name).parents)
    )
    return Source(
        folder=_printable(str(root)),
        revision=revision.decode("ascii").strip() if revision else None,
        changes=UNKNOWN if diff is None or listed is None else _changes(root, diff, untracked),
        diff=diff if diff and len(diff) <= _LARGEST_DIFF else b"",
        untracked=len(untracked),
        names=tuple(map(_printable, untracked[:_NAMED])),
    )


def _changes(root: Path, diff: bytes, untracked: tuple[str, ...]) -> str | None:
    if not diff and not untracked:
        return None
    digest = hashlib.sha256(diff)
    left = _LARGEST_TOGETHER
    for name in untracked:
        content = _content(root / name, min(left, _LARGEST_FILE))
        left -= len(content)
        digest.update(os.fsencode(name) + b"\0" + content)
    return digest.hexdigest()[:16]


def _content(path: Path, most: int) -> bytes:
    try:
        size = path.stat().st_size
        return path.read_bytes() if path.is_file() and size <= most else str(size).encode()
    except OSError:
        return b"?"


def _printable(name: str) -> str:
    """A file's name as UTF-8 can hold it."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says; None where it fails or is not there."""
    # The user's own settings must not decide what the diff looks like, nor a lock stand in the way.
    settings = ("-c", "core.quotePath=false", "-c", "core.fsmonitor=false", "--no-optional-locks")
    try:
        done = subprocess.run(
            ["git", *settings, *arguments], cwd=folder, capture_output=True, timeout=_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
