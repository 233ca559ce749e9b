"""Every interpreter that a run starts becomes a fork of one that has imported all already.

`dstrain run` starts some ten interpreters (a guard, DeepSpeed's launcher, its launcher on this node, the ranks), and
each imports torch for seconds. Here the process tree is the same and each process runs the same module with the same
arguments, environment, session and open files; but where a new python would be started, the process is forked and
goes on as if it were one. Nothing else of `subprocess` is changed, and the kernel's part of dying is the real one.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tests.distributed.workers  # noqa: F401  sets the environment of the fork server, and what it imports

_CONTEXT = multiprocessing.get_context("forkserver")
_FLAGS = ("-I", "-u")
_MOST_FILES = 4096
COMMAND_LINE = "dstrain.cli.main"
NODE_LAUNCHER = "deepspeed.launcher.launch"
RANK = "dstrain.train.worker"


def start(
    arguments: Sequence[str], *, place: Path, environment: Mapping[str, str], output: Path
) -> BaseProcess:
    """``python -m dstrain.cli.main ARGUMENTS`` in the folder ``place``; leads a session. Output goes to a file."""
    process = _CONTEXT.Process(
        target=_command_line, args=(list(arguments), str(place), dict(environment), str(output)), daemon=True
    )
    process.start()
    return process


def _command_line(arguments: list[str], place: str, environment: dict[str, str], output: str) -> None:
    os.setsid()
    os.chdir(place)
    into = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(into, standard)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(into)
    os.close(nowhere)
    subprocess.Popen = _ForkingPopen  # type: ignore[misc]
    _become([sys.executable, "-m", COMMAND_LINE, *arguments], environment)


class _ForkingPopen(subprocess.Popen):
    """Popen, but for commands that start this python. Its child never comes as far as calling the program."""

    def __init__(self, args: Any, **options: Any) -> None:
        command = _python_command(args)
        if command is not None:
            argv, added = command
            environment = dict(options.get("env") or os.environ) | added
            options["preexec_fn"] = lambda: _become(argv, environment)
        super().__init__(args, **options)


def _python_command(args: Any) -> tuple[list[str], dict[str, str]] | None:
    """The argv of a command that starts this python, and what it adds to the environment; None for others."""
    if not isinstance(args, (list, tuple)):
        return None
    if len(args) == 2 and args[0] == "bash" and args[1].endswith("launch.sh"):
        return _of_script(Path(args[1]))
    if args[0] == sys.executable and ("-m" in args or "-c" in args):
        return list(args), {}
    return None


def _of_script(script: Path) -> tuple[list[str], dict[str, str]]:
    """What dstrain's launch.sh says: its exports, and the command at its end."""
    exports: dict[str, str] = {}
    for line in script.read_text(encoding="utf-8").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["cd"]:
            assert Path(words[-1]) == Path.cwd()
        elif words[:1] == ["export"]:
            name, _, value = words[1].partition("=")
            exports[name] = value
        elif words[:1] == ["exec"]:
            return words[1:], exports
    raise AssertionError(f"{script} ends without a command")


def _become(argv: list[str], environment: Mapping[str, str]) -> None:
    """Go on as ``argv`` would begin: signals, files and environment as after an exec. Does not return."""
    code = 1
    try:
        os.closerange(3, _MOST_FILES)
        _signals_as_at_the_start()
        os.environ.clear()
        os.environ.update(environment)
        words = argv[1:]
        while words[0] in _FLAGS:
            words = words[1:]
        option, what, *rest = words
        _set_name(what if option == "-m" else "dstrain.launch.guard")
        sys.argv = [what, *rest]
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, buffering=1, closefd=False)  # noqa: SIM115
            for number, mode in enumerate("rww")
        )
        if option == "-c":
            exec(compile(what, "<command>", "exec"), {"__name__": "__main__"})
        else:
            _before(what)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
    _end(code)


def _before(module: str) -> None:
    """What the torture adds to a process before its own code runs."""
    if module == RANK:
        from tests.torture import in_rank

        in_rank.prepare()
    elif module == NODE_LAUNCHER:
        # It looks at its ranks once a second.
        sleep = time.sleep
        time.sleep = lambda seconds: sleep(min(seconds, 0.05))


def _signals_as_at_the_start() -> None:
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)


def _set_name(module: str) -> None:
    """The process's name in /proc (15 letters): a fork has the command line of the fork server."""
    Path("/proc/self/comm").write_text(module.split(".", 1)[1])


def _end(code: int) -> None:
    """As an interpreter ends, but for the objects that it would take apart."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = code or 120
    os._exit(code)
