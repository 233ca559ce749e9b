"""The supervisor's connections to all ranks, on any host and with any launcher.

Each rank connects over TCP (`dstrain.train.control_client`), says what it does, and ends when its connection does. So
a rank that dies is known at once, on every host; and a run whose supervisor, host or cable is gone ends by itself
everywhere. The kernel watches an idle connection (keepalive), so a supervisor that is stopped with Ctrl-Z ends
nothing. The ranks of a host are told of each other: what one that is stopped or dead can't say, the others do.

`dstrain.runs.protocol` has the messages, `dstrain.runs.channel` how both ends prove who they are. Whoever sends
anything else loses his connection; the others go on.
"""

from __future__ import annotations

import errno
import ipaddress
import os
import resource
import secrets
import selectors
import socket
import time
from collections import deque
from dataclasses import dataclass, field, replace

from dstrain.errors import DstrainError
from dstrain.runs.channel import MAX_RECORD_BYTES, SupervisorEnd
from dstrain.runs.control_key import new_key
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
from dstrain.runs.this_machine import listening_socket, own_addresses

_MAX_STRANGERS = 128  # beside the ranks that are still to come
_LEAST_STRANGERS = 16  # where few files may be open
_OTHER_FILES = 64  # of this process, beside those that are open and the connections
_BACKLOG = (
    4096  # connections that wait in the kernel between two polls; it takes fewer where somaxconn says so
)
_RECEIVE_BYTES = 64 * 1024  # of one connection, in one poll
_SEND_BYTES = 1024 * 1024
_ACCEPT_SECONDS = 0.25  # of one poll
_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


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


@dataclass(eq=False)
class _Peer:
    """The other end of a connection: a stranger until it has begun as only a rank can, and a rank once ``rank`` is
    known."""

    connection: socket.socket
    network: str
    channel: SupervisorEnd
    accepted_at: float = field(default_factory=time.monotonic)
    rank: int | None = None
    reader: MessageReader = field(default_factory=lambda: MessageReader(MAX_HELLO_BYTES))
    received: int = 0
    unsent: deque[memoryview] = field(default_factory=deque)
    """What it is still to be sent, unsealed: one plan serves a thousand ranks."""
    sealed: memoryview = field(default_factory=lambda: memoryview(b""))
    """And the rest of the record that is under way."""
    sent_at: float = 0.0
    """When it last took some of it, or had taken all, by `time.monotonic`."""


class ControlServer:
    """Listens on a free port until `close`. Nothing blocks: `poll` handles what has come, and is soon over.

    Whoever does not know the key is a stranger. He has 5 seconds and 4 KiB, and there are only so many: when another
    one comes, the oldest goes, of those from the network address that has most of them. A rank is no stranger from its
    first bytes on, which are there almost as soon as its connection; one that was pushed out comes again.

    Args:
        world_size: ranks are numbered below it.
        plan: sent to each rank that sees none, or another one: its host may have no disk in common with this one.
        key: what ranks must know, and see this server know. Drawn where none is given.
        only_here: all ranks are on this machine, and nobody else may connect. Their connections survive the loss of
            a network.
        ranks: those that are to come; None for all.

    Raises:
        ValueError: the plan can't be sent as it is.
        DstrainError: this process may not open as many files as there are ranks, or can't listen.
    """

    def __init__(
        self,
        world_size: int,
        plan: str = "",
        *,
        key: bytes | None = None,
        only_here: bool = False,
        ranks: range | None = None,
    ) -> None:
        self._welcome = encode(Welcome(plan))
        if decode(self._welcome) != Welcome(plan):
            raise ValueError("the plan is too long to be sent, or not text")
        self.key = new_key() if key is None else key
        """The secret of this launch."""
        # What a rank must name to be heard: one of an earlier launch that lives on somewhere is not.
        self.launch = secrets.token_hex(8)
        self._expected = range(world_size) if ranks is None else ranks
        self._max_strangers = _have_room_for(len(self._expected))
        self._plan, self._digest = plan, plan_digest(plan)
        try:
            self._listener = listening_socket(only_here=only_here, backlog=_BACKLOG)
        except OSError as error:
            raise DstrainError(
                f"the supervisor can't listen for its ranks: {error.strerror or error}"
            ) from error
        self._listener.setblocking(False)
        own, self.port = self._listener.getsockname()[:2]
        self._addresses = (own,) if only_here else tuple(own_addresses())
        self._selector = selectors.DefaultSelector()
        self._peers: dict[socket.socket, _Peer] = {}
        self._newcomers: dict[
            socket.socket, _Peer
        ] = {}  # of the peers, those that are no ranks; the oldest first
        self._strangers: dict[str, dict[socket.socket, _Peer]] = {}  # of the newcomers, by network
        self._openings: set[bytes] = set()
        self._busy: dict[
            socket.socket, _Peer
        ] = {}  # of the peers, those that have not taken all that was sent
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
        ready: list[tuple[_Peer, int]] = [(key.data, mask) for key, mask in self._selector.select(timeout=0)]
        for peer, mask in sorted(ready, key=lambda entry: entry[0].rank is None):  # ranks before anybody else
            if mask & selectors.EVENT_WRITE:
                self._flush(peer)
            if mask & selectors.EVENT_READ:
                self._receive(peer)
        self._accept()
        # After what has come was read: this process itself may have been stopped for longer.
        now = time.monotonic()
        for peer in list(self._newcomers.values()):
            if peer.accepted_at >= now - HELLO_SECONDS:
                break
            self._drop(peer)
        for peer in list(self._busy.values()):
            if peer.sent_at < now - SILENCE_SECONDS:
                self._drop(peer, by_silence=True)

    def broadcast(self, message: SupervisorMessage) -> None:
        """Send a message to all ranks; `Stop` also to those that connect later."""
        self._stopping = self._stopping or isinstance(message, Stop)
        for peer in list(self._peers.values()):
            if peer.rank is not None:
                self._send(peer, encode(message))

    def close(self) -> None:
        """End every connection: each rank that is still there ends at once."""
        for peer in list(self._peers.values()):
            self._drop(peer)
        if self._listener.fileno() >= 0:
            self._selector.close()
            self._listener.close()

    def __enter__(self) -> ControlServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _accept(self) -> None:
        """All that wait, as far as there is time: a thousand ranks come within seconds, and each wants its answer."""
        until = time.monotonic() + _ACCEPT_SECONDS
        while time.monotonic() < until:
            try:
                connection, address = self._listener.accept()
            except OSError as error:
                if error.errno in _NO_ROOM and self._strangers:
                    self._push_out()
                    continue
                return  # no more
            channel = SupervisorEnd(self.key, self.launch, self._openings)
            peer = _Peer(connection, _network(address[0]), channel)
            connection.setblocking(False)
            self._peers[connection] = self._newcomers[connection] = peer
            self._strangers.setdefault(peer.network, {})[connection] = peer
            self._selector.register(connection, selectors.EVENT_READ, peer)
            self._receive(peer)
            room = self._max_strangers + len(self._expected) - len(self.ranks)
            while sum(map(len, self._strangers.values())) > room:
                self._push_out()

    def _push_out(self) -> None:
        """The oldest stranger, of the network that has most of them."""
        most = max(self._strangers.values(), key=len)
        oldest = next(iter(most.values()))
        self._receive(oldest)  # it may be a rank whose first bytes are there by now
        if self._is_stranger(oldest):
            self._drop(oldest)

    def _is_stranger(self, peer: _Peer) -> bool:
        return peer.connection in self._strangers.get(peer.network, {})

    def _no_stranger_any_more(self, peer: _Peer) -> None:
        others = self._strangers.get(peer.network, {})
        if others.pop(peer.connection, None) is not None and not others:
            del self._strangers[peer.network]

    def _receive(self, peer: _Peer) -> None:
        if peer.connection not in self._peers:
            return  # it was dropped meanwhile
        most = _RECEIVE_BYTES if peer.rank is not None else MAX_HELLO_BYTES - peer.received
        try:
            received = peer.connection.recv(most)
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(peer, by_silence=_is_silence(error))
            return
        if not received:
            self._drop(peer)
            return
        peer.received += len(received)
        try:
            for content in peer.channel.feed(received):
                self._take_in(peer, content)
            if peer.rank is None and peer.received >= MAX_HELLO_BYTES:
                raise ProtocolError(f"its hello has more than {MAX_HELLO_BYTES} bytes")
        except ProtocolError:
            self._drop(peer)
            return
        if peer.channel.opened and self._is_stranger(peer):
            self._answer(peer)

    def _answer(self, peer: _Peer) -> None:
        """To a connection that has begun as a rank's does."""
        self._no_stranger_any_more(peer)
        try:
            keep_alive(peer.connection)
        except OSError:
            self._drop(peer)  # it went away again
            return
        peer.sealed = memoryview(peer.channel.take_handshake())
        self._send(peer)

    def _take_in(self, peer: _Peer, content: bytes) -> None:
        """What a rank of this launch has sent, as far as it makes whole messages. Raises ProtocolError."""
        peer.reader.feed(content)
        while peer.connection in self._peers and (message := peer.reader.next_message()) is not None:
            if peer.rank is None:
                self._admit(peer, message)
            else:
                self._handle(self.ranks[peer.rank], message)

    def _admit(self, peer: _Peer, message: Message) -> None:
        """The first message makes it a rank. Raises ProtocolError where it is none of this launch's."""
        if not isinstance(message, Hello):
            raise ProtocolError("the first message must be a hello")
        status = message.status
        if message.launch != self.launch:
            raise ProtocolError("it belongs to another launch")
        if status.rank not in self._expected:
            raise ProtocolError(f"there is no rank {status.rank} here")
        if status.rank in self.ranks:
            raise ProtocolError(f"rank {status.rank} has connected before")
        peer.rank = status.rank
        peer.reader.max_bytes = MAX_RANK_MESSAGE_BYTES
        del self._newcomers[peer.connection]
        self.ranks[status.rank] = RankConnection(replace(status, time=time.time()), step_at=time.monotonic())
        same = not self._plan or message.plan_digest == self._digest
        answer = [encode(Welcome()) if same else self._welcome]
        if self._stopping:
            answer.append(encode(Stop()))
        # The ranks of a host are told of each other: they see what becomes of each other.
        local = {
            rank: known.status.pid
            for rank, known in self.ranks.items()
            if known.status.host == status.host and rank != status.rank
        }
        self._send(peer, *answer, *(encode(LocalRank(rank, pid)) for rank, pid in local.items()))
        for other in list(self._peers.values()):
            if other.rank in local:
                self._send(other, encode(LocalRank(status.rank, status.pid)))

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

    def _send(self, peer: _Peer, *messages: bytes) -> None:
        """These after what it still has to take. What the other end does not take now, it is given later."""
        if peer.connection not in self._peers:
            return
        if peer.connection not in self._busy:
            peer.sent_at = time.monotonic()
            self._busy[peer.connection] = peer
        peer.unsent.extend(map(memoryview, messages))
        self._flush(peer)

    def _flush(self, peer: _Peer) -> None:
        """As much as the other end takes, within what one poll may take."""
        sent = 0
        try:
            while peer.sealed or peer.unsent:
                if sent >= _SEND_BYTES:
                    raise BlockingIOError
                if not peer.sealed:
                    peer.sealed = memoryview(peer.channel.seal(_next_piece(peer.unsent)))
                taken = peer.connection.send(peer.sealed)
                peer.sealed = peer.sealed[taken:]
                peer.sent_at = time.monotonic()
                sent += taken
        except BlockingIOError:
            self._selector.modify(peer.connection, selectors.EVENT_READ | selectors.EVENT_WRITE, peer)
            return
        except OSError as error:
            if _is_silence(error):
                self._drop(peer, by_silence=True)
                return
            # It was closed, and its last words may still wait to be read.
            peer.sealed = memoryview(b"")
            peer.unsent.clear()
        if self._busy.pop(peer.connection, None) is not None:
            self._selector.modify(peer.connection, selectors.EVENT_READ, peer)

    def _drop(self, peer: _Peer, *, by_silence: bool = False) -> None:
        if self._peers.pop(peer.connection, None) is None:
            return
        self._newcomers.pop(peer.connection, None)
        self._no_stranger_any_more(peer)
        self._busy.pop(peer.connection, None)
        if peer.rank is not None:
            self.ranks[peer.rank].lost_at = time.time()
            self.ranks[peer.rank].by_silence = by_silence
        self._selector.unregister(peer.connection)
        peer.connection.close()


def _next_piece(unsent: deque[memoryview]) -> bytes:
    """What goes into the next record: taken from the messages, of which several may be small."""
    pieces, room = [], MAX_RECORD_BYTES
    while unsent and room:
        first = unsent.popleft()
        pieces.append(first[:room])
        if len(first) > room:
            unsent.appendleft(first[room:])
        room -= len(pieces[-1])
    return b"".join(pieces)


def _network(host: str) -> str:
    """What one user of the network has for himself: an address of IPv4, a subnet of IPv6, or all of this machine."""
    address = ipaddress.ip_address(host)
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_loopback:
        return "loopback"
    return (
        str(address) if address.version == 4 else str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    )


def _have_room_for(ranks: int) -> int:
    """A connection is an open file, and 1024 of these are what a process may usually have without asking for more.

    Asks for more, and gives the number of strangers that may be connected beside the ranks. Raises DstrainError where
    there can't be enough.
    """
    taken = len(os.listdir("/proc/self/fd")) + _OTHER_FILES + ranks
    least, wanted = taken + _LEAST_STRANGERS, taken + _MAX_STRANGERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < least:
        raise DstrainError(
            f"{ranks} ranks need {least} open files here, and this process may open no more than {hard}",
            hint=f"start it where the limit is higher: `ulimit -n {wanted}`; where that is refused, an administrator"
            " raises it (nofile in /etc/security/limits.conf, LimitNOFILE of systemd)",
        )
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return _MAX_STRANGERS if soft == resource.RLIM_INFINITY else min(_MAX_STRANGERS, soft - taken)


def _is_silence(error: OSError) -> bool:
    return isinstance(error, TimeoutError) or error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH)
