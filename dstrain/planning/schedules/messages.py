"""How many of a table's messages must be under way at a time, so that no rank waits for a send that can't end."""

from __future__ import annotations

from collections import Counter, defaultdict
from functools import lru_cache

from dstrain.planning.schedules.table import Action, Table, TableError

FEWEST_UNDER_WAY = 2


@lru_cache(maxsize=64)
def sends_under_way(table: Table) -> int:
    """The fewest sends from one rank to another that may be under way before it waits for the oldest: at least 2.

    A send ends when the other rank has come to the action that takes it in, or to one that takes in a later message:
    receives are posted in the order of the sends. Whether ranks with such channels get stuck does not depend on how
    fast they are, so that one run shows it.

    Source: Kahn 1974, The Semantics of a Simple Language for Parallel Programming.

    Raises:
        TableError: the ranks wait for each other, however many sends are under way.
    """
    for under_way in range(
        FEWEST_UNDER_WAY, 2 * len(table.placement) * table.micro_batches + FEWEST_UNDER_WAY
    ):
        if _ends(table, under_way):
            return under_way
    raise TableError("the ranks wait for each other")


def _ends(table: Table, under_way: int) -> bool:
    numbers: dict[Action, int] = {}
    for rank in range(len(table.ranks)):
        counts: Counter[int] = Counter()
        for message in table.sent_by(rank):
            numbers[message.action] = counts[message.target]
            counts[message.target] += 1
    places, done = [0] * len(table.ranks), set[Action]()
    posted: dict[tuple[int, int], int] = defaultdict(int)  # how many messages from a rank another has come to
    went_on = True
    while went_on:
        went_on = False
        for rank, actions in enumerate(table.ranks):
            while places[rank] < len(actions):
                action = actions[places[rank]]
                needed = table.waits_for(action)
                taken = None if needed is None else table.message_of(needed)
                if taken is not None and taken.target == rank:
                    channel = taken.source, rank
                    if posted[channel] <= numbers[taken.action]:
                        posted[channel] = numbers[taken.action] + 1
                        went_on = True
                if needed is not None and needed not in done:
                    break
                sent = table.message_of(action)
                if sent is not None and numbers[action] - under_way >= posted[rank, sent.target]:
                    break
                done.add(action)
                places[rank] += 1
                went_on = True
    return all(place == len(actions) for place, actions in zip(places, table.ranks, strict=True))
