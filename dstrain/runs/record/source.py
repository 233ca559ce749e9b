"""The git state of the user's folder: its revision and uncommitted changes.

A repository may come from others, and its configuration can name programs: filters, monitors, pagers, transports. So
git is asked there only where things lie. What was changed it finds with an empty configuration of our own beside the
repository's objects and index, which are data.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dstrain.runs.record.secrets import without_secrets

UNKNOWN = "unknown"
"""In place of a hash where git could not say what was changed."""

_SECONDS = 20
# Bytes of an untracked file whose content still counts, and of all of them together; else only its size does.
_LARGEST_FILE, _LARGEST_TOGETHER = 2**20, 2**26
_LARGEST_DIFF = 2**25  # bytes that are kept; a larger one counts all the same
_NAMED = 100  # untracked files
# No object is fetched from elsewhere, and nothing is asked.
_CLOSED = {"GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
# Of the repository's configuration, what decides which files count as changed.
_TAKEN_OVER = (
    "core.autocrlf",
    "core.eol",
    "core.filemode",
    "core.ignorecase",
    "core.symlinks",
    "core.excludesfile",
)


@dataclass(frozen=True)
class Source:
    """A folder's state under git.

    Attributes:
        folder: the top of the repository.
        revision: of HEAD; None before the first commit.
        changes: a hash of the diff and of untracked files; None where there are none, `UNKNOWN` where git failed.
        diff: what ``git apply`` takes on top of ``revision``; untracked files are not in it, and of lines that look
            like secrets only a word that they were there. Empty where it is too large to be kept.
        untracked: how many there are.
        names: of the first of them.
        left_out: how many lines and files of the diff look like secrets.
        refused: why git says nothing of this repository; None where it does.
    """

    folder: str
    revision: str | None
    changes: str | None
    diff: bytes
    untracked: int
    names: tuple[str, ...]
    left_out: int = 0
    refused: str | None = None


def source_of(folder: Path, *, besides: Path) -> Source | None:
    """The state of the repository that ``folder`` lies in; None where it lies in none, or there is no git.

    Of a repository of another user nothing is said, unless git's ``safe.directory`` names it.

    ``besides``: the folder that run folders lie in; what is in it does not count.
    """
    places, refusal = _ask(folder, "rev-parse", "--show-toplevel", "--absolute-git-dir", "--git-common-dir")
    if places is None:
        if "safe.directory" not in refusal:
            return None
        return Source(str(folder), None, UNKNOWN, b"", 0, (), refused="it belongs to another user")
    top, own, common = (Path(os.fsdecode(line)) for line in places.rstrip(b"\n").split(b"\n"))
    common = folder / common
    if top.resolve() not in (folder.resolve(), *folder.resolve().parents):
        return None  # core.worktree names some other place
    revision = _git(folder, "rev-parse", "--verify", "--quiet", "HEAD")
    with tempfile.TemporaryDirectory(prefix="dstrain-git-") as place:
        aside = _Aside(Path(place), folder, top, own, common)
        diff = aside.git("diff", "--binary", *_AS_EVER, *_against(revision))
        excluded = [f"--exclude-from={file}" for file in [common / "info" / "exclude"] if file.is_file()]
        listed = aside.git("ls-files", "--others", "--exclude-standard", *excluded, "-z")
    runs = Path(os.path.abspath(besides))
    untracked = tuple(
        name
        for name in sorted(os.fsdecode(listed or b"").split("\0"))
        if name and runs not in (top / name, *(top / name).parents)
    )
    kept, left_out = without_secrets(diff) if diff and len(diff) <= _LARGEST_DIFF else (b"", 0)
    return Source(
        folder=_printable(str(top)),
        revision=revision.decode("ascii").strip() if revision else None,
        changes=UNKNOWN if diff is None or listed is None else _changes(top, diff, untracked),
        diff=kept,
        untracked=len(untracked),
        names=tuple(map(_printable, untracked[:_NAMED])),
        left_out=left_out,
    )


# A submodule's changes would be looked for with its own configuration: its commit counts alone.
_AS_EVER = (
    *("--ignore-submodules=dirty", "--submodule=short", "--no-ext-diff", "--no-textconv", "--no-color"),
    *("--src-prefix=a/", "--dst-prefix=b/"),
)


def _against(revision: bytes | None) -> tuple[str, ...]:
    return (revision.decode("ascii").strip(),) if revision else ()


class _Aside:
    """A git folder of our own, whose objects and index are those of another repository."""

    def __init__(self, place: Path, folder: Path, top: Path, own: Path, common: Path) -> None:
        (place / "HEAD").write_text("ref: refs/heads/none\n")
        (place / "refs").mkdir()
        (place / "objects").mkdir()
        form = (_git(folder, "rev-parse", "--show-object-format") or b"sha1").decode("ascii").strip()
        version = (
            "" if form == "sha1" else f"repositoryformatversion = 1\n[extensions]\nobjectFormat = {form}\n"
        )
        (place / "config").write_text(f"[core]\n{version}")
        self._top = top
        self._settings = [
            f"--config-env={name}=DSTRAIN_GIT_{number}" for number, name in enumerate(_TAKEN_OVER)
        ]
        values = [_git(folder, "config", "--includes", "--get", name) for name in _TAKEN_OVER]
        self._settings = [each for each, value in zip(self._settings, values, strict=True) if value]
        self._environment = {
            f"DSTRAIN_GIT_{number}": os.fsdecode(value.rstrip(b"\n"))
            for number, value in enumerate(values)
            if value
        } | {
            "GIT_DIR": str(place),
            "GIT_WORK_TREE": str(top),
            "GIT_OBJECT_DIRECTORY": str(common / "objects"),
            "GIT_INDEX_FILE": str(own / "index"),
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_CONFIG_SYSTEM": os.devnull,
        }

    def git(self, *arguments: str) -> bytes | None:
        """What git says; None where it fails."""
        return _ask(self._top, *self._settings, *arguments, environment=self._environment)[0]


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
    """Of a file; of a link, where it leads to."""
    try:
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            return os.fsencode(os.readlink(path))
        if not stat.S_ISREG(status.st_mode) or status.st_size > most:
            return str(status.st_size).encode()
        return path.read_bytes()
    except OSError:
        return b"?"


def _printable(name: str) -> str:
    """A file's name as UTF-8 can hold it."""
    return os.fsencode(name).decode("utf-8", errors="replace")


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says; None where it fails or is not there."""
    return _ask(folder, *arguments)[0]


def _ask(
    folder: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> tuple[bytes | None, str]:
    """What git says, or None and why."""
    # No monitor, no pager, no lock, no bare repository that lies among files.
    settings = (
        "-c",
        "core.quotePath=false",
        "-c",
        "core.fsmonitor=false",
        "-c",
        "safe.bareRepository=explicit",
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-pager", "--no-optional-locks", *settings, *arguments],
            cwd=folder,
            env=variables | _CLOSED | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None, ""
    if done.returncode:
        return None, done.stderr.decode(errors="replace")
    return done.stdout, ""
