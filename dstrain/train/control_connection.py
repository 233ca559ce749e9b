"""A rank's way to its supervisor: tries the addresses until one of them proves to be it, and carries the messages."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator

from dstrain.errors import DstrainError
from dstrain.runs.channel import MAX_RECORD_BYTES, AuthenticationError, RankEnd
from dstrain.runs.protocol import (
    MAX_SUPERVISOR_MESSAGE_BYTES,
    ControlAddress,
    Hello,
    Message,
    MessageReader,
    ProtocolError,
    RankMessage,
    Welcome,
    encode,
    keep_alive,
)

_CONNECT_SECONDS = 5.0
_PROOF_SECONDS = 10.0
"""For one connection to prove that it is the supervisor's, before another is tried."""
_RETRY_SECONDS = 15.0
"""For all that close the connection or prove nothing: a supervisor that is flooded may push a rank out."""
_ANSWER_SECONDS = 120.0
"""Of a supervisor that a thousand ranks ask at once, or that is stopped with Ctrl-Z."""
_LONGEST_PAUSE_SECONDS = 1.0
_RECEIVE_BYTES = 64 * 1024


class ControlConnection:
    """To a supervisor that has proved that it knows the launch's key. Any thread may send; one receives."""

    def __init__(self, connection: socket.socket, key: bytes, launch: str) -> None:
        """Shake hands.

        Raises:
            OSError: nothing proved it in time.
            AuthenticationError: what is there is another.
        """
        self._connection = connection
        self._channel = RankEnd(key, launch)
        self._reader = MessageReader(MAX_SUPERVISOR_MESSAGE_BYTES)
        self._sending = threading.Lock()
        keep_alive(connection)
        deadline = time.monotonic() + _PROOF_SECONDS
        connection.settimeout(_PROOF_SECONDS)
        connection.sendall(self._channel.take_handshake())
        while not self._channel.established:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            self.receive()
        connection.sendall(self._channel.take_handshake())
        connection.settimeout(None)

    def fileno(self) -> int:
        return self._connection.fileno()

    def send(self, *messages: RankMessage) -> None:
        """Raises OSError where the connection has ended."""
        content = b"".join(map(encode, messages))
        with self._sending:  # records have an order
            self._connection.sendall(
                b"".join(
                    self._channel.seal(content[at : at + MAX_RECORD_BYTES])
                    for at in range(0, len(content), MAX_RECORD_BYTES)
                )
            )

    def received(self) -> Iterator[Message]:
        """The messages that are here without waiting for more bytes. Raises ProtocolError where something else is."""
        while (message := self._reader.next_message()) is not None:
            yield message

    def receive(self) -> None:
        """Wait for bytes.

        Raises:
            EOFError: the other end has closed the connection.
            OSError: the connection is lost.
            AuthenticationError: the bytes are not the supervisor's.
        """
        received = self._connection.recv(_RECEIVE_BYTES)
        if not received:
            raise EOFError("it closed the connection")
        for content in self._channel.feed(received):
            self._reader.feed(content)

    def wait_for_welcome(self) -> Welcome:
        """The answer to the hello. Raises ProtocolError where another comes, OSError or EOFError where none does."""
        self._connection.settimeout(_ANSWER_SECONDS)
        while (answer := self._reader.next_message()) is None:
            self.receive()
        if not isinstance(answer, Welcome):
            raise ProtocolError(f"it sent {answer.type}")
        self._connection.settimeout(None)
        return answer

    def close(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()


def join(address: ControlAddress, key: bytes, hello: Hello) -> tuple[ControlConnection, Welcome]:
    """Find the supervisor, and be admitted.

    Raises:
        DstrainError: none of the addresses is reached; or what answers there does not prove that it is this launch's
            supervisor, also when asked again for a while; or it is another dstrain's.
    """
    begun, pause = time.monotonic(), 0.05
    here = socket.gethostname()
    while True:
        tried, answered, silent = [], False, False
        for host in address.hosts:
            try:
                connection = socket.create_connection((host, address.port), timeout=_CONNECT_SECONDS)
            except OSError as error:
                tried.append(f"{host}: {error.strerror or error}")
                continue
            answered = True
            try:
                return _introduce(connection, key, hello)
            except (OSError, EOFError, AuthenticationError) as error:
                connection.close()
                tried.append(f"{host}: {error}")
                silent = silent or isinstance(error, TimeoutError)
            except ProtocolError as error:
                raise DstrainError(f"the supervisor sent {here} an invalid answer: {error}") from error
        if not answered:
            raise DstrainError(
                f"{here} can't reach the supervisor at port {address.port} ({'; '.join(tried)})",
                hint="allow connections from this host to the machine on which `dstrain run` was started, or"
                " start launch.sh manually",
            )
        if time.monotonic() - begun > (_ANSWER_SECONDS if silent else _RETRY_SECONDS):
            raise DstrainError(
                f"nothing that answers {here} at port {address.port} proves to be this run's supervisor"
                f" ({'; '.join(tried)})",
                hint="the supervisor ended and another program took its port, something between the hosts changes the"
                " connection, or the run was started again meanwhile: start it anew",
            )
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _introduce(connection: socket.socket, key: bytes, hello: Hello) -> tuple[ControlConnection, Welcome]:
    control = ControlConnection(connection, key, hello.launch)
    control.send(hello)
    return control, control.wait_for_welcome()
