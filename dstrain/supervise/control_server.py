"""The supervisor's connections to all ranks, on any host and with any launcher.

Each rank connects over TCP (`dstrain.train.control_client`), says what it does, and ends when its connection does. So
a rank that dies is known at once, on every host; and a run whose supervisor, host or cable is gone ends by itself
everywhere. The kernel watches an idle connection (keepalive), so a supervisor that is stopped with Ctrl-Z ends
nothing. The ranks of a host are told of each other: what one that is stopped or dead can't say, the others do.

`dstrain.runs.protocol` has the messages. Whoever sends anything else loses his connection; the others go on.
"""

from __future__ import annotations

import errno
import resource
import secrets
import selectors
import socket
import time
from dataclasses import dataclass, field, replace

from dstrain.runs.protocol import (
    HELLO_SECONDS,
    MAX_HELLO_BYTES,
    MAX_RANK_MESSAGE_BYTES,
    SILENCE_SECONDS,
    Busy,
    ControlAddress,
    Hello,
    LocalRank,
    Message,
    MessageReader,
    Orphaned,
    ProtocolError,
    RankKilled,
    RankOutOfMemory,
    RankResumed,
    RankStatus,
    RankStopped,
    Stacks,
    Status,
    Step,
    Stop,
    SupervisorMessage,
    Welcome,
    decode,
    encode,
    keep_alive,
    plan_digest,
)
from dstrain.runs.this_machine import own_addresses

_LOOPBACK = "127.0.0.1"
_MAX_STRANGERS = 128  # beside the ranks that are still to come
_OTHER_FILES = 256  # the strangers' among them
_RECEIVE_BYTES = 64 * 1024


@dataclass
class RankConnection:
    """What is known of one rank through its connection.

    Attributes:
        status: what it said of itself last, with the time of this machine's clock: which of two ranks failed first,
            one clock must tell.
        step: the last step that it has ended; ``step_at`` when that was received, by `time.monotonic`, or the end of
            what it did since.
        busy: what it does between two steps, if it is not in one.
        lost_at: when the connection ended, by `time.time`; None while it holds.
        by_silence: it ended because nothing answered any more: the host or the network is gone, not the process alone.
        stacks: where its threads stand, as it was asked last.
        orphaned_at: when it said that its launcher had ended, by `time.time`.
        stopped_at: since when it is stopped by a signal, by `time.monotonic`; None while it runs.
        killed_by: the signal that ended it, as another rank of its host saw it.
        out_of_memory: what the kernel said of its death.
        log_tail: the end of its log, sent with a failure.
    """

    status: RankStatus
    step: int = 0
    step_at: float = 0.0
    busy: str | None = None
    lost_at: float | None = None
    by_silence: bool = False
    stacks: str | None = None
    orphaned_at: float | None = None
    stopped_at: float | None = None
    killed_by: int | None = None
    out_of_memory: str | None = None
    log_tail: str = ""


@dataclass
class _Peer:
    """The other end of a connection; a stranger until ``rank`` is known."""

    accepted_at: float
    rank: int | None = None
    reader: MessageReader = field(default_factory=lambda: MessageReader(MAX_HELLO_BYTES))


class ControlServer:
    """Listens on a free port until `close`. Nothing blocks: `poll` handles what has come.

    Args:
        world_size: ranks are numbered below it.
        plan: sent to each rank that sees none, or another one: its host may have no disk in common with this one.
        only_here: all ranks are on this machine, and nobody else may connect. Their connections survive the loss of
            a network.

    Raises:
        ValueError: the plan can't be sent as it is.
    """

    def __init__(self, world_size: int, plan: str = "", *, only_here: bool = False) -> None:
        if decode(encode(Welcome(plan))) != Welcome(plan):
            raise ValueError("the plan is too long to be sent, or not text")
        _have_room_for(world_size)
        # What a rank must name to be heard: one of an earlier launch that lives on somewhere is not.
        self.launch = secrets.token_hex(8)
        self._world_size = world_size
        self._plan, self._digest = plan, plan_digest(plan)
        self._addresses = (_LOOPBACK,) if only_here else tuple(own_addresses())
        backlog = world_size + _MAX_STRANGERS
        self._listener = socket.create_server((_LOOPBACK if only_here else "", 0), backlog=backlog)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[socket.socket, _Peer] = {}
        self._strangers: dict[socket.socket, _Peer] = {}  # of the peers; the oldest first
        self._stopping = False
        self.ranks: dict[int, RankConnection] = {}
        """By rank, every one that ever connected."""

    def address(self) -> str:
        """What `runs.protocol.ADDRESS` tells the ranks: where they find this server, from any host."""
        return str(ControlAddress(self.launch, self._addresses, self.port))

    def poll(self) -> None:
        """Take in what has come since the last call; nothing once it is closed."""
        if self._listener.fileno() < 0:
            return
        for key, _ in self._selector.select(timeout=0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                assert isinstance(key.fileobj, socket.socket)
                self._receive(key.fileobj)
        # After what has come was read: this process itself may have been stopped for longer.
        deadline = time.monotonic() - HELLO_SECONDS
        for connection in [it for it, peer in self._strangers.items() if peer.accepted_at < deadline]:
            self._drop(connection)

    def broadcast(self, message: SupervisorMessage) -> None:
        """Send a message to all ranks; `Stop` also to those that connect later."""
        self._stopping = self._stopping or isinstance(message, Stop)
        for connection, peer in list(self._peers.items()):
            if peer.rank is not None:
                self._send(connection, message)

    def close(self) -> None:
        """End every connection: each rank that is still there ends at once."""
        for connection in list(self._peers):
            self._drop(connection)
        if self._listener.fileno() >= 0:
            self._selector.close()
            self._listener.close()

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        """All that wait: a thousand ranks come within seconds, and each waits for its answer."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # no more
            try:
                connection.setblocking(False)
                keep_alive(connection)
            except OSError:
                connection.close()  # it went away again
                continue
            self._peers[connection] = self._strangers[connection] = _Peer(time.monotonic())
            self._selector.register(connection, selectors.EVENT_READ)
            while len(self._strangers) > _MAX_STRANGERS + self._world_size - len(self.ranks):
                oldest = next(iter(self._strangers))
                self._receive(oldest)  # it may be a rank whose hello is there already
                if oldest in self._strangers:
                    self._drop(oldest)

    def _receive(self, connection: socket.socket) -> None:
        peer = self._peers.get(connection)
        if peer is None:
            return  # it was dropped meanwhile
        try:
            received = connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(connection, by_silence=_is_silence(error))
            return
        if not received:
            self._drop(connection)
            return
        peer.reader.feed(received)
        try:
            while connection in self._peers and (message := peer.reader.next_message()) is not None:
                if peer.rank is None:
                    self._admit(connection, peer, message)
                else:
                    self._handle(self.ranks[peer.rank], message)
        except ProtocolError:
            self._drop(connection)

    def _admit(self, connection: socket.socket, peer: _Peer, message: Message) -> None:
        """A stranger's first message makes it a rank. Raises ProtocolError where it is none of this launch's."""
        if not isinstance(message, Hello):
            raise ProtocolError("the first message must be a hello")
        status = message.status
        if not secrets.compare_digest(message.launch.encode(), self.launch.encode()):
            raise ProtocolError("it belongs to another launch")
        if status.rank >= self._world_size:
            raise ProtocolError(f"there is no rank {status.rank} among {self._world_size}")
        if status.rank in self.ranks:
            raise ProtocolError(f"rank {status.rank} has connected before")
        peer.rank = status.rank
        peer.reader.max_bytes = MAX_RANK_MESSAGE_BYTES
        del self._strangers[connection]
        self.ranks[status.rank] = RankConnection(replace(status, time=time.time()), step_at=time.monotonic())
        same = not self._plan or message.plan_digest == self._digest
        answer: list[SupervisorMessage] = [Welcome(None if same else self._plan)]
        if self._stopping:
            answer.append(Stop())
        # The ranks of a host are told of each other: they see what becomes of each other.
        local = {
            rank: known.status.pid
            for rank, known in self.ranks.items()
            if known.status.host == status.host and rank != status.rank
        }
        self._send(connection, *answer, *(LocalRank(rank, pid) for rank, pid in local.items()))
        for other, its_peer in list(self._peers.items()):
            if its_peer.rank in local:
                self._send(other, LocalRank(status.rank, status.pid))

    def _handle(self, sender: RankConnection, message: Message) -> None:
        """What a rank says. Raises ProtocolError where it may not say that."""
        match message:
            case Status():
                told, known = message.status, sender.status
                if (told.rank, told.host, told.pid) != (known.rank, known.host, known.pid):
                    raise ProtocolError("a rank can report only for itself")
                sender.status = replace(told, time=time.time())
                sender.log_tail = message.log_tail or sender.log_tail
            case Step():
                sender.step, sender.step_at = message.step, time.monotonic()
            case Busy():
                sender.busy, sender.step_at = message.activity, time.monotonic()
            case Stacks():
                sender.stacks = message.text
            case Orphaned():
                sender.orphaned_at = time.time()
            case RankStopped():
                other = self._local_rank(sender, message.rank)
                other.stopped_at = other.stopped_at or time.monotonic()
            case RankResumed():
                self._local_rank(sender, message.rank).stopped_at = None
            case RankKilled():
                self._local_rank(sender, message.rank).killed_by = message.signal
            case RankOutOfMemory():
                self._local_rank(sender, message.rank).out_of_memory = message.detail
            case _:
                raise ProtocolError(f"a rank sends no {message.type} here")

    def _local_rank(self, sender: RankConnection, rank: int) -> RankConnection:
        """Another rank of the sender's host. Raises ProtocolError for any other."""
        found = self.ranks.get(rank)
        if found is None or found is sender or found.status.host != sender.status.host:
            raise ProtocolError(f"rank {rank} is not another rank of {sender.status.host}")
        return found

    def _send(self, connection: socket.socket, *messages: SupervisorMessage) -> None:
        """Small, but for the plan: a connection whose other end takes nothing for seconds is dead."""
        try:
            connection.settimeout(SILENCE_SECONDS)
            connection.sendall(b"".join(map(encode, messages)))
            connection.setblocking(False)
        except OSError as error:
            if _is_silence(error):  # else it was closed, and its last words may still wait to be read
                self._drop(connection, by_silence=True)

    def _drop(self, connection: socket.socket, *, by_silence: bool = False) -> None:
        peer = self._peers.pop(connection, None)
        if peer is None:
            return
        self._strangers.pop(connection, None)
        if peer.rank is not None:
            self.ranks[peer.rank].lost_at = time.time()
            self.ranks[peer.rank].by_silence = by_silence
        self._selector.unregister(connection)
        connection.close()


def _have_room_for(world_size: int) -> None:
    """A connection is an open file, and 1024 of these are what a process may usually have without asking for more."""
    wanted = world_size + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_silence(error: OSError) -> bool:
    return isinstance(error, TimeoutError) or error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
