"""Errors of the operating system where a test wants them: a call to a file in a test's folder fails.

`prepare` is run in each process of a command (the command line, its children, launcher and ranks) and wraps the file
operations of `os`, `open` and `fcntl`. In a run that is watched every operation on a file below the
folder is noted, as a `Site`; then the command is run again, and the operations of one site fail with an errno, all of
them, as on a disk that is full. EINTR is not among the errnos: Python repeats such calls itself (PEP 475).
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import functools
import io
import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VARIABLE = "DSTRAIN_TEST_OS_ERRORS"
"""Of the environment: JSON with ``folder``, and ``log`` or ``site`` and ``errno``."""

_PAUSE = "pause"
_LONGEST_PAUSE = 120.0
_FULL = ("ENOSPC", "EDQUOT", "EIO", "EFBIG")
_WRITING = ("EACCES", "EROFS", "ENOSPC", "EDQUOT", "EIO", "EPERM", "ESTALE")
ERRNOS: dict[str, tuple[str, ...]] = {
    "open to read": ("EACCES", "EIO", "EMFILE", "ESTALE", "ENOENT", "ELOOP", "ENAMETOOLONG", "EPERM"),
    "open to write": (*_WRITING, "EMFILE", "ENOTDIR", "ENOENT", "ENAMETOOLONG", "EISDIR"),
    "read": ("EIO", "ESTALE"),
    "write": _FULL,
    "fsync": _FULL,
    "mkdir": (*_WRITING, "ENOTDIR", "EMLINK", "ENAMETOOLONG"),
    "rename": (*_WRITING, "EXDEV", "EBUSY"),
    "unlink": ("EACCES", "EROFS", "EIO", "EBUSY", "EPERM"),
    "rmdir": ("EACCES", "EROFS", "EIO", "EBUSY", "ENOTEMPTY"),
    "stat": ("EACCES", "EIO", "ESTALE"),
    "list": ("EACCES", "EIO", "EMFILE", "ESTALE"),
    "chmod": ("EPERM", "EROFS", "EIO"),
    "link": ("EPERM", "EROFS", "ENOSPC", "EMLINK"),
    "readlink": ("EACCES", "EIO"),
    "statvfs": ("EIO", "EACCES", "ENOSYS"),
    "truncate": ("EIO", "EROFS", "EPERM"),
    "flock": ("ENOLCK", "EIO", "ENOSYS"),
}
"""What each kind of operation can fail with."""

_CALLS = {
    "stat": "stat", "lstat": "stat", "mkdir": "mkdir", "rename": "rename", "replace": "rename", "unlink": "unlink",
    "remove": "unlink", "rmdir": "rmdir", "listdir": "list", "scandir": "list", "chmod": "chmod", "fchmod": "chmod",
    "link": "link", "symlink": "link", "readlink": "readlink", "fsync": "fsync", "fdatasync": "fsync",
    "statvfs": "statvfs", "truncate": "truncate", "ftruncate": "truncate", "write": "write", "pwrite": "write",
    "sendfile": "write", "copy_file_range": "write",
}  # fmt: skip
# Names that are drawn anew in each run: a token, a process's number, a day.
_DRAWN = re.compile(
    r"[0-9a-f]{8,}|(?<=tmp)\w{8}|\d{4}-\d\d-\d\d-\d{6}|\d+(?=\.(part|tmp|lock))|(?<=_)\d+_test\w+?(?=_cache)"
)


@dataclass(frozen=True)
class Site:
    """Where an error can come up.

    Attributes:
        module: of the process: ``dstrain.cli.main``, ``dstrain.train.worker``.
        call: a kind of operation, a key of `ERRNOS`.
        path: below the folder, with ``*`` for what is drawn anew in each run.
    """

    module: str
    call: str
    path: str

    def __str__(self) -> str:
        return f"{self.module}: {self.call} {self.path}"


def watched(folder: Path, log: Path) -> dict[str, str]:
    """The variable with which the sites below ``folder`` are noted in ``log``."""
    return {VARIABLE: json.dumps({"folder": str(folder), "log": str(log)})}


def failing(folder: Path, site: Site, name: str, log: Path) -> dict[str, str]:
    """The variable with which the operations of a site fail with the errno ``name``; each is noted in ``log``."""
    wanted = {"folder": str(folder), "site": asdict(site), "errno": name, "log": str(log)}
    return {VARIABLE: json.dumps(wanted)}


def pausing(folder: Path, site: Site, log: Path) -> dict[str, str]:
    """The variable with which a site's first operation waits until there is a file ``log`` + ``.go``."""
    wanted = {"folder": str(folder), "site": asdict(site), "errno": _PAUSE, "log": str(log)}
    return {VARIABLE: json.dumps(wanted)}


def sites(log: Path) -> list[Site]:
    """All that were noted, each once, in their order."""
    if not log.exists():
        return []
    return list(dict.fromkeys(Site(**json.loads(line)) for line in log.read_text().splitlines()))


def prepare(module: str) -> None:
    """Wrap this process's file operations, where `VARIABLE` wants that. ``module``: that is run in it."""
    for owner, name, real in _REAL:  # those of the process that this one was forked from
        setattr(owner, name, real)
    _REAL.clear()
    if VARIABLE in os.environ:
        _Layer(module, **json.loads(os.environ[VARIABLE])).wrap()


_REAL: list[tuple[Any, str, Any]] = []


class _Layer:
    def __init__(
        self, module: str, folder: str, log: str, site: dict[str, str] | None = None, errno: str = ""
    ) -> None:
        self._module, self._folder = module, folder.rstrip("/")
        self._site = Site(**site) if site else None
        self._errno = errno
        self._wanted = True  # whether sites are still of interest
        self._log_name = log
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._os = {name: getattr(os, name) for name in (*_CALLS, "open", "write", "readlink")}
        self._open, self._flock = builtins.open, fcntl.flock

    def wrap(self) -> None:
        wrapped = [(os, name, self._wrapped(getattr(os, name), call)) for name, call in _CALLS.items()]
        wrapped += [(os, "open", self._os_open), (builtins, "open", self._builtin_open)]
        wrapped += [(io, "open", self._builtin_open), (fcntl, "flock", self._wrapped(self._flock, "flock"))]
        for owner, name, function in wrapped:
            _REAL.append((owner, name, getattr(owner, name)))
            setattr(owner, name, function)
        # rmtree and makedirs have taken their choice by what os has
        for known in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
            known |= {getattr(os, name) for name in (*_CALLS, "open") if self._os[name] in known}

    def _wrapped(self, real: Callable[..., Any], call: str) -> Callable[..., Any]:
        @functools.wraps(real)
        def one(*arguments: Any, **options: Any) -> Any:
            place = arguments[0] if arguments else options.get("path", options.get("src", "."))
            folder = options.get("dir_fd", options.get("src_dir_fd"))
            self._try(call, place, folder)
            if call == "link" and len(arguments) > 1:
                self._try(call, arguments[1], options.get("dst_dir_fd"))
            return real(*arguments, **options)

        return one

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & getattr(os, "O_PATH", 0):
            self._try("open to write" if flags & (os.O_WRONLY | os.O_RDWR) else "open to read", path, dir_fd)
        return self._os["open"](path, flags, mode, dir_fd=dir_fd)

    def _builtin_open(self, file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        writes = bool(set(mode) & set("wax+"))
        if not isinstance(file, int) and not options.get("opener"):
            self._try("open to write" if writes else "open to read", file, None)
        opened = self._open(file, mode, *arguments, **options)
        try:
            number = opened.fileno()
        except (OSError, ValueError):
            return opened
        call = "write" if writes else "read"
        error = self._met(call, number, None)
        if error == _PAUSE:
            self._wait()
            return opened
        return _Failing(opened, call, error) if error else opened

    def _try(self, call: str, place: Any, folder: int | None) -> None:
        error = self._met(call, place, folder)
        if error == _PAUSE:
            self._wait()
        elif error:
            number = getattr(errno, error)
            path = None if isinstance(place, int) else os.fspath(place)
            raise OSError(number, os.strerror(number), path)

    def _wait(self) -> None:
        self._errno, self._site = "", None
        self._wanted = False
        deadline = time.monotonic() + _LONGEST_PAUSE
        while not os.access(f"{self._log_name}.go", os.F_OK) and time.monotonic() < deadline:
            time.sleep(0.02)

    def _met(self, call: str, place: Any, folder: int | None) -> str | None:
        """The errno with which it is to fail; it is noted."""
        path = self._path(place, folder) if self._wanted else None
        if path is None:
            return None
        site = Site(self._module, call, path)
        if self._site is None or site == self._site:
            self._os["write"](self._log, (json.dumps(asdict(site)) + "\n").encode())
        return self._errno if site == self._site else None

    def _path(self, place: Any, folder: int | None) -> str | None:
        """The path below the folder; None for one that is somewhere else."""
        try:
            if isinstance(place, int):
                text = self._os["readlink"](f"/proc/self/fd/{place}")
            else:
                text = os.fsdecode(os.fspath(place))
                if folder is not None:
                    text = os.path.join(self._os["readlink"](f"/proc/self/fd/{folder}"), text)
        except (OSError, TypeError):
            return None
        if isinstance(place, int) and not text.startswith("/"):  # a pipe, a socket
            return None
        text = os.path.normpath(os.path.join(os.getcwd(), text))
        if text != self._folder and not text.startswith(self._folder + "/"):
            return None
        return _DRAWN.sub("*", text[len(self._folder) + 1 :]) or "."


class _Failing:
    """A file whose reads, or writes, fail: at once, or where that is when they reach the disk, by its end."""

    def __init__(self, file: Any, call: str, error: str) -> None:
        self._file, self._names = file, ("write", "writelines", "truncate") if call == "write" else (
            "read", "readline", "readlines", "readinto", "readall", "read1")  # fmt: skip
        self._number = getattr(errno, error)

    def __getattr__(self, name: str) -> Any:
        if name in self._names:
            return self._fail
        return getattr(self._file, name)

    def __iter__(self) -> Any:
        if "read" in self._names:
            self._fail()
        return iter(self._file)

    def __enter__(self) -> Any:
        self._file.__enter__()
        return self

    def __exit__(self, *what: Any) -> Any:
        return self._file.__exit__(*what)

    def _fail(self, *arguments: Any) -> None:
        raise OSError(self._number, os.strerror(self._number))
