"""The lock of a run folder: held by the process that runs in it, on whatever host, and watched while it does.

The kernel's lock (flock) is released however a process ends. A network file system may not have it, or may have it for
each host by itself. So the file also says who holds it, and changes every few seconds while he lives; and where there
is no lock at all, a second file that only one can make (``.lock-claim``) stands for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dstrain.api.preflight import not_writable
from dstrain.errors import DstrainError
from dstrain.files import open_to_write, parse_json, read_bounded
from dstrain.runs.run_folder import Access, RunFolder
from dstrain.runs.this_machine import read_process
from dstrain.strict_json import to_json

BEAT_SECONDS = 5.0
"""So often the holder of a lock shows that he lives."""
WATCH_SECONDS = 30.0
"""So long a holder on another host must not have shown it to be taken for gone."""
LONG_AGO = 1800.0
"""Seconds. What was shown before that, by the clocks of two hosts, is not waited for."""
_LOOK_SECONDS = 0.5
# A network file system may lose sight of a folder for a moment.
_GONE_SECONDS = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
_BYTES, _MOST_BYTES = 1024, 4096
"""Of what is written, always as many, so that nobody reads half of it; and that is read."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, pid: where he is.
        start: of his process, in clock ticks since the boot.
        machine: tells one boot of a machine, and one namespace of process numbers, from all others.
        token: no other holder has it.
        since, shown_at: when he took it, and when he last showed that he lives; in seconds since 1970, by his clock.
        released: he holds it no longer.
    """

    host: str
    pid: int
    start: int
    machine: str
    token: str
    since: float
    shown_at: float
    released: bool = False

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {since}"


class FolderLock:
    """Made by `locked`, and to be asked every now and then while the folder is in use.

    Args:
        say: takes a line for the user.
    """

    def __init__(self, folder: RunFolder, say: Callable[[str], None]) -> None:
        self._folder = folder
        self._say = say
        self._descriptor = -1
        self._claim = -1  # where the file system has no locks
        self._place = _place(folder.path)
        self._looked_at = self._shown_at = time.monotonic()
        self._gone_since: float | None = None
        process = read_process(os.getpid())
        now = time.time()
        self._holder = Holder(
            host=socket.gethostname()[:255],
            pid=os.getpid(),
            start=process.start if process else 0,
            machine=_machine(),
            token=secrets.token_hex(8),
            since=now,
            shown_at=now,
        )
        self._take(wait=True)

    def check(self, *, now: bool = False) -> None:
        """See to it that folder and lock are still this run's, and show that it lives. Takes no time.

        Args:
            now: also where that was done just before.

        Raises:
            DstrainError: the folder was deleted, moved or replaced, or another process has the lock.
        """
        moment = time.monotonic()
        if not now and moment - self._looked_at < _LOOK_SECONDS:
            return
        self._looked_at = moment
        self._check_folder(now)
        if self._gone_since is not None:
            return
        self._check_lock()
        if moment - self._shown_at >= BEAT_SECONDS:
            self._shown_at = moment
            self._write(self._holder)

    def release(self) -> None:
        """So that the next one need not wait."""
        with suppress(OSError):
            if self._is_mine(self._folder.lock, self._descriptor):
                self._write(replace(self._holder, released=True))
            if self._claim >= 0 and self._is_mine(self._folder.lock_claim, self._claim):
                self._folder.lock_claim.unlink(missing_ok=True)
        self._close()

    def _take(self, *, wait: bool) -> None:
        """Take the lock. ``wait``: where another host may hold it, see whether he lives.

        Raises:
            DstrainError: another holds it, or the folder can't be written.
        """
        try:
            self._open_and_claim(wait=wait)
        except BaseException:
            self._close()
            raise
        self._write(self._holder)

    def _open_and_claim(self, *, wait: bool) -> None:
        lock, claim = self._folder.lock, self._folder.lock_claim
        try:
            self._descriptor = open_to_write(lock, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise not_writable(error, self._folder) from error
        has_locks = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held_by(_read(lock)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise not_writable(error, self._folder) from error
            has_locks = False
        holder = _read(lock)
        if holder is not None and self._lives(holder, lock, wait=wait):
            raise self._held_by(holder)
        dead = self._dead_claim(wait=wait)
        if has_locks:
            with suppress(OSError):  # left by a host that has no locks, and is gone
                claim.unlink(missing_ok=True)
        else:
            self._claim = self._make_claim(dead)
            self._say("this file system has no locks; the run folder is held with a file (.lock-claim)")

    def _make_claim(self, dead: int | None) -> int:
        """Only one process can make this file. ``dead``: the inode of one that belongs to nobody any more."""
        claim = self._folder.lock_claim
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        try:
            if dead is not None:
                aside = claim.with_name(f"{claim.name}.{secrets.token_hex(4)}")
                os.rename(claim, aside)
                taken = _inode(aside)
                if taken != dead:  # another one was faster
                    with suppress(FileExistsError):
                        os.link(aside, claim)
                aside.unlink()
                if taken != dead:
                    raise self._held_by(_read(claim))
            return open_to_write(claim, flags)
        except (FileExistsError, FileNotFoundError):
            raise self._held_by(_read(claim)) from None
        except OSError as error:
            raise not_writable(error, self._folder) from error

    def _dead_claim(self, *, wait: bool) -> int | None:
        """The inode of a claim whose maker is gone; None where there is no claim. Raises DstrainError if he lives."""
        claim = self._folder.lock_claim
        inode, holder = _inode(claim), _read(claim)
        if inode is None:
            return None
        if holder is not None:
            lives = self._lives(holder, claim, wait=wait)
        else:  # it is just being made, or its maker did not come to say who he is
            lives = _age(claim) < WATCH_SECONDS
        if lives:
            raise self._held_by(holder)
        return inode

    def _lives(self, holder: Holder, path: Path, *, wait: bool) -> bool:
        """Whether a holder is still there. One of another machine is watched: only he changes what is written."""
        if holder.released or holder.token == self._holder.token:
            return False
        if holder.machine == self._holder.machine:
            process = read_process(holder.pid)
            return process is not None and process.start == holder.start and not process.zombie
        if not wait:
            return True
        if abs(time.time() - holder.shown_at) > LONG_AGO:
            return False
        self._say(f"the run folder was last held by {holder}: looking whether it still is")
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(_LOOK_SECONDS)
            now = _read(path)
            if now is None or now.released:
                return False
            if (now.token, now.shown_at) != (holder.token, holder.shown_at):
                return True
        return False

    def _check_folder(self, now: bool) -> None:
        if self._folder_is_there():
            self._gone_since = None
            return
        self._gone_since = self._gone_since or time.monotonic()
        if now:
            time.sleep(max(0.0, self._gone_since + _GONE_SECONDS - time.monotonic()))
            if self._folder_is_there():
                self._gone_since = None
                return
        if now or time.monotonic() - self._gone_since >= _GONE_SECONDS:
            raise lost(self._folder)

    def _folder_is_there(self) -> bool:
        try:
            return _place(self._folder.path) == self._place
        except OSError as error:
            return error.errno not in _GONE  # anything else passes, or shows elsewhere

    def _check_lock(self) -> None:
        path, descriptor = self._folder.lock, self._descriptor
        if self._claim >= 0:
            path, descriptor = self._folder.lock_claim, self._claim
        try:
            if self._is_mine(path, descriptor):
                return
        except OSError:
            return  # a network file system's hiccup
        self._close()
        try:
            self._take(wait=False)
        except DstrainError as error:
            raise DstrainError(
                f"the run ends: the lock of its folder was removed while it trained, and {error.message}",
                where=str(path),
                hint="only one run may train in a folder; delete no .lock of a run that is going on",
                exit_code=1,
            ) from error
        self._say(f"{path.name} of the run folder was removed while the run trained, and was made again")

    def _is_mine(self, path: Path, descriptor: int) -> bool:
        """Whether the file that was opened still has its name. Raises OSError where that can't be told."""
        held = os.fstat(descriptor)
        try:
            found = os.stat(path, follow_symlinks=False)
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)

    def _write(self, holder: Holder) -> None:
        """Say who holds the lock, in place. On a full disk nothing is said; the lock holds all the same."""
        self._holder = replace(holder, shown_at=time.time())
        text = to_json(asdict(self._holder)).ljust(_BYTES - 1).encode() + b"\n"
        for descriptor in (self._descriptor, self._claim):
            if descriptor >= 0:
                with suppress(OSError):
                    os.pwrite(descriptor, text, 0)
                    # NFS sends to its server what was written when a file is closed.
                    os.close(os.dup(descriptor))

    def _held_by(self, holder: Holder | None) -> DstrainError:
        who = f" ({holder})" if holder is not None and not holder.released else ""
        return DstrainError(
            f"another dstrain process is using this run folder{who}",
            where=str(self._folder.path),
            hint="wait for it, stop it, or start a run under another --name",
        )

    def _close(self) -> None:
        for descriptor in (self._descriptor, self._claim):
            if descriptor >= 0:
                os.close(descriptor)
        self._descriptor = self._claim = -1


@contextmanager
def locked(
    folder: RunFolder, access: Access = "private", *, say: Callable[[str], None] = lambda line: None
) -> Iterator[FolderLock]:
    """While nobody else may run in this folder, which is made where it is missing.

    Args:
        access: who may read a folder that is made.
        say: takes a line for the user.

    Raises:
        DstrainError: somebody else runs in it, or it can't be written.
    """
    try:
        folder.make(access)
        lock = FolderLock(folder, say)
    except OSError as error:
        raise not_writable(error, folder) from error
    try:
        yield lock
    finally:
        lock.release()


def lost(folder: RunFolder) -> DstrainError:
    """For a run whose folder is not there any more."""
    return DstrainError(
        "the run ends: its folder was deleted, moved or replaced while it trained",
        where=str(folder.path),
        hint="nothing is saved there any more; if it was moved, `dstrain resume` continues it at its new place",
        exit_code=1,
    )


def _place(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _inode(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except OSError:
        return None


def _age(path: Path) -> float:
    """Seconds since a file was changed, as far as the clocks of two hosts agree; infinity where it is gone."""
    try:
        return abs(time.time() - path.lstat().st_mtime)
    except OSError:
        return float("inf")


def _read(path: Path) -> Holder | None:
    """Who holds a lock, as its file says; None where it says nothing that can be believed."""
    try:
        record = parse_json(read_bounded(path, _MOST_BYTES))
        kinds: dict[str, Any] = {
            "host": str, "pid": int, "start": int, "machine": str, "token": str,
            "since": (int, float), "shown_at": (int, float), "released": bool,
        }  # fmt: skip
        known = {field.name: record[field.name] for field in fields(Holder)}
        if not all(isinstance(known[name], kind) for name, kind in kinds.items()):
            return None
        holder = Holder(**known)
        str(holder)  # a time that no calendar has
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return holder if holder.host.isprintable() and 0 < holder.pid < 2**31 else None


@lru_cache(maxsize=1)
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()
