"""A forked process goes on as a python that was just started; so do those that it starts."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import dropwhile, pairwise
from typing import Any

from tests.support import os_errors
from tests.support.forking.arguments import show_arguments

NODE_LAUNCHER = "deepspeed.launcher.launch"
RANK = "dstrain.train.worker"
BEFORE_A_RANK = "FORKING_BEFORE_A_RANK"
"""An environment variable that names a module: its ``prepare()`` is called before a rank's own code."""

_FLAGS = ("-I", "-u", "-P")
_TORCHRUN = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
_MOST_FILES = 4096
_LAUNCHER_POLL_SECONDS = 0.05
# Bash runs the script itself; where it would become the command, it tells what it would be.
_TELL = r"""exec() { printf '%s\0' "$PWD" "$#" "$@"; env -0; exit 0; }; source "$0" "$@" """


class ForkingPopen(subprocess.Popen):
    """Popen, but for commands that start this python. Its child never comes as far as calling the program."""

    def __init__(self, args: Any, **options: Any) -> None:
        environment = dict(os.environ if options.get("env") is None else options["env"])
        argv = list(args) if isinstance(args, (list, tuple)) else []
        if _is_script(argv):
            argv, options["cwd"], environment = _told_by_script(argv, options.get("cwd"), environment)
        if is_python(argv):
            kept = tuple(options.get("pass_fds", ()))
            options["preexec_fn"] = lambda: become(argv, environment, kept)
        super().__init__(args, **options)


def is_python(argv: Sequence[str]) -> bool:
    """Whether `become` can stand for this command: this python with a module, or with code."""
    words = _without_flags(argv)
    return len(words) > 1 and words[0] in ("-m", "-c") and _is_this_python(argv[0])


def _is_this_python(path: str) -> bool:
    """By whatever way to its folder; the file itself is a link that the pythons of other environments share."""
    if path == sys.executable:
        return True
    folder, name = os.path.split(path)
    ours, our_name = os.path.split(sys.executable)
    return os.path.isabs(path) and name == our_name and os.path.realpath(folder) == os.path.realpath(ours)


def _without_flags(argv: Sequence[str]) -> list[str]:
    """What stands behind python and its flags."""
    return list(dropwhile(lambda word: word in _FLAGS, argv[1:]))


def _is_script(argv: Sequence[str]) -> bool:
    """dstrain's launch.sh, which ends by becoming its last line."""
    return argv[:1] == ["bash"] and len(argv) > 1 and argv[1].endswith("/launch.sh")


def _told_by_script(
    argv: list[str], place: Any, environment: dict[str, str]
) -> tuple[list[str], Any, dict[str, str]]:
    """Argv, folder and environment of what the script becomes. Where it ends before, those of the script itself."""
    said = _REAL_POPEN(
        ["bash", "-c", _TELL, *argv[1:]],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    out, _ = said.communicate()
    if said.returncode:
        return argv, place, environment
    folder, count, *words = out.decode(errors="surrogateescape").rstrip("\0").split("\0")
    exported = dict(word.partition("=")[::2] for word in words[int(count) :])
    return words[: int(count)], folder, exported


_REAL_POPEN = subprocess.Popen


def fork_from_here() -> None:
    """From now on this process forks where it would start a python."""
    subprocess.Popen = ForkingPopen  # type: ignore[misc]
    torchrun = sys.modules.get(_TORCHRUN)
    if torchrun is not None:  # it has its own name for the class
        torchrun.Popen = ForkingPopen  # type: ignore[attr-defined]


def become(argv: list[str], environment: Mapping[str, str], kept: Sequence[int] = ()) -> None:
    """Go on as ``argv`` would begin: signals, files and environment as after an exec. Does not return.

    ``kept``: descriptors that are handed on.
    """
    code = 1
    try:
        _close_all_but(kept)
        _signals_as_at_the_start()
        show_arguments(argv)
        os.environ.clear()
        os.environ.update(environment)
        option, what, *rest = _without_flags(argv)
        os_errors.prepare(_program(option, what, rest))
        sys.executable, sys.argv = argv[0], [what if option == "-m" else option, *rest]
        sys.stdin, sys.stdout, sys.stderr = (
            open(number, mode, buffering=1, closefd=False)  # noqa: SIM115
            for number, mode in enumerate("rww")
        )
        fork_from_here()
        if option == "-c":
            exec(compile(what, "<command>", "exec"), {"__name__": "__main__"})
        else:
            _before(what)
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
    _end(code)


def _close_all_but(kept: Sequence[int]) -> None:
    edges = [2, *sorted(kept), _MOST_FILES]
    for below, above in pairwise(edges):
        os.closerange(below + 1, above)


def _program(option: str, what: str, rest: Sequence[str]) -> str:
    """The module that is run, also where code is given that runs it."""
    if option == "-m":
        return what
    return next((word for word in rest if word.startswith("dstrain.")), "-c")


def _before(module: str) -> None:
    """What is changed in a process before its own code runs."""
    if module == RANK and os.environ.get(BEFORE_A_RANK):
        __import__(os.environ[BEFORE_A_RANK], fromlist=["prepare"]).prepare()
    elif module == NODE_LAUNCHER:
        quick_polls()


def quick_polls() -> None:
    """DeepSpeed's launcher looks at its ranks once a second; in this process it does so more often."""
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(min(seconds, _LAUNCHER_POLL_SECONDS))


def _signals_as_at_the_start() -> None:
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler) and number != signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)


def _end(code: int) -> None:
    """As an interpreter ends, but for the objects that it would take apart."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    for stream in (sys.stdout, sys.stderr):
        try:
            if not stream.closed:
                stream.flush()
        except OSError:
            code = code or 120
    os._exit(code)
