"""A session with one machine: starts ``dstrain.diagnostics.host`` there over ssh, and queries it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from dstrain.child_process import module_command
from dstrain.diagnostics.host import MARK
from dstrain.launch.ssh_reachability import NOT_INSTALLED, Trouble, ssh_command, trouble
from dstrain.strict_json import to_json

_MODULE = "dstrain.diagnostics.host"
_END_SECONDS = 3.0
_WAITING_SECONDS = 15.0


class NoAnswerError(Exception):
    """A host gave no answer, and will give none to later questions either."""

    def __init__(self, trouble: Trouble) -> None:
        super().__init__(trouble.message)
        self.trouble = trouble


class Conversation:
    """Begins at once, and does not wait; ``with`` ends it, and with it all that was started there.

    Args:
        host: its name, as the hostfile has it.
        environment: what ranks would have there.
        directory: where they would start.
        python: the absolute path of the interpreter, the same on all hosts.
        over_ssh: False: this machine is asked without ssh.
    """

    def __init__(
        self,
        host: str,
        *,
        environment: Mapping[str, str],
        directory: str,
        python: str = sys.executable,
        over_ssh: bool = True,
    ) -> None:
        self.host, self._python = host, python
        self._trouble: Trouble | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        program = module_command(_MODULE, python=python)
        if over_ssh:
            # Where there is no such folder, the shell says so and goes on; the host says it as well.
            line = f"cd {shlex.quote(directory)} ; exec env {_assignments(environment)} {shlex.join(program)}"
            program = ssh_command(host, line)
        try:
            self._process = subprocess.Popen(
                program,
                env=None if over_ssh else {**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                start_new_session=True,  # Ctrl-C is for the one who asks
            )
        except FileNotFoundError:
            self._errors.close()
            fix = "install it (Debian: apt-get install openssh-client)"
            self._trouble = Trouble(NOT_INSTALLED if over_ssh else f"there is no {python}", fix)
            return
        threading.Thread(target=self._listen, name=f"answers of {host}", daemon=True).start()

    def ask(self, question: str, *, seconds: float, **arguments: Any) -> dict[str, Any]:
        """The answer to a question of `dstrain.diagnostics.host`. Raises NoAnswerError, also after ``seconds``."""
        if self._trouble is not None:
            raise NoAnswerError(self._trouble)
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(OSError):  # it has ended: the end of its answers tells why
            stdin.write(to_json({"ask": question, **arguments}).encode() + b"\n")
            stdin.flush()
        try:
            answer = self._answers.get(timeout=seconds)
        except queue.Empty:
            fix = f"find out why: ssh {self.host} {self._python} -m dstrain.cli.main --version"
            self._trouble = Trouble(f"no answer within {seconds:.0f} s", fix)
            raise NoAnswerError(self._trouble) from None
        if answer is None:
            self._trouble = self._why_ended()
            raise NoAnswerError(self._trouble)
        return answer

    def kill(self) -> None:
        """End it at once: who waits for an answer gets none."""
        if not self._errors.closed:
            self._process.kill()

    def close(self) -> None:
        """End it. What it has started there ends with its input."""
        if self._errors.closed:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # something was still to be said to one that has ended
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> Conversation:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                text = line.decode(errors="replace")
                if text.startswith(MARK):
                    self._answers.put(json.loads(text[len(MARK) :]))
        self._answers.put(None)

    def _why_ended(self) -> Trouble:
        code = self._process.wait()
        self._errors.seek(0)
        return trouble(self.host, code, self._errors.read().decode(errors="replace"), self._python)


def ask_all(
    conversations: Sequence[Conversation], question: str, *, seconds: float, **arguments: Any
) -> list[dict[str, Any] | Trouble]:
    """Ask all the same at the same time: what each answers, or why it doesn't, in their order."""
    return ask_each(conversations, question, [arguments] * len(conversations), seconds=seconds)


def ask_each(
    conversations: Sequence[Conversation],
    question: str,
    arguments: Sequence[Mapping[str, Any]],
    *,
    seconds: float,
    waiting: Callable[[float], None] = lambda passed: None,
) -> list[dict[str, Any] | Trouble]:
    """The same, each with arguments of its own. ``waiting`` is called every 15 s with the seconds that have passed."""

    def ask(conversation: Conversation, own: Mapping[str, Any]) -> dict[str, Any] | Trouble:
        try:
            return conversation.ask(question, seconds=seconds, **own)
        except NoAnswerError as error:
            return error.trouble

    with ThreadPoolExecutor(max_workers=max(1, len(conversations))) as pool:
        try:
            asked = [pool.submit(ask, *one) for one in zip(conversations, arguments, strict=True)]
            started = time.monotonic()
            while wait(asked, timeout=_WAITING_SECONDS).not_done:
                waiting(time.monotonic() - started)
            return [each.result() for each in asked]
        except BaseException:  # Ctrl-C: the pool waits for its threads, and they for answers
            for conversation in conversations:
                conversation.kill()
            raise


def _assignments(environment: Mapping[str, str]) -> str:
    return " ".join(shlex.quote(f"{name}={value}") for name, value in sorted(environment.items()))
