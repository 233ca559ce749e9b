"""Every training loss that dstrain knows by name, in one table: what the plan has to know of it.

A new one is an entry in `LOSSES`, and its function in `dstrain.model.loss.BUILT_IN`. The config's choices and the
estimate of memory ask this table.

A loss from outside (``module:name``) is not in it: nothing is known of one before it runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dstrain.plugins import is_code


@dataclass(frozen=True)
class LossFacts:
    """What the estimate has to know of a loss.

    Attributes:
        in_pieces: whether it has only `dstrain.model.loss.PIECE` logits in fp32 at a time, and keeps none. If not, it
            takes `COPIES` of all logits that are there.
    """

    in_pieces: bool


COPIES = 3
"""Of the logits, in fp32, where F.cross_entropy(logits.float(), labels) takes most, in the backward pass: what autograd
has kept, and the gradients of its two parts. Counted in tests/distributed/test_memory.py."""

LOSSES: dict[str, LossFacts] = {"cross-entropy": LossFacts(in_pieces=True)}

_OUTSIDE = LossFacts(in_pieces=False)


def loss_facts(name: str) -> LossFacts:
    """What is known of a loss of the config; of one from outside, what is assumed.

    Raises KeyError for any other name that is not in the table.
    """
    return _OUTSIDE if is_code(name) else LOSSES[name]
