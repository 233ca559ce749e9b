"""The process of one rank: ``python -m dstrain.train.worker <run folder>``.

One positional argument and no flags, since DeepSpeed's launcher eats options. Everything else stands
in the run folder's plan.json; rank and world come from the launcher's environment.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from dstrain.errors import DstrainError
from dstrain.plan.run_folder import RankStatus, RunFolder


def main(arguments: list[str]) -> int:
    """Run this rank to its end; its last word stands in ``logs/rank-N.status.json``."""
    if len(arguments) != 1:
        print("usage: python -m dstrain.train.worker RUN_FOLDER", file=sys.stderr)
        return 2
    folder = RunFolder(Path(arguments[0]))
    rank = int(os.environ.get("RANK", "0"))
    console = _log_to(folder.rank_log(rank))
    status = RankStatus(rank=rank, host=socket.gethostname(), pid=os.getpid(), state="running")
    folder.write_status(status)
    try:
        from dstrain.train.loop import train  # the heavy imports, after the first word

        last_step, reached_the_end = train(folder, console if rank == 0 else None)
    except BaseException as error:
        with suppress(OSError):  # a full disk takes no traceback; the rank must end all the same
            if isinstance(error, DstrainError):  # it says all that there is to know
                print(f"error: {error}", file=sys.stderr)
            else:
                traceback.print_exc()
            sys.stderr.flush()
        with suppress(OSError):
            folder.write_status(_with(status, state="failed", error=_in_one_line(error)))
        # Not a return: other ranks may hang in a collective that interpreter shutdown would wait for.
        os._exit(error.exit_code if isinstance(error, DstrainError) else 1)
    folder.write_status(_with(status, state="done" if reached_the_end else "stopped", step=last_step))
    return 0


def _log_to(path: Path) -> TextIO:
    """Send this process's output to its own log, and give back what was standard output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    console = os.fdopen(os.dup(1), "w", buffering=1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


def _with(status: RankStatus, *, state: str, step: int = 0, error: str | None = None) -> RankStatus:
    return RankStatus(status.rank, status.host, status.pid, state, step, error)


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, DstrainError):
        return str(error)
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
