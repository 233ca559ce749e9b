"""A rank's connection to the supervisor: reports its status, and ends the rank when the supervisor is gone.

`dstrain.runs.protocol` has the messages.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

from dstrain.errors import DstrainError
from dstrain.runs.protocol import (
    ADDRESS,
    MAX_SUPERVISOR_MESSAGE_BYTES,
    Busy,
    ControlAddress,
    DumpStacks,
    Hello,
    LocalRank,
    Message,
    MessageReader,
    Orphaned,
    ProtocolError,
    RankMessage,
    RankStatus,
    Stacks,
    Status,
    Step,
    Stop,
    Welcome,
    encode,
    keep_alive,
)
from dstrain.train.local_ranks import LocalRankMonitor

GONE = 1
"""The exit code of a rank that lost its supervisor: its status says why."""
_CONNECT_SECONDS = 5.0
_ANSWER_SECONDS = 120.0  # of a supervisor that a thousand ranks ask at once
_SECONDS_BETWEEN_STEPS = 0.5
_SECONDS_BETWEEN_LOOKS = 0.5
_RECEIVE_BYTES = 64 * 1024


class ControlClient:
    """Without a supervisor (launch.sh started manually) nothing is sent and nothing is awaited.

    A thread listens, and looks at the processes beside this one. When the connection ends, or this rank's launcher, it
    ends this process: whatever the other threads wait for (a collective of a rank that is gone, a disk), it will not
    come. So it does where the thread itself fails: a rank that listens to nobody would outlive its run.
    """

    def __init__(
        self, environment: Mapping[str, str], status: RankStatus, plan_seen: str | None = None
    ) -> None:
        """Connect, send the hello, and take in the answer.

        Args:
            plan_seen: `plan_digest` of the plan.json that this host sees; None where it sees none.

        Raises:
            DstrainError: there is a supervisor, and it can't be reached.
        """
        self.asked_to_stop = False
        self.plan: str | None = None
        """The supervisor's plan.json, where it is another than the one that was seen."""
        self.launch = ""
        """Names this launch; empty without a supervisor."""
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._step_sent_at = 0.0
        self._local_ranks = LocalRankMonitor()
        text = environment.get(ADDRESS)
        if not text:
            return
        try:
            address = ControlAddress.parse(text)
        except ProtocolError as error:
            raise DstrainError(str(error), where=ADDRESS) from None
        self.launch = address.launch
        self._connection = _connect(address)
        keep_alive(self._connection)
        self._send(Hello(self.launch, status, plan_seen))
        reader = MessageReader(MAX_SUPERVISOR_MESSAGE_BYTES)
        self.plan = _welcome(self._connection, reader).plan
        threading.Thread(
            target=self._listen_or_end, args=(self._connection, reader), name="control", daemon=True
        ).start()

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
        self._send(Busy(activity))
        try:
            yield
        finally:
            self._send(Busy(None))

    def run_ending(self) -> None:
        """No step follows: what is left to do takes its time, once."""
        self._send(Busy("the end of the run"))

    def close(self) -> None:
        """The rank's last status was sent: from now on the connection's end is nobody's."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def _send(self, *messages: RankMessage) -> None:
        connection = self._connection
        if connection is None or not messages:
            return
        # An error is the connection's end, which the thread that listens finds.
        with self._sending, contextlib.suppress(OSError):
            connection.sendall(b"".join(map(encode, messages)))

    def _listen_or_end(self, connection: socket.socket, reader: MessageReader) -> None:
        try:
            self._listen(connection, reader)
        except ProtocolError as error:
            self._end(f"the supervisor sent an invalid message ({error})")
        except OSError as error:
            self._end(f"no contact with the supervisor any more ({error.strerror or error})")
        except BaseException as error:
            self._end(f"it can't listen to the supervisor any more ({type(error).__name__}: {error})")

    def _listen(self, connection: socket.socket, reader: MessageReader) -> None:
        poll = select.poll()
        poll.register(connection, select.POLLIN)
        while self._connection is not None:
            while (message := reader.next_message()) is not None:
                self._handle(message)
            if not poll.poll(_SECONDS_BETWEEN_LOOKS * 1000):
                self._look_around()
                continue
            received = connection.recv(_RECEIVE_BYTES)
            if not received:
                self._end("the supervisor has ended the run or exited")
                return
            reader.feed(received)

    def _handle(self, message: Message) -> None:
        """What the supervisor says. Raises ProtocolError where it is nothing for a rank."""
        match message:
            case Stop():
                self.asked_to_stop = True
            case DumpStacks():
                self._send(Stacks(_stacks()))
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


def _connect(address: ControlAddress) -> socket.socket:
    """To the first of its hosts that answers. Raises DstrainError where none does."""
    tried = []
    for host in address.hosts:
        try:
            connection = socket.create_connection((host, address.port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            tried.append(f"{host}: {error.strerror or error}")
            continue
        connection.settimeout(None)
        return connection
    raise DstrainError(
        f"{socket.gethostname()} can't reach the supervisor at port {address.port} ({'; '.join(tried)})",
        hint="allow connections from this host to the machine on which `dstrain run` was started, or"
        " start launch.sh manually",
    )


def _welcome(connection: socket.socket, reader: MessageReader) -> Welcome:
    """The supervisor's answer to the hello; what comes after it stays in ``reader``. Raises DstrainError where it does
    not come."""
    connection.settimeout(_ANSWER_SECONDS)
    try:
        while (answer := reader.next_message()) is None:
            received = connection.recv(_RECEIVE_BYTES)
            if not received:
                raise ConnectionError("it closed the connection")
            reader.feed(received)
    except OSError as error:
        raise DstrainError(f"the supervisor does not answer {socket.gethostname()}: {error}") from error
    except ProtocolError as error:
        raise DstrainError(f"what answers {socket.gethostname()} is not a supervisor: {error}") from error
    if not isinstance(answer, Welcome):
        raise DstrainError(f"what answers {socket.gethostname()} is not a supervisor: it sent {answer.type}")
    connection.settimeout(None)
    return answer


def _stacks() -> str:
    """Where every thread of this process stands."""
    with tempfile.TemporaryFile("w+b") as file:  # faulthandler writes to a descriptor
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")
