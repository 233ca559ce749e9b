"""The channel between supervisor and ranks: without the key nobody gets anywhere, nor changes anything on the way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.runs.channel import (
    ANSWER_BYTES,
    MAX_RECORD_BYTES,
    NONCE_BYTES,
    OPENING_BYTES,
    PROOF_BYTES,
    RECORD_EXTRA_BYTES,
    AuthenticationError,
    RankEnd,
    SupervisorEnd,
)
from dstrain.runs.control_key import new_key

KEY = new_key()


def take(end: RankEnd | SupervisorEnd, received: bytes) -> list[bytes]:
    return list(end.feed(received))


def pair() -> tuple[RankEnd, SupervisorEnd]:
    """Both ends after their handshake."""
    rank, supervisor = RankEnd(KEY, "x"), SupervisorEnd(KEY, "x", set())
    take(supervisor, rank.take_handshake())
    take(rank, supervisor.take_handshake())
    take(supervisor, rank.take_handshake())
    assert rank.established and supervisor.established
    return rank, supervisor


def test_the_handshake() -> None:
    rank, supervisor = RankEnd(KEY, "x"), SupervisorEnd(KEY, "x", set())
    opening = rank.take_handshake()
    assert len(opening) == OPENING_BYTES and rank.take_handshake() == b""
    assert not supervisor.opened and take(supervisor, opening) == [] and supervisor.opened
    answer = supervisor.take_handshake()
    assert len(answer) == ANSWER_BYTES and not rank.established
    assert take(rank, answer) == [] and rank.established and not supervisor.established
    proof = rank.take_handshake()
    assert len(proof) == PROOF_BYTES
    assert take(supervisor, proof + rank.seal(b"hello")) == [b"hello"] and supervisor.established
    assert take(rank, supervisor.seal(b"welcome")) == [b"welcome"]
    assert KEY not in opening + answer + proof and KEY.hex().encode() not in opening + answer + proof
    assert NONCE_BYTES * 8 >= 128


def test_nonces_are_fresh() -> None:
    openings = {RankEnd(KEY, "x").take_handshake() for _ in range(100)}
    assert len(openings) == 100
    opening, answers = openings.pop(), set()
    for _ in range(100):
        supervisor = SupervisorEnd(KEY, "x", set())
        take(supervisor, opening)
        answers.add(supervisor.take_handshake())
    assert len({answer[:NONCE_BYTES] for answer in answers}) == 100


@pytest.mark.parametrize(
    ("key", "launch"),
    [(new_key(), "x"), (KEY, "y"), (KEY, ""), (b"", "x"), (KEY[:-1] + bytes([KEY[-1] ^ 1]), "x")],
    ids=["another key", "another launch", "no launch", "no key", "one bit"],
)
def test_another_key_or_launch(key: bytes, launch: str) -> None:
    for rank, supervisor in (
        (RankEnd(key, launch), SupervisorEnd(KEY, "x", set())),
        (RankEnd(KEY, "x"), SupervisorEnd(key, launch, set())),
    ):
        with pytest.raises(AuthenticationError):
            take(supervisor, rank.take_handshake())
        assert not supervisor.opened and supervisor.take_handshake() == b""


def test_neither_end_believes_its_own_words() -> None:
    """What one end has sent is not what the other would."""
    rank, supervisor = RankEnd(KEY, "x"), SupervisorEnd(KEY, "x", set())
    opening = rank.take_handshake()
    for reflected in (opening, opening[8:], opening[-ANSWER_BYTES:], opening[8:40] + opening[40:]):
        with pytest.raises(AuthenticationError):
            take(_copy_of_rank(rank), reflected.ljust(ANSWER_BYTES, b"\0"))
    take(supervisor, opening)
    answer = supervisor.take_handshake()
    with pytest.raises(AuthenticationError):
        take(supervisor, answer[NONCE_BYTES:])
    rank, supervisor = pair()
    with pytest.raises(AuthenticationError):
        take(rank, rank.seal(b"x"))
    with pytest.raises(AuthenticationError):
        take(supervisor, supervisor.seal(b"x"))


def _copy_of_rank(rank: RankEnd) -> RankEnd:
    """In the state after its opening: a failed attempt ends an end."""
    again = RankEnd(KEY, "x")
    again._nonce = rank._nonce
    return again


def test_an_opening_counts_once() -> None:
    openings: set[bytes] = set()
    overheard = RankEnd(KEY, "x").take_handshake()
    take(SupervisorEnd(KEY, "x", openings), overheard)
    again = SupervisorEnd(KEY, "x", openings)
    with pytest.raises(AuthenticationError, match="repeats"):
        take(again, overheard)
    assert not again.opened
    with pytest.raises(AuthenticationError):
        take(SupervisorEnd(KEY, "x", openings), b"dstrain2" + bytes(OPENING_BYTES))
    assert len(openings) == 1, "only who knows the key adds to them"


def test_a_conversation_is_not_another_one() -> None:
    """An answer, a proof or a record that was overheard is worth nothing in another connection."""
    rank, supervisor = RankEnd(KEY, "x"), SupervisorEnd(KEY, "x", set())
    take(supervisor, rank.take_handshake())
    answer = supervisor.take_handshake()
    take(rank, answer)
    proof = rank.take_handshake()
    take(supervisor, proof)
    other_rank, other_supervisor = RankEnd(KEY, "x"), SupervisorEnd(KEY, "x", set())
    take(other_supervisor, other_rank.take_handshake())
    with pytest.raises(AuthenticationError):
        take(other_rank, answer)
    with pytest.raises(AuthenticationError):
        take(other_supervisor, proof)
    with pytest.raises(AuthenticationError):
        take(pair()[1], rank.seal(b"x"))
    with pytest.raises(AuthenticationError):
        take(pair()[0], supervisor.seal(b"x"))


@pytest.mark.parametrize("part", ["opening", "answer", "proof"])
def test_every_bit_of_the_handshake_counts(part: str) -> None:
    size = {"opening": OPENING_BYTES, "answer": ANSWER_BYTES, "proof": PROOF_BYTES}[part]
    for bit in range(8 * size):
        rank, supervisor = RankEnd(KEY, "x"), SupervisorEnd(KEY, "x", set())
        with pytest.raises(AuthenticationError):
            for name, end, other in (
                ("opening", rank, supervisor),
                ("answer", supervisor, rank),
                ("proof", rank, supervisor),
            ):
                sent = bytearray(end.take_handshake())
                if name == part:
                    sent[bit // 8] ^= 1 << bit % 8
                take(other, bytes(sent))
        assert not supervisor.established


def records(count: int = 3) -> tuple[SupervisorEnd, list[bytes]]:
    rank, supervisor = pair()
    return supervisor, [rank.seal(b"message %d\n" % number) for number in range(count)]


def test_every_bit_of_a_record_counts() -> None:
    for bit in range(8 * len(records(1)[1][0])):
        supervisor, [record] = records(1)
        changed = bytearray(record)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            # A longer length waits for more, which makes it no better.
            assert take(supervisor, bytes(changed)) == []
            assert take(supervisor, bytes(MAX_RECORD_BYTES)) == []
        except AuthenticationError:
            continue
        pytest.fail(f"bit {bit} can be changed")


TAMPERING: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "left out": lambda sent: sent[1:],
    "left out between": lambda sent: [sent[0], sent[2]],
    "repeated": lambda sent: [sent[0], sent[0]],
    "reordered": lambda sent: [sent[1], sent[0], sent[2]],
    "injected": lambda sent: [sent[0], b"\0\0\0\5" + b"stop\n" + bytes(32), *sent[1:]],
    "no length": lambda sent: [sent[0], bytes(4), *sent[1:]],
    "another length": lambda sent: [sent[0], b"\xff\xff\xff\xff", *sent[1:]],
    "joined": lambda sent: [sent[0], b"\0\0\0\x14" + sent[1][4:14] + sent[2][4:]],
    # Not of the code at its end: each 256th of them ends with what the next record begins with.
    "cut inside": lambda sent: [sent[0], sent[1][:5] + sent[1][6:], *sent[2:]],
}


@pytest.mark.parametrize("name", TAMPERING)
def test_what_lies_between_can_only_cut(name: str) -> None:
    supervisor, sent = records()
    found: list[bytes] = []
    with pytest.raises(AuthenticationError):
        for content in supervisor.feed(b"".join(TAMPERING[name](sent))):
            found.append(content)
    assert found == [b"message 0\n"][: len(found)], "what came before counts, and nothing else"


@settings(deadline=None, max_examples=100)
@given(contents=st.lists(st.binary(min_size=1, max_size=300), max_size=8), data=st.data())
def test_records_come_in_pieces_of_any_length(contents: list[bytes], data: st.DataObject) -> None:
    rank, supervisor = RankEnd(KEY, "x"), SupervisorEnd(KEY, "x", set())
    take(supervisor, rank.take_handshake())
    take(rank, supervisor.take_handshake())
    stream = rank.take_handshake() + b"".join(map(rank.seal, contents))
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
    found: list[bytes] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        found += take(supervisor, stream[start:end])
    assert found == contents


@settings(deadline=None, max_examples=300)
@given(received=st.binary(max_size=400), greeting=st.booleans())
def test_whatever_comes_proves_nothing(received: bytes, greeting: bool) -> None:
    supervisor = SupervisorEnd(KEY, "x", set())
    rank = RankEnd(KEY, "x")
    for end, sent in ((supervisor, b"dstrain2" * greeting + received), (rank, received)):
        try:
            assert take(end, sent) == []
        except AuthenticationError:
            continue
        assert not end.established and len(sent) < max(OPENING_BYTES, ANSWER_BYTES)


def test_what_is_kept_of_a_record_is_bounded() -> None:
    rank, supervisor = pair()
    largest = rank.seal(bytes(MAX_RECORD_BYTES))
    assert len(largest) == MAX_RECORD_BYTES + RECORD_EXTRA_BYTES
    assert take(supervisor, largest) == [bytes(MAX_RECORD_BYTES)]
    with pytest.raises(AuthenticationError):
        take(supervisor, (MAX_RECORD_BYTES + 1).to_bytes(4, "big"))
