"""The channel under the messages of supervisor and ranks: both ends prove that they know the launch's key.

A handshake of three parts, each of a fixed length, and nothing of it is parsed:

1. The rank sends a fresh nonce, and an HMAC over it: who does not know the key gets no further than this.
2. The supervisor answers with a nonce of its own, and with its proof: an HMAC over both nonces.
3. The rank sends its proof.

Each HMAC is SHA-256's, with the launch's key, over the launch's name, the nonces and a label that says whose it is and
for what: what one end sends is never what the other would have to. From the same parts comes a key for each direction.
What follows are records: a length, some bytes, and an HMAC over the record's number, its length and its bytes. So
whoever sits in between can cut the connection and can read it, for nothing is encrypted; he can't add, change, repeat,
leave out or reorder anything. The key itself is never sent.

Both ends are fed with what came and asked for what is to be sent; they know nothing of sockets.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Iterator

from dstrain.runs.protocol import ProtocolError

NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
_GREETING = b"dstrain2"

OPENING_BYTES = len(_GREETING) + NONCE_BYTES + _MAC_BYTES
"""What a rank sends first, and all that is taken from a stranger."""
ANSWER_BYTES = NONCE_BYTES + _MAC_BYTES
PROOF_BYTES = _MAC_BYTES

MAX_RECORD_BYTES = 16 * 1024
"""Of a record's content: so much may have to be kept before it is known who sent it."""
_LENGTH = struct.Struct(">I")
_NUMBER = struct.Struct(">Q")
RECORD_EXTRA_BYTES = _LENGTH.size + _MAC_BYTES


class AuthenticationError(ProtocolError):
    """The other end does not know the launch's key, or something in between has changed what it sent."""


class _End:
    """What both ends have in common: records, once the handshake is over."""

    def __init__(self, key: bytes, launch: str) -> None:
        self._key, self._launch = key, launch.encode("utf-8")
        self._received = bytearray()
        self._to_send = b""
        self._seals: _Records | None = None
        self._opens: _Records | None = None

    @property
    def established(self) -> bool:
        """Whether the other end has proved that it knows the key."""
        return self._seals is not None

    def take_handshake(self) -> bytes:
        """What of the handshake is to be sent now; empty for nothing."""
        taken, self._to_send = self._to_send, b""
        return taken

    def feed(self, received: bytes) -> Iterator[bytes]:
        """The contents of the records that this completes, one by one; often none.

        Raises:
            AuthenticationError: something else than what the other end of this launch would send. What was given before
                counts; nothing that comes later can be trusted.
        """
        self._received += received
        while self._opens is None:
            if not self._shake_hands():
                return
        yield from self._opens.open(self._received)

    def seal(self, content: bytes | memoryview) -> bytes:
        """The record that carries ``content``, at most MAX_RECORD_BYTES, which must be the next that is sent."""
        assert self._seals is not None, "the handshake is not over"
        return self._seals.seal(bytes(content))

    def _shake_hands(self) -> bool:
        """One part of the handshake; whether it was there."""
        raise NotImplementedError

    def _take(self, size: int) -> bytes | None:
        if len(self._received) < size:
            return None
        taken = bytes(self._received[:size])
        del self._received[:size]
        return taken

    def _mac(self, label: bytes, *nonces: bytes) -> bytes:
        return _mac(self._key, label, self._launch, *nonces)

    def _establish(self, *nonces: bytes, own: bytes, others: bytes) -> None:
        self._seals = _Records(self._mac(own, *nonces))
        self._opens = _Records(self._mac(others, *nonces))


_OPENING = b"a rank opens"
_SUPERVISOR_PROOF, _RANK_PROOF = b"the supervisor proves", b"the rank proves"
_FROM_SUPERVISOR, _FROM_RANK = b"records of the supervisor", b"records of the rank"


class RankEnd(_End):
    """The end of a rank, for one connection."""

    def __init__(self, key: bytes, launch: str) -> None:
        super().__init__(key, launch)
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._to_send = _GREETING + self._nonce + self._mac(_OPENING, self._nonce)

    def _shake_hands(self) -> bool:
        answer = self._take(ANSWER_BYTES)
        if answer is None:
            return False
        nonces = self._nonce, answer[:NONCE_BYTES]
        if not hmac.compare_digest(answer[NONCE_BYTES:], self._mac(_SUPERVISOR_PROOF, *nonces)):
            raise AuthenticationError("it does not know the key of this launch")
        self._to_send = self._mac(_RANK_PROOF, *nonces)
        self._establish(*nonces, own=_FROM_RANK, others=_FROM_SUPERVISOR)
        return True


class SupervisorEnd(_End):
    """The end of the supervisor, for one connection.

    ``openings``: of all connections of the launch. What somebody has overheard and sends again is refused at once.
    Only a rank can add to it, so it stays small.
    """

    def __init__(self, key: bytes, launch: str, openings: set[bytes]) -> None:
        super().__init__(key, launch)
        self._openings = openings
        self._nonces: tuple[bytes, bytes] | None = None

    @property
    def opened(self) -> bool:
        """Whether the other end began as only a rank of this launch can."""
        return self._nonces is not None

    def _shake_hands(self) -> bool:
        if self._nonces is None:
            return self._answer()
        proof = self._take(PROOF_BYTES)
        if proof is None:
            return False
        if not hmac.compare_digest(proof, self._mac(_RANK_PROOF, *self._nonces)):
            raise AuthenticationError("it does not prove that it knows the key of this launch")
        self._establish(*self._nonces, own=_FROM_SUPERVISOR, others=_FROM_RANK)
        return True

    def _answer(self) -> bool:
        if not _GREETING.startswith(self._received[: len(_GREETING)]):
            raise AuthenticationError("it speaks another protocol")
        opening = self._take(OPENING_BYTES)
        if opening is None:
            return False
        nonce, proof = opening[len(_GREETING) : -_MAC_BYTES], opening[-_MAC_BYTES:]
        if not hmac.compare_digest(proof, self._mac(_OPENING, nonce)):
            raise AuthenticationError("it does not know the key of this launch")
        if nonce in self._openings:
            raise AuthenticationError("it repeats what another one has sent")
        self._openings.add(nonce)
        self._nonces = nonce, secrets.token_bytes(NONCE_BYTES)
        self._to_send = self._nonces[1] + self._mac(_SUPERVISOR_PROOF, *self._nonces)
        return True


class _Records:
    """The records of one direction, in their order."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._number = 0

    def seal(self, content: bytes) -> bytes:
        assert 0 < len(content) <= MAX_RECORD_BYTES
        return _LENGTH.pack(len(content)) + content + self._next_mac(content)

    def open(self, received: bytearray) -> Iterator[bytes]:
        """The contents of the whole records at the beginning of ``received``, which are taken from it."""
        while len(received) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(received)
            if not 0 < length <= MAX_RECORD_BYTES:
                raise AuthenticationError("a record has a length that none has")
            end = length + RECORD_EXTRA_BYTES
            if len(received) < end:
                return
            content = bytes(received[_LENGTH.size : end - _MAC_BYTES])
            if not hmac.compare_digest(received[end - _MAC_BYTES : end], self._next_mac(content)):
                raise AuthenticationError("a record is not what the other end sent next")
            del received[:end]
            yield content

    def _next_mac(self, content: bytes) -> bytes:
        number, self._number = self._number, self._number + 1
        return hmac.digest(self._key, _NUMBER.pack(number) + _LENGTH.pack(len(content)) + content, "sha256")


def _mac(key: bytes, *parts: bytes) -> bytes:
    """Of the parts one by one: where one ends and the next begins counts too."""
    return hmac.digest(key, b"".join(_NUMBER.pack(len(part)) + part for part in parts), "sha256")
