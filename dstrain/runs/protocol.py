"""The messages between supervisor and ranks, and their wire format.

A message is a frozen dataclass here and one line of JSON there, whose key ``type`` names it. `encode` and
`MessageReader` (which uses `decode`) are the only ways from one to the other, for both sides
(`dstrain.supervise.control_server`, `dstrain.train.control_client`). Whatever is not exactly one of these messages,
with every value of its type and within its range, is a `ProtocolError`; nothing else is ever raised for what came over
the network. It costs the sender its connection, and nobody else anything.

A conversation: the rank connects, both prove that they know the launch's key (`dstrain.runs.channel`, which carries
all that follows), and the rank sends `Hello`. The supervisor answers with `Welcome`; then each side sends what it has
to say, in any order, until the connection ends, and the rank with it.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, TypeAdapter
    from pydantic_core import CoreSchema

ADDRESS = "DSTRAIN_CONTROL"
"""The environment variable that tells a rank where its supervisor is, as `ControlAddress` writes it."""

SILENCE_SECONDS = 16
"""A connection may be cut for so long before both ends give it up: the run must have ended everywhere within 30."""
HELLO_SECONDS = 5.0
"""From connecting to a whole `Hello`, the handshake included."""

MAX_HELLO_BYTES = 4 * 1024  # the handshake included
MAX_RANK_MESSAGE_BYTES = 1024 * 1024
MAX_SUPERVISOR_MESSAGE_BYTES = 64 * 1024 * 1024  # `Welcome` with the plan

_PROBE_SECONDS = 4

WAITING_FOR_DATA = "waiting for data"
"""What a rank is busy with while a step waits for its samples."""
WAITS_FOR = "Waits for "
"""How the line below a rank's stacks begins that says what it waits for, where it knows."""


class ProtocolError(ValueError):
    """What was received is not a message of this protocol, or not one that its sender may send."""


@dataclass(frozen=True)
class _Number:
    """The range of a number, both ends included."""

    least: int
    most: int

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        if source is float:
            return core_schema.float_schema(ge=self.least, le=self.most, allow_inf_nan=False)
        return core_schema.int_schema(ge=self.least, le=self.most)


@dataclass(frozen=True)
class _Text:
    """The length of a text in characters, and a pattern for it.

    What is sent is cut to ``most``, and holds no character that UTF-8 has no bytes for (Python reads a file name or an
    error text that is no UTF-8 as lone surrogates): a rank that fails must be able to say why, whatever it says.
    """

    most: int
    least: int = 0
    pattern: str | None = None
    keep_end: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.str_schema(
            min_length=self.least,
            max_length=self.most,
            pattern=self.pattern,
            serialization=core_schema.plain_serializer_function_ser_schema(self._shorten),
        )

    def _shorten(self, text: str) -> str:
        if len(text) > self.most:
            text = "..." + text[3 - self.most :] if self.keep_end else text[: self.most - 3] + "..."
        return text.encode("utf-8", "replace").decode("utf-8")


# Every value's type and range. JSON writes a character in at most 6 bytes, so that each message below stays within the
# bytes of its sender. There are no lists: to refuse a long one of wrong values costs seconds and hundreds of megabytes.
_Rank: TypeAlias = Annotated[int, _Number(0, 2**20 - 1)]
_Pid: TypeAlias = Annotated[int, _Number(1, 2**22)]  # Linux's PID_MAX_LIMIT
_StepNumber: TypeAlias = Annotated[int, _Number(0, 2**53 - 1)]
_Signal: TypeAlias = Annotated[int, _Number(1, 64)]
_Seconds: TypeAlias = Annotated[float, _Number(0, 2**53)]
_Name: TypeAlias = Annotated[str, _Text(255, least=1)]
_Digest: TypeAlias = Annotated[str, _Text(64, pattern="^[0-9a-f]{64}$")]
_Reason: TypeAlias = Annotated[str, _Text(16_000)]
_Detail: TypeAlias = Annotated[str, _Text(2000)]
_LogTail: TypeAlias = Annotated[str, _Text(2**16, keep_end=True)]
_StackText: TypeAlias = Annotated[
    str, _Text(2**17, keep_end=True)
]  # faulthandler writes the main thread last
_PlanText: TypeAlias = Annotated[str, _Text(MAX_SUPERVISOR_MESSAGE_BYTES // 6 - 100)]


RankState: TypeAlias = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True)
class RankStatus:
    """What a rank says of itself: to the supervisor, and in the run folder (`RunFolder.write_status`).

    ``state`` is ``running``, ``done`` (reached the end of the run), ``stopped`` (left in order after ``step``, and
    saved) or ``failed`` (``error`` says why, in one line). A rank that was killed leaves ``running`` behind: no word
    is a failure too. ``time``: seconds since the epoch.
    """

    rank: _Rank
    host: _Name
    pid: _Pid
    state: RankState
    step: _StepNumber = 0
    error: _Reason | None = None
    time: _Seconds = 0.0


# From a rank.


@dataclass(frozen=True)
class Hello:
    """The first message of a rank. ``launch`` is that of its `ControlAddress`: a rank of an earlier launch that lives
    on somewhere has another. ``plan_digest`` is `plan_digest` of the plan.json that its host sees, if any."""

    launch: _Name
    status: RankStatus
    plan_digest: _Digest | None = None
    type: Literal["hello"] = field(default="hello", kw_only=True)


@dataclass(frozen=True)
class Status:
    """The rank's state has changed. ``log_tail``, with a failure: the last lines of its log, which may lie on a disk
    that the supervisor can't see."""

    status: RankStatus
    log_tail: _LogTail = ""
    type: Literal["status"] = field(default="status", kw_only=True)


@dataclass(frozen=True)
class Step:
    """The rank has ended this step."""

    step: _StepNumber
    type: Literal["step"] = field(default="step", kw_only=True)


@dataclass(frozen=True)
class Busy:
    """The rank begins something between two steps; None: it has ended it."""

    activity: _Name | None
    type: Literal["busy"] = field(default="busy", kw_only=True)


@dataclass(frozen=True)
class Stacks:
    """The answer to `DumpStacks`: `faulthandler.dump_traceback` of all threads, and maybe a line with `WAITS_FOR`."""

    text: _StackText
    type: Literal["stacks"] = field(default="stacks", kw_only=True)


@dataclass(frozen=True)
class Orphaned:
    """The rank's launcher has ended before it; it ends too."""

    type: Literal["orphaned"] = field(default="orphaned", kw_only=True)


@dataclass(frozen=True)
class RankStopped:
    """Another rank of the sender's host was stopped by a signal."""

    rank: _Rank
    type: Literal["rank-stopped"] = field(default="rank-stopped", kw_only=True)


@dataclass(frozen=True)
class RankResumed:
    """And goes on."""

    rank: _Rank
    type: Literal["rank-resumed"] = field(default="rank-resumed", kw_only=True)


@dataclass(frozen=True)
class RankKilled:
    """Another rank of the sender's host was killed by ``signal``."""

    rank: _Rank
    signal: _Signal
    type: Literal["rank-killed"] = field(default="rank-killed", kw_only=True)


@dataclass(frozen=True)
class RankOutOfMemory:
    """Another rank of the sender's host was killed for want of memory; ``detail`` is what the kernel says of it."""

    rank: _Rank
    detail: _Detail
    type: Literal["rank-out-of-memory"] = field(default="rank-out-of-memory", kw_only=True)


# From the supervisor.


@dataclass(frozen=True)
class Welcome:
    """The answer to `Hello`. ``plan``: the run's plan.json, where the rank's host sees none or another one."""

    plan: _PlanText | None = None
    type: Literal["welcome"] = field(default="welcome", kw_only=True)


@dataclass(frozen=True)
class LocalRank:
    """Another rank of the receiver's host is there."""

    rank: _Rank
    pid: _Pid
    type: Literal["local-rank"] = field(default="local-rank", kw_only=True)


@dataclass(frozen=True)
class Stop:
    """End the step, save, and leave."""

    type: Literal["stop"] = field(default="stop", kw_only=True)


@dataclass(frozen=True)
class DumpStacks:
    """Say where every thread stands."""

    type: Literal["dump-stacks"] = field(default="dump-stacks", kw_only=True)


LocalChange: TypeAlias = RankStopped | RankResumed | RankKilled | RankOutOfMemory
"""What a rank reports of another one of its host."""
RankMessage: TypeAlias = Hello | Status | Step | Busy | Stacks | Orphaned | LocalChange
SupervisorMessage: TypeAlias = Welcome | LocalRank | Stop | DumpStacks
Message: TypeAlias = RankMessage | SupervisorMessage


# Built when the first message is: the rooms that import this file only for a run folder's names need no pydantic.
@cache
def _messages() -> TypeAdapter[Message]:
    from pydantic import ConfigDict, Field, TypeAdapter

    config = ConfigDict(strict=True, extra="forbid")
    return TypeAdapter(Annotated[Message, Field(discriminator="type")], config=config)


@cache
def _statuses() -> TypeAdapter[RankStatus]:
    from pydantic import TypeAdapter

    return TypeAdapter(RankStatus)


def encode(message: Message) -> bytes:
    """One line, with its end. Texts of any length or content can be sent; what is too long is cut."""
    return _messages().dump_json(message) + b"\n"


def decode(line: bytes) -> Message:
    """The message of one line (its end may be missing). Raises ProtocolError where it is none."""
    with _only_protocol_errors():
        return _messages().validate_json(line)


def status_text(status: RankStatus) -> str:
    """The JSON of a status, as a file holds it."""
    return _statuses().dump_json(status).decode("utf-8") + "\n"


def parse_status(text: bytes) -> RankStatus:
    """The status that `status_text` wrote; keys of a later version are ignored. Raises ProtocolError."""
    with _only_protocol_errors():
        return _statuses().validate_json(text, strict=True)


@contextmanager
def _only_protocol_errors() -> Iterator[None]:
    """The first of a validation's errors, in one line and without what was sent."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ProtocolError(f"{place}: {first['msg']}" if place else first["msg"]) from None
    except (
        ValueError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as error:  # of another pydantic than those we know
        raise ProtocolError(f"it can't be read ({type(error).__name__})") from None


class MessageReader:
    """Makes messages of the bytes of a connection, which come in pieces of any length.

    ``max_bytes`` bounds a message, and with it what is kept of one that has not ended yet. It may be changed between
    two messages.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._received = bytearray()
        self._searched = 0  # so far there is no end of a line

    def feed(self, received: bytes) -> None:
        self._received += received

    def next_message(self) -> Message | None:
        """The next whole message; None until more is fed.

        Raises:
            ProtocolError: what comes next is longer than allowed, or no message. Nothing after it can be trusted.
        """
        end = self._received.find(b"\n", self._searched)
        if (len(self._received) if end < 0 else end) > self.max_bytes:
            raise ProtocolError(f"a message has more than {self.max_bytes} bytes")
        if end < 0:
            self._searched = len(self._received)
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        return decode(line)


@dataclass(frozen=True)
class ControlAddress:
    """Where a launch's supervisor listens: ``LAUNCH@HOST,HOST,...:PORT`` in `ADDRESS`.

    ``launch`` names the launch; it is no secret. ``hosts`` are the addresses to try, in their order; one of IPv6 is
    written in brackets, ``[fd00::2]``. One that needs a zone (``fe80::1%eth0``) is none: its zone means something on
    this host alone.
    """

    launch: str
    hosts: tuple[str, ...]
    port: int

    def __str__(self) -> str:
        written = (f"[{host}]" if ":" in host else host for host in self.hosts)
        return f"{self.launch}@{','.join(written)}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> ControlAddress:
        """Raises ProtocolError where ``text`` is no such address."""
        match = _ADDRESS.fullmatch(text)
        hosts = [_host(written) for written in match["hosts"].split(",")] if match else []
        if match is None or None in hosts or not 0 < int(match["port"]) < 2**16:
            raise ProtocolError(f"not a supervisor address: {text[:200]!r}")
        return cls(match["launch"], tuple(host for host in hosts if host is not None), int(match["port"]))


_ADDRESS = re.compile(r"(?P<launch>[!-?A-~]{1,255})@(?P<hosts>[!-~]+):(?P<port>[0-9]{1,5})", re.ASCII)
_HOST_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?", re.ASCII)


def _host(written: str) -> str | None:
    """The host of a `ControlAddress` as it is written there; None where it is none."""
    if not (written.startswith("[") and written.endswith("]")):
        return written if _HOST_NAME.fullmatch(written) else None
    try:
        address = ipaddress.IPv6Address(written[1:-1])
    except ValueError:
        return None
    return None if address.scope_id else str(address)


def plan_digest(text: str) -> str:
    """By which a rank tells the supervisor which plan.json it sees."""
    return hashlib.sha256(text.encode()).hexdigest()


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel notice within `SILENCE_SECONDS` that the other end is gone, also while nothing is sent."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (
        ("TCP_KEEPIDLE", _PROBE_SECONDS),
        ("TCP_KEEPINTVL", _PROBE_SECONDS),
        ("TCP_KEEPCNT", SILENCE_SECONDS // _PROBE_SECONDS - 1),
        ("TCP_USER_TIMEOUT", SILENCE_SECONDS * 1000),  # and while something was sent and not acknowledged
    ):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
