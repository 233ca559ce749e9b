"""What may be wrong with a run folder that somebody else has made or can change: links in it, and its owners."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from dstrain.config.text_file import shown
from dstrain.errors import DstrainError
from dstrain.files import kind_of
from dstrain.runs.run_folder import FILES, FOLDERS, RunFolder

# Written in place, so that a second name of the same file would be written too.
_IN_PLACE = (".lock*", "launches.jsonl", "mlflow.db*", "slurm-*.log", "logs/*")
# W&B makes links of its own: to the newest of its runs, and, in the folder of each run, to the log of its service. That
# folder is never written to again: a launch has one of its own.
_WANDB = "wandb"
_WANDB_LOGS = ("wandb/run-*/logs/*.log", "wandb/offline-run-*/logs/*.log")


def refuse_links(folder: RunFolder) -> None:
    """Refuse a run folder that leads elsewhere, before anything in it is read or written.

    The folder itself may be reached through links. In it, a name that dstrain uses may be no link, no pipe, no device,
    and what is written in place no hard link.

    Raises:
        DstrainError: the first of them, or what can't be looked at.
    """
    try:
        for path, status in _own_names(folder.path):
            name = path.relative_to(folder.path).as_posix()
            if stat.S_ISLNK(status.st_mode):
                if _is_wandbs(path, name, folder.path / _WANDB):
                    continue
                raise DstrainError(
                    f"{shown(name)} is a link to {shown(os.readlink(path))}; in a run folder no link is followed",
                    where=shown(folder.path),
                    hint="put what it links to in its place, or delete it; the whole run folder may lie on another"
                    " disk (--set runs_dir=FOLDER, or a link to it)",
                )
            if "/" not in name and name not in FOLDERS and not _matches(name, FILES):
                continue  # a hidden file or folder of somebody else's
            wanted = stat.S_ISDIR if "/" not in name and name in FOLDERS else stat.S_ISREG
            if not wanted(status.st_mode) and not ("/" in name and stat.S_ISDIR(status.st_mode)):
                what = "a folder" if wanted is stat.S_ISDIR else "a file"
                found = "a file" if stat.S_ISREG(status.st_mode) else kind_of(status.st_mode)
                raise DstrainError(
                    f"{shown(name)} is {found}, and not {what}",
                    where=shown(folder.path),
                    hint="delete it: dstrain has not made it",
                )
            if status.st_nlink > 1 and wanted is stat.S_ISREG and _matches(name, _IN_PLACE):
                raise DstrainError(
                    f"{shown(name)} is a hard link: writing to it would change another file too",
                    where=shown(folder.path),
                    hint="copy the run folder (cp -r --no-preserve=links), and use the copy",
                )
    except OSError as error:
        raise DstrainError(
            f"the run folder can't be read: {error.strerror}", where=shown(error.filename or folder.path)
        ) from error


def owner_of(path: Path) -> str | None:
    """Who has made or can change what lies at ``path``, where that is neither this user nor root; None where it is one
    of those, or nothing is there. Of a link, both whose it is and whose that is to which it leads."""
    try:
        link, status = path.lstat(), path.stat()
    except OSError:
        return None
    for user in (link.st_uid, status.st_uid):
        if user not in (os.geteuid(), 0):
            return _user(user)
    is_kept = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)  # devices are for all to write to
    if is_kept and status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        return "everybody (all users may write to it)"
    return None


def first_owner(*paths: Path) -> tuple[Path, str] | None:
    """The first of these paths that is another user's, and whose."""
    return next(((path, owner) for path in paths if (owner := owner_of(path)) is not None), None)


def _user(uid: int) -> str:
    try:
        return shown(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return f"user {uid}"


def _own_names(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """What bears a name of ours or is hidden, and everything in our folders."""
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        with suppress(FileNotFoundError), os.scandir(here) as entries:
            for entry in entries:
                ours = here != folder or entry.name in FOLDERS
                if not ours and not _matches(entry.name, (*FILES, ".*")):
                    continue
                with suppress(FileNotFoundError):  # a run that goes on removes old checkpoints
                    status = entry.stat(follow_symlinks=False)
                    yield Path(entry.path), status
                    if ours and stat.S_ISDIR(status.st_mode):
                        waiting.append(Path(entry.path))


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_wandbs(link: Path, name: str, wandb: Path) -> bool:
    if not name.startswith(f"{_WANDB}/"):
        return False
    return _stays_in(link, wandb) or (name.count("/") == 3 and _matches(name, _WANDB_LOGS))


def _stays_in(link: Path, folder: Path) -> bool:
    """Whether a link leads to something in ``folder``, on a way that lies in it too."""
    target = os.path.normpath(link.parent / os.readlink(link))
    return not os.path.isabs(os.readlink(link)) and Path(target).is_relative_to(folder)
