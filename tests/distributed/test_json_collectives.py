"""Plain values between ranks, and what a rank that sends anything else brings about."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.distributed.workers import run

VALUES = [
    [None, "Grüße", {"a": [1, 2.5, True]}],
    ["", "x" * 100_000, []],  # of very different lengths
]


def exchange(rank: int) -> list[Any]:
    from torch import distributed

    from dstrain.json_collectives import all_gather_json, broadcast_json

    found: list[Any] = []
    for values in VALUES:
        found += [all_gather_json(values[rank]), [broadcast_json(values[rank], src=src) for src in range(3)]]
    pairs = distributed.new_group([0, 2])
    found.append(all_gather_json(rank, pairs) if rank != 1 else [0, 2])
    return found


def test_every_rank_has_the_value_of_every_rank() -> None:
    wanted = [each for values in VALUES for each in (values, values)] + [[0, 2]]
    assert run(3, exchange) == [wanted] * 3


def hostile(rank: int, sent: bytes, announced: int) -> str:
    """What rank 0 says of a rank 1 that does not keep to the form."""
    import torch
    from torch import distributed

    from dstrain.control_group import control_group
    from dstrain.json_collectives import all_gather_json

    group = control_group()
    if rank == 0:
        try:
            return str(all_gather_json("mine"))
        except RuntimeError as error:
            return str(error)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    distributed.all_gather(lengths, torch.tensor([announced]), group=group)
    if 0 < announced < 1000:
        longest = max(int(length) for length in lengths)
        content = torch.frombuffer(bytearray(sent.ljust(longest)), dtype=torch.uint8)
        received = [torch.empty(longest, dtype=torch.uint8) for _ in range(2)]
        distributed.all_gather(received, content, group=group)
    return ""


@pytest.mark.parametrize(
    ("sent", "announced", "said"),
    [
        (b"cos\nsystem\n(S'touch /tmp/x'\ntR.", 31, "what rank 1 sent is no JSON"),
        (b"[" * 900, 900, "what rank 1 sent is no JSON"),
        (b"", 2**40, "rank 1 announced a message of 1,099,511,627,776 bytes"),
        (b"", -1, "rank 1 announced a message of -1 bytes"),
    ],
)
def test_anything_else_is_refused(sent: bytes, announced: int, said: str) -> None:
    assert said in run(2, hostile, sent, announced)[0]
