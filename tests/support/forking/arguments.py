"""The command line that /proc/PID/cmdline shows of a process, after a fork."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path


def show_arguments(argv: Sequence[str]) -> None:
    """Write ``argv`` over the command line that this process was forked with.

    Where it is longer, it runs on over the environment that the process was started with, as one string with spaces
    in between: proc(5), "/proc/pid/cmdline". That environment is not the one in use (getenv(3) has its own copies).
    """
    # proc(5), /proc/pid/stat: fields 48 to 51 are arg_start, arg_end, env_start, env_end; those before the third hold
    # the name, which may hold spaces.
    words = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
    start, end, environment_start, environment_end = map(int, words[45:49])
    shown = b"\0".join(map(os.fsencode, argv)) + b"\0"
    if len(shown) > end - start and environment_start == end:
        end = environment_end
        shown = shown.replace(b"\0", b" ")
    room = end - start
    ctypes.memmove(start, shown[: room - 1].ljust(room, b"\0"), room)
