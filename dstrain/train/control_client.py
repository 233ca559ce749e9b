"""A rank's connection to the supervisor: reports its status, and ends the rank when the supervisor is gone.

`dstrain.runs.protocol` has the messages.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from dstrain.errors import DstrainError
from dstrain.runs.protocol import (
    ADDRESS,
    WAITING_FOR_DATA,
    WAITS_FOR,
    Busy,
    ControlAddress,
    DumpStacks,
    Hello,
    LocalRank,
    Message,
    Orphaned,
    ProtocolError,
    RankMessage,
    RankStatus,
    Stacks,
    Status,
    Step,
    Stop,
)
from dstrain.train.control_connection import ControlConnection, join
from dstrain.train.local_ranks import LocalRankMonitor

GONE = 1
"""The exit code of a rank that lost its supervisor: its status says why."""
_SECONDS_BETWEEN_STEPS = 0.5
_SECONDS_BETWEEN_LOOKS = 0.5


class ControlClient:
    """Without a supervisor (launch.sh started manually) nothing is sent and nothing is awaited.

    A thread listens, and looks at the processes beside this one. When the connection ends, or this rank's launcher, it
    ends this process: whatever the other threads wait for (a collective of a rank that is gone, a disk), it will not
    come. So it does where the thread itself fails: a rank that listens to nobody would outlive its run.
    """

    def __init__(
        self,
        environment: Mapping[str, str],
        status: RankStatus,
        plan_seen: str | None = None,
        *,
        key: bytes | None = None,
    ) -> None:
        """Connect, let the supervisor prove that it is one, send the hello, and take in the answer.

        Args:
            plan_seen: `plan_digest` of the plan.json that this host sees; None where it sees none.
            key: of the launch (`dstrain.runs.control_key`); not needed without a supervisor.

        Raises:
            DstrainError: there is a supervisor, and it can't be reached, or does not prove to be this launch's.
        """
        self.asked_to_stop = False
        self.plan: str | None = None
        """The supervisor's plan.json, where it is another than the one that was seen."""
        self.waits_for: Callable[[], str] = str
        """Says what a step waits for that waits for data; asked in another thread when nothing goes on."""
        self._activity: str | None = None
        self.launch = ""
        """Names this launch; empty without a supervisor."""
        self._connection: ControlConnection | None = None
        self._step_sent_at = 0.0
        self._local_ranks = LocalRankMonitor()
        text = environment.get(ADDRESS)
        if not text:
            return
        try:
            address = ControlAddress.parse(text)
        except ProtocolError as error:
            raise DstrainError(str(error), where=ADDRESS) from None
        if key is None:
            raise ValueError("a supervisor is spoken to with the key of its launch")
        self.launch = address.launch
        connection, welcome = join(address, key, Hello(self.launch, status, plan_seen))
        self._connection, self.plan = connection, welcome.plan
        threading.Thread(target=self._listen_or_end, args=(connection,), name="control", daemon=True).start()

    def send_status(self, status: RankStatus, log_tail: str = "") -> None:
        """The rank's new state; with a failure the end of its log, which may lie on a disk of its own."""
        if status.state == "failed":
            self._send(*self._local_ranks.changes())  # why another died, if this rank fails for want of it
        self._send(Status(replace(status, time=time.time()), log_tail))

    def step_ended(self, step: int) -> None:
        """Fast steps are reported now and then, to keep the supervisor idle."""
        now = time.monotonic()
        if now - self._step_sent_at >= _SECONDS_BETWEEN_STEPS:
            self._step_sent_at = now
            self._send(Step(step))

    @contextlib.contextmanager
    def busy(self, activity: str) -> Iterator[None]:
        """Between steps: a validation loss or a checkpoint may take far longer than a step, and is no hang."""
        self._activity = activity
        self._send(Busy(activity))
        try:
            yield
        finally:
            self._activity = None
            self._send(Busy(None))

    def run_ending(self) -> None:
        """No step follows: what is left to do takes its time, once."""
        self._send(Busy("the end of the run"))

    def close(self) -> None:
        """The rank's last status was sent: from now on the connection's end is nobody's."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _send(self, *messages: RankMessage) -> None:
        connection = self._connection
        if connection is None or not messages:
            return
        # An error is the connection's end, which the thread that listens finds.
        with contextlib.suppress(OSError):
            connection.send(*messages)

    def _listen_or_end(self, connection: ControlConnection) -> None:
        try:
            self._listen(connection)
        except EOFError:
            self._end("the supervisor has ended the run or exited")
        except ProtocolError as error:
            self._end(f"the supervisor sent an invalid message ({error})")
        except OSError as error:
            self._end(f"no contact with the supervisor any more ({error.strerror or error})")
        except BaseException as error:
            self._end(f"it can't listen to the supervisor any more ({type(error).__name__}: {error})")

    def _listen(self, connection: ControlConnection) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        while self._connection is not None:
            for message in connection.received():
                self._handle(message)
            if poll.poll(_SECONDS_BETWEEN_LOOKS * 1000):
                connection.receive()
            else:
                self._look_around()

    def _handle(self, message: Message) -> None:
        """What the supervisor says. Raises ProtocolError where it is nothing for a rank."""
        match message:
            case Stop():
                self.asked_to_stop = True
            case DumpStacks():
                waits_for = self.waits_for() if self._activity == WAITING_FOR_DATA else ""
                self._send(Stacks(_stacks() + (f"\n{WAITS_FOR}{waits_for}\n" if waits_for else "")))
            case LocalRank():
                self._local_ranks.add(message)
            case _:
                raise ProtocolError(f"a supervisor sends no {message.type} here")

    def _look_around(self) -> None:
        self._send(*self._local_ranks.changes())
        if self._local_ranks.launcher_is_gone():
            self._send(Orphaned())
            self._end("its launcher has exited")

    def _end(self, why: str) -> None:
        if self._connection is None:
            return  # closed by us
        with contextlib.suppress(OSError):  # no word, on a full disk
            print(f"dstrain: this rank ends: {why}", file=sys.stderr, flush=True)
        try:
            self._local_ranks.kill_stopped()
        finally:
            os._exit(GONE)


def _stacks() -> str:
    """Where every thread of this process stands."""
    with tempfile.TemporaryFile("w+b") as file:  # faulthandler writes to a descriptor
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
