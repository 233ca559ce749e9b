"""The process of one rank: ``python -m dstrain.train.worker <run folder>``.

One positional argument and no flags, since DeepSpeed's launcher eats options. Everything else stands
in the run folder's plan.json, which the supervisor sends to hosts that have no disk in common with it; rank and
world come from the launcher's environment. A person may also type it, for a folder that all hosts share:
``deepspeed --hostfile FILE --module dstrain.train.worker RUN_FOLDER``.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import traceback
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, TextIO

from dstrain.errors import DstrainError, os_error_shown
from dstrain.files import make_folder, open_to_write, umask_in
from dstrain.planning.layout import HOSTS
from dstrain.runs.control_key import KEY, find_key
from dstrain.runs.protocol import ADDRESS, RankState, RankStatus
from dstrain.runs.received import first_owner
from dstrain.runs.run_folder import NODE_RANK, RunFolder
from dstrain.train.control_client import ControlClient
from dstrain.train.local_run_folder import keep_plan, plan_seen
from dstrain.train.rank_environment import (
    enter_directory,
    launch_variables,
    loopback_variables,
    network_variables,
    rank_variables,
    typed_by_hand,
    without_local_rank,
    without_quotes,
)

_TAIL_LINES = 20


def main(arguments: list[str]) -> int:
    """Run this rank to its end; its last word stands in ``logs/rank-N.status.json``."""
    words = without_local_rank(arguments)
    if len(words) != 1:
        print("usage: deepspeed --hostfile FILE --module dstrain.train.worker RUN_FOLDER", file=sys.stderr)
        return 2
    os.environ.update(without_quotes(os.environ))
    folder = RunFolder(Path(words[0]), int(os.environ.get(NODE_RANK, 0)))
    if typed_by_hand(arguments):
        found = first_owner(folder.path, folder.environment, folder.plan)
        if found is not None:
            print(
                f"error: {found[0]} belongs to {found[1]}, and would decide what is run here\n  hint: `dstrain resume"
                f" {folder.path}` reads it as data",
                file=sys.stderr,
            )
            return 2
        try:
            os.environ.update(launch_variables(folder))
        except OSError:
            print(
                f"error: {socket.gethostname()} has no {folder.environment}\n  hint: `dstrain run"
                " --prepare` creates a run folder; all hosts must share it",
                file=sys.stderr,
            )
            return 2
    os.environ.update(rank_variables(os.environ))
    os.environ.update(loopback_variables(os.environ))
    os.environ.update(network_variables(os.environ))
    enter_directory(os.environ)
    rank = int(os.environ["RANK"])
    os.umask(umask_in(folder.path))
    try:
        if HOSTS in os.environ:  # this one may have no such folder yet
            folder.make("private")
        console = _log_to(folder, rank)
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    status = RankStatus(rank=rank, host=socket.gethostname(), pid=os.getpid(), state="running")
    folder.write_status(status)
    control: ControlClient | None = None

    def report(state: RankState, *, step: int = 0, error: str | None = None) -> None:
        last = replace(status, state=state, step=step, error=error)
        try:
            folder.write_status(last)  # on a full disk this may fail; the connection needs no disk
        finally:
            if control is not None:
                control.send_status(last, _tail(folder.rank_log(rank)) if error else "")
                control.close()

    try:
        # Nothing that this rank starts needs the key.
        key = find_key(os.environ, folder.control_key) if os.environ.get(ADDRESS) else None
        os.environ.pop(KEY, None)
        control = ControlClient(os.environ, status, plan_seen(folder), key=key)
        keep_plan(folder, control, rank)
        from dstrain.train.trainer import train  # the heavy imports, after the first word

        last_step, reached_the_end = train(folder, console if rank == 0 else None, control)
    except BaseException as caught:
        cause = _told(caught)
        with suppress(OSError):  # a full disk takes no traceback; the rank must end all the same
            if isinstance(cause, DstrainError):  # it says all that there is to know
                print(f"error: {cause}", file=sys.stderr)
            else:
                traceback.print_exc()
            sys.stderr.flush()
        if control is not None and not control.launch:  # a person typed it, and nobody else would say it
            with suppress(OSError):
                print(f"rank {rank}: {cause}\n  its log: {folder.rank_log(rank)}", file=console, flush=True)
        with suppress(OSError):
            report("failed", error=_in_one_line(cause))
        # Not a return: other ranks may hang in a collective that interpreter shutdown would wait for.
        os._exit(cause.exit_code if isinstance(cause, DstrainError) else 1)
    report("done" if reached_the_end else "stopped", step=last_step)
    return 0


class _Console(io.TextIOWrapper):
    """Standard output for as long as it can be written: a lost ssh or a full disk is no reason to fail."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            return super().write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            super().flush()


def _log_to(folder: RunFolder, rank: int) -> TextIO:
    """Send this process's output to its own log, and give back what was standard output."""
    make_folder(folder.logs, below=folder.path)
    console = _Console(io.FileIO(os.dup(1), "w"), encoding="utf-8", errors="replace", write_through=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    log = open_to_write(folder.rank_log(rank), flags, below=folder.path)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return console


def _tail(log: Path) -> str:
    """The last lines of this rank's log, which may lie on a disk that the supervisor can't see."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-_TAIL_LINES:])


def _told(error: BaseException) -> BaseException:
    """What the disk refused, as a message with its path; any other error, a lost connection too, stays."""
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return os_error_shown(error, exit_code=1)
    return error


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, DstrainError):
        return str(error)
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]


def _leave(code: int) -> NoReturn:
    """End without taking the interpreter apart: threads of torch that still run would abort the process now and then
    ("terminate called without an active exception"), and a rank that has said its last word shall not seem to fail."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))
