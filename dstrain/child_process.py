"""Runs code that imports heavy libraries, or is the user's own, in a child process, and leaves nothing of it behind."""

from __future__ import annotations

import functools
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from dstrain.errors import DstrainError, os_error_shown, place_of

# How a line begins that is no error but says how far the work has come (dstrain.data.progress).
_PROGRESS = "dstrain: "
# How the message begins that a child ends with; its further lines follow.
_ERROR = "error: "
_HINT = "\n  hint: "
_POLL_SECONDS = 0.05
_BLOCK = 2**16
# For a child that nobody waits for any more to remove what it has half written.
_CLEAN_SECONDS = 3.0

# Nothing but sys, which is part of the interpreter, may be imported before the current folder is out. In one line and
# without single quotes: any remote shell takes it.
_MODULE = (
    'import sys; sys.path[:1] == [""] and sys.path.pop(0); import runpy; module = sys.argv[1]; '
    'sys.argv[:2] = [module]; runpy.run_module(module, run_name="__main__", alter_sys=True)'
)
# The child ends with its parent, however that ends. dstrain may be found nowhere else.
_CHILD = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
import ctypes, os, runpy, signal
parent, root, module, *arguments = sys.argv[1:]
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
except (AttributeError, OSError):
    pass
if os.getppid() != int(parent):
    sys.exit(1)
sys.path.append(root)
sys.argv = [module, *arguments]
class Stop(BaseException): pass
def stop(number, frame):
    signal.signal(number, signal.SIG_DFL)
    raise Stop  # what it has half written goes
signal.signal(signal.SIGTERM, stop)
def block(how):  # while a fork of the user's code has this handler: Python forgets what it is sent then
    signal.pthread_sigmask(how, [signal.SIGTERM])
def end_as_ever():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    block(signal.SIG_UNBLOCK)
os.register_at_fork(
    before=lambda: block(signal.SIG_BLOCK),
    after_in_parent=lambda: block(signal.SIG_UNBLOCK),
    after_in_child=end_as_ever,
)
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except Stop:
    os.kill(os.getpid(), signal.SIGTERM)
"""
_ROOT = str(Path(__file__).resolve().parents[1])


def module_command(module: str, *, python: str = sys.executable) -> list[str]:
    """``python -m module``, but without the current folder among the places where modules are looked for: that is the
    first one otherwise, and a random.py there hides Python's. Arguments go behind it."""
    return [python, "-c", _MODULE, module]


# multiprocessing hands -P on to the processes that it starts; with "" in sys.path they would look here first.
_SAFE_PATH = ["-P"] if sys.version_info >= (3, 11) else []


class ChildProcess:
    """``python -m module`` in a session of its own. Used as a context, nothing that it has started is left behind.

    It ends with the thread that has started it.

    Args:
        own_stderr: it writes to this process's standard error, and `lines` gives nothing.

    Attributes:
        returncode: -N after signal N; None until the context has ended.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        own_stderr: bool = False,
    ) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *_SAFE_PATH, "-c", _CHILD, str(os.getpid()), _ROOT, module, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if own_stderr else subprocess.PIPE,
            start_new_session=True,
        )

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def __enter__(self) -> ChildProcess:
        return self

    def __exit__(self, *exception: object) -> None:
        if any(exception):
            self._terminate()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stderr is not None:
            self._process.stderr.close()

    def lines(self) -> Iterator[str]:
        """What it writes to standard error, until it has ended, whoever else holds that open."""
        assert self._process.stderr is not None
        rest, file = b"", self._process.stderr.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(file, selectors.EVENT_READ)
            open_ = True
            while open_:
                ended = self.has_ended()
                if selector.select(0 if ended else _POLL_SECONDS):
                    new = os.read(file, _BLOCK)
                    open_ = bool(new)
                    *whole, rest = (rest + new).split(b"\n")
                    yield from (line.decode(errors="replace") for line in whole)
                elif ended:
                    break
        if rest:
            yield rest.decode(errors="replace")
        # Its group is ended next: it may have closed standard error, and work on.
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)

    def _terminate(self) -> None:
        """Let it remove what it has half written, unless that takes long."""
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        until = time.monotonic() + _CLEAN_SECONDS
        while not self.has_ended() and time.monotonic() < until:
            time.sleep(_POLL_SECONDS)

    def has_ended(self) -> bool:
        """Asked inside of the context. It stays a zombie, so that no other process gets the number of its group."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def start_worker(
    module: str, arguments: Sequence[str], descriptor: int, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """``python -m module`` as a helper of this process, which hands it a descriptor: in its session and process group,
    and ended with the thread that starts it.

    Args:
        environment: variables beside those of this process.
    """
    return subprocess.Popen(
        [sys.executable, *_SAFE_PATH, "-c", _CHILD, str(os.getpid()), _ROOT, module, *arguments],
        env=os.environ | {"PYTHONWARNINGS": "ignore"} | dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        pass_fds=[descriptor],
    )


def child_main(main: Callable[[list[str]], int]) -> Callable[[list[str]], int]:
    """For the main function of a module that `run_module` runs: what it raises becomes a message and an exit code."""

    @functools.wraps(main)
    def told(arguments: list[str]) -> int:
        try:
            return main(arguments)
        except DstrainError as error:
            message = error
        except OSError as error:
            message = os_error_shown(error)
        except Exception as error:
            traceback.print_exc()
            said = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {said[0]}" if said else type(error).__name__
            message = DstrainError(reason, where=place_of(error), exit_code=1)
        print(f"{_ERROR}{message}", file=sys.stderr)
        return message.exit_code

    return told


def run_module(
    module: str,
    *arguments: str,
    say: Callable[[str], object] = lambda text: None,
    user_code: bool = False,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run ``python -m module`` to its end. The error that its main function ends with (`child_main`) becomes ours.

    Args:
        say: told of its progress, a line at a time.
        user_code: it runs code of the user's: all that it prints to standard error is said.
        environment: variables beside those of this process.

    Raises:
        DstrainError: it ended with another exit code than 0.
    """
    lines: deque[str] = deque(maxlen=1000)  # the user's code may print without end
    variables = os.environ | {"PYTHONWARNINGS": "ignore"} | dict(environment or {})
    with ChildProcess(module, arguments, variables) as process:
        for line in process.lines():
            if user_code or line.startswith(_PROGRESS):
                say(line.removeprefix(_PROGRESS).rstrip())
            if not line.startswith(_PROGRESS):
                lines.append(line.rstrip())
    if process.returncode:
        raise _error(module, process.returncode, list(lines))


def _error(module: str, code: int, lines: Sequence[str]) -> DstrainError:
    """What a child ended with. Its message stands below whatever libraries have said."""
    last = max((index for index, line in enumerate(lines) if line.startswith(_ERROR)), default=None)
    if code < 0 or last is None:
        return DstrainError(f"{module} failed: {_last_words(code, lines)}", exit_code=1)
    message, _, hint = "\n".join(lines[last:]).removeprefix(_ERROR).partition(_HINT)
    return DstrainError(message, hint=hint or None, exit_code=code)


def _last_words(code: int, lines: Sequence[str]) -> str:
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"it was ended by {name}"
    return lines[-1] if lines else "without an error message"
