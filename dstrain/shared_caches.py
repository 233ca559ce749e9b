"""Which folders and files of a cache are believed, and how they are made: several users may share its place.

An entry that another user can write may say anything: other tokens under the hash of this corpus, a library for a
kernel. So only what belongs to this user or to root, and can be written by nobody else, is read.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_OTHERS, _GROUP = 0o002, 0o020
_HOURS, _KEPT_HOURS = 6, 7 * 24
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_SAY_SECONDS = 2.0


def is_own(path: Path) -> bool:
    """Whether a file or folder is there, is no link, belongs to this user or root, and nobody else may write it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return (
        (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode))
        and status.st_uid in (os.geteuid(), 0)
        and not status.st_mode & _OTHERS
        and not (status.st_mode & _GROUP and not _is_private(status.st_gid))
    )


def own_place(base: Path) -> Path | None:
    """Where below ``base`` this user's entries go: ``base`` itself if it `is_own`, else a folder of this user's in it.

    It is made if it is not there. None where there is none that nobody else can write.
    """
    with suppress(OSError):
        make_folder(base)
    real = Path(os.path.realpath(base))
    if is_own(real) or not os.path.lexists(base):  # what can't be made is told of by who writes there
        return base
    own = base / f"uid-{os.geteuid()}"
    with suppress(OSError):
        own.mkdir(mode=0o700)
    return own if is_own(own) else None


def make_folder(path: Path) -> None:
    """Make a folder, and those above it that are missing, for this user alone. Raises OSError."""
    if path.is_dir():
        return
    make_folder(path.parent)
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)


def write_own(path: Path, text: str) -> None:
    """Write a file that this user alone may read, in one step, and follow no link. Raises OSError."""
    make_folder(path.parent)
    aside = path.with_name(f"{path.name}.{os.urandom(8).hex()}.part")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def open_lock(path: Path) -> int:
    """A descriptor to lock, of a file that no other user may open, let alone lock. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with suppress(OSError):  # root's
        os.fchmod(descriptor, 0o600)
    return descriptor


@contextmanager
def locked(path: Path, waits: Callable[[], object] | None) -> Iterator[bool | None]:
    """Hold an exclusive lock, which ends with its process: True; False where the file system has no locks; None where
    another process holds it and ``waits`` is None.

    Args:
        waits: called once if another process holds it for seconds.

    Raises:
        OSError: the file can't be made, or is not this user's.
    """
    from filelock import FileLock, Timeout  # most starts lock nothing

    os.close(open_lock(path))
    lock = FileLock(path, mode=0o600, fallback_to_soft=False)
    held: bool | None = True
    try:
        try:
            lock.acquire(timeout=0 if waits is None else _SAY_SECONDS)
        except Timeout:
            if waits is None:
                held = None
            else:
                waits()
                lock.acquire()
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        held = False
    try:
        yield held
    finally:
        lock.release()


def clear_leftovers(cache: Path) -> None:
    """Remove what killed processes have half written: this user's entries ``NAME.*.part`` in the cache's folders, and
    ``NAME.unfinished``, with which the next process would go on, after a week.

    One whose ``NAME.lock`` is held is being written; where there is no lock, one that was written to in the last hours.
    """
    for pattern in ("*/*.part", "*/*/*.part", "*/*.unfinished"):
        for path in cache.glob(pattern):
            with suppress(OSError):
                kept = path.suffix == ".unfinished" and not _is_old(path, _KEPT_HOURS)
                if not kept and path.lstat().st_uid == os.geteuid():
                    _clear(path)


def _clear(path: Path) -> None:
    lock = path.with_name(f"{path.name.partition('.')[0]}.lock")
    if not lock.is_file():
        if _is_old(path):
            _remove(path)
        return
    with locked(lock, waits=None) as held:
        if held or (held is False and _is_old(path)):
            _remove(path)


def _is_old(path: Path, hours: int = _HOURS) -> bool:
    inside = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    newest = max(entry.lstat().st_mtime for entry in (path, *inside))
    return bool(newest < time.time() - hours * 3600)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_private(group: int) -> bool:
    """Whether a group is this user's own, as most distributions make one for each user."""
    try:
        user, found = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except KeyError:
        return False
    return (
        found.gr_gid == user.pw_gid and found.gr_name == user.pw_name and set(found.gr_mem) <= {user.pw_name}
    )
