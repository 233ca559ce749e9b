"""The exception that is shown to the user, and the exit codes; what an error of the operating system becomes."""

from __future__ import annotations

import errno
import io
import os
import traceback
from pathlib import Path

RESUMABLE = 75
"""The exit code of a run that left in order before its end: BSD's EX_TEMPFAIL, "try again later"."""


class DstrainError(Exception):
    """An error that the user can fix: shown as a message without a traceback, exit code 2.

    Args:
        message: what is wrong, and why, in one or two sentences.
        hint: the nearest thing that works. Without one, an error that was raised for an OSError has that one's.
        where: the place that it came from: ``file:line``, a flag, or an environment variable.
        exit_code: the process's exit code; 2 before anything was started, 1 for a run that failed.
    """

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        where: str | None = None,
        exit_code: int = 2,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = where
        self.exit_code = exit_code

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        way = self.hint
        if way is None and isinstance(self.__context__, OSError):
            way = _WAYS_OUT.get(self.__context__.errno or 0)
        hint = f"\n  hint: {way}" if way else ""
        return f"{place}{self.message}{hint}"


_PACKAGE = Path(__file__).parent
_WAYS_OUT = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room on this disk, or use a folder on another one"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "check who may read and write it, or use another place"),
    errno.EROFS: "this disk is mounted read-only: use a folder on another one",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files: ulimit -n 65536"),
    **dict.fromkeys((errno.EIO, errno.ESTALE), "check this disk or network file system, then try again"),
    errno.EFBIG: "allow larger files (ulimit -f), or use a file system that can hold them",
    errno.ENOLCK: "this file system has no locks: use a folder on another one",
    errno.EBUSY: "another program uses it: try again when it has ended",
    errno.ENOMEM: "more memory, or fewer processes on this machine",
}


def way_out(error: OSError, otherwise: str = "check the path") -> str:
    """The hint for an error of the operating system; ``otherwise`` where only the place of the error says more."""
    return _WAYS_OUT.get(error.errno or 0, otherwise)


def os_error_shown(error: OSError, *, exit_code: int = 2) -> DstrainError:
    """An error of the operating system that nobody expected, with its path: one message to the user.

    Where the error has no path, the line of dstrain that met it is named.
    """
    named = (error.filename, error.filename2, _file_met(error))
    path = next(
        (os.fsdecode(name)[:300] for name in named if isinstance(name, str | bytes | os.PathLike)), None
    )
    where = place_of(error) if path is None else path if path.isprintable() else ascii(path)
    return DstrainError(
        error.strerror or str(error) or type(error).__name__,
        where=where,
        hint=way_out(error),
        exit_code=exit_code,
    )


def _file_met(error: OSError) -> object:
    """The file that was read or written when the error came up: reads and writes do not name it."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for value in frame.f_locals.values():
            if isinstance(value, io.IOBase) and isinstance(getattr(value, "name", None), str | bytes):
                return value.name  # type: ignore[attr-defined]
        if isinstance(owner := frame.f_locals.get("self"), Path):
            return owner
    return None


def place_of(error: BaseException) -> str | None:
    """The innermost line of dstrain's that an exception passed, as ``dstrain/FILE:LINE``."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    if not frames:
        return None
    return f"{Path(frames[-1].filename).relative_to(_PACKAGE.parent)}:{frames[-1].lineno}"
