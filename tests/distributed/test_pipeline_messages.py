"""Messages between stages: they arrive in the table's order, sends wait for nobody, and what has arrived can go."""

from __future__ import annotations

import time

import pytest
import torch

from dstrain.engine.pipeline_messages import (
    AHEAD,
    Mailbox,
    TensorSpec,
    from_numbers,
    to_numbers,
    with_gradients,
)
from dstrain.estimate import memory_activations
from dstrain.planning.schedules.messages import FEWEST_UNDER_WAY, sends_under_way
from dstrain.planning.schedules.named import (
    forward_only,
    interleaved,
    one_forward_one_backward,
    zero_bubble_h1,
    zero_bubble_v,
)
from dstrain.planning.schedules.table import FORWARD, Action, Table, TableError, in_a_row
from tests.support.distributed.workers import run


def test_the_plan_counts_with_the_same_numbers() -> None:
    assert memory_activations.RECEIVED_AHEAD == AHEAD


def test_specs_travel_as_numbers() -> None:
    specs = (TensorSpec((2, 3, 5), torch.bfloat16, True), TensorSpec((), torch.int64, False))
    assert from_numbers(to_numbers(specs)) == specs
    assert with_gradients(specs) == specs[:1]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 12])
def test_few_sends_need_to_be_under_way(ranks: int) -> None:
    for make in (one_forward_one_backward, zero_bubble_h1, zero_bubble_v, interleaved):
        assert sends_under_way(make(ranks, 2 * ranks)) <= 3
    assert sends_under_way(forward_only(in_a_row(ranks), 50)) == FEWEST_UNDER_WAY


def test_a_table_whose_ranks_both_send_before_they_take() -> None:
    """The first rank takes nothing before it has sent 8 messages, and the second one answers each at once."""
    numbers = range(8)
    first = [Action(kind, chunk, n) for kind, chunk in ("F0", "F2", "B2", "B0") for n in numbers]
    second = [Action(kind, chunk, n) for kind, chunk in ("F1", "F3", "B3", "B1") for n in numbers]
    table = Table(
        tuple(tuple(a._replace(chunk=int(a.chunk)) for a in row) for row in (first, second)), (0, 1, 0, 1), 8
    )
    table.check()
    assert FEWEST_UNDER_WAY < sends_under_way(table) <= len(numbers)


def test_ranks_that_wait_for_each_other_are_refused() -> None:
    first = (Action("F", 0, 0), Action("B", 0, 0), Action("F", 0, 1), Action("B", 0, 1))
    second = (Action("F", 1, 0), Action("F", 1, 1), Action("B", 1, 0), Action("B", 1, 1))
    with pytest.raises(TableError, match="wait for each other"):
        sends_under_way(Table((first, second), in_a_row(2), 2))


def exchange(rank: int, table: Table, sizes: list[int]) -> list[str]:
    """Carry a table's messages out, twice: each says who has sent it, and what."""
    mailbox = Mailbox(rank, lambda other: other, torch.device("cpu"))
    wrong = []
    for _ in range(2):
        mailbox.begin(table, lambda number: (sizes[number],))
        for action in table.ranks[rank]:
            needed = table.waits_for(action)
            message = None if needed is None else table.message_of(needed)
            if needed is not None and message is not None and message.target == rank:
                size = sizes[needed.micro_batch]
                wanted = float(100 * needed.chunk + needed.micro_batch + 0.5 * (needed.kind == FORWARD))
                got = mailbox.take(needed)
                if [tensor.tolist() for tensor in got] != [[wanted] * size]:
                    wrong.append(f"{needed}: {got}")
            if table.message_of(action) is not None:
                value = float(100 * action.chunk + action.micro_batch + 0.5 * (action.kind == FORWARD))
                tensor = torch.full((sizes[action.micro_batch],), value)
                if action.kind == FORWARD:
                    tensor = tensor.requires_grad_() * 1
                mailbox.send(action, [tensor])
        mailbox.end()
    return wrong


@pytest.mark.parametrize(
    "table",
    [zero_bubble_h1(3, 5), zero_bubble_v(3, 6), interleaved(3, 6), forward_only(in_a_row(3), 9)],
    ids=["zb-h1", "zbv", "interleaved", "evaluation"],
)
def test_messages_of_any_table_arrive(table: Table) -> None:
    """Of two sizes, each of which is announced when it first comes."""
    sizes = [3, 7] * table.micro_batches
    assert run(3, exchange, table, sizes) == [[], [], []]


def send_to_sleeper(rank: int) -> float:
    """Seconds that two sends take whose receiver is asleep, after a first step."""
    mailbox = Mailbox(rank, lambda other: other, torch.device("cpu"))
    table = forward_only(in_a_row(2), 2)
    for step in (1, 2):
        torch.distributed.barrier()
        mailbox.begin(table, lambda number: ())
        if step == 2 and rank == 1:
            time.sleep(1)
        start = time.perf_counter()
        for action in table.ranks[rank]:
            if rank == 0:
                mailbox.send(action, [torch.zeros(1 << 20)])
            else:
                mailbox.take(table.waits_for(action))
        seconds = time.perf_counter() - start
        mailbox.end()
    return seconds


def test_a_send_does_not_wait_for_its_receiver() -> None:
    assert run(2, send_to_sleeper)[0] < 0.8


def change_of_shape(rank: int) -> str:
    mailbox = Mailbox(rank, lambda other: other, torch.device("cpu"))
    table = forward_only(in_a_row(2), 2)
    mailbox.begin(table, lambda number: ())
    said = ""
    if rank == 1:
        said = str(mailbox.take(table.waits_for(table.ranks[1][0]))[0].shape)
    else:
        mailbox.send(table.ranks[0][0], [torch.zeros(3)])
        with pytest.raises(RuntimeError, match="hands on"):
            mailbox.send(table.ranks[0][1], [torch.zeros(4)])
    torch.distributed.barrier()
    return said


def test_a_shape_that_was_not_announced() -> None:
    assert run(2, change_of_shape) == ["", "torch.Size([3])"]


def test_a_layer_may_change_in_place_what_has_arrived() -> None:
    from dstrain.engine.pipeline_engine import _arrive

    received = torch.tensor([1.0, 2.0], requires_grad=True)
    counts = torch.tensor([1, 2])
    hidden, same = _arrive(received, counts)
    assert hidden.data_ptr() == received.data_ptr()
    hidden *= 3
    (hidden * hidden).sum().backward()
    assert received.grad is not None
    assert received.grad.tolist() == [2 * 3 * 3.0, 2 * 6 * 3.0]
    assert same.tolist() == [1, 2]
