"""The key of a launch's control connection: drawn by the supervisor, known to the ranks of that launch, and to nobody else.

It never stands in an argv, nor in a file that another user can read. A rank finds it in its environment where that is
handed down privately (a child process, Slurm), and else in a file of mode 0600 in the run folder of its host.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path

from dstrain.errors import DstrainError

KEY = "DSTRAIN_CONTROL_KEY"
"""The environment variable that holds the key in hexadecimal digits, where the environment travels privately."""
KEY_BYTES = 32


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


def find_key(environment: Mapping[str, str], file: Path) -> bytes:
    """The key of this launch: from the environment, or from ``file``.

    Raises:
        DstrainError: there is none, it is no key, or the file is a link, another user's, or can be read by others.
    """
    text = environment.get(KEY)
    if text is None:
        text = _read_private(file)
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        where = KEY if KEY in environment else str(file)
        raise DstrainError("this is not the key of a control connection", where=where)
    return key


def _read_private(file: Path) -> str:
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise DstrainError(
            f"the key of the control connection can't be read: {error.strerror}", where=str(file)
        ) from error
    with open(descriptor, encoding="ascii", errors="replace") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise DstrainError(
                "the key of the control connection is not a file that this user alone can read",
                where=str(file),
            )
        return opened.read(1024)
