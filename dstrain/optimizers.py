"""Every optimizer that dstrain knows by name, in one table: what it keeps, moves and takes.

A new one is an entry in `OPTIMIZERS`, and its DeepSpeed JSON in ``ds_configs/optimizer/``. The config's choices, the
estimates of memory, time and disk, DeepSpeed's JSON and the reading of checkpoints all ask this table.

An optimizer from outside (``module:name``) is not in it: nothing is known of one before it runs, and the estimates take
it for AdamW with torch's kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dstrain.plugins import is_code


@dataclass(frozen=True)
class StateTensor:
    """An fp32 tensor that an optimizer keeps for each parameter, of the parameter's shape.

    Attributes:
        name: as the optimizer calls it in its state, and so in checkpoints.
        kept_with: the config key without which (at 0) it does not keep it; None: always.
        update_bytes: that an update moves for it and one parameter, beside `OptimizerFacts.update_bytes`.
    """

    name: str
    kept_with: str | None = None
    update_bytes: int = 0


@dataclass(frozen=True)
class OptimizerFacts:
    """What the plan and the engine have to know of an optimizer.

    Attributes:
        fragment: its DeepSpeed JSON, a name below ``ds_configs/optimizer/``.
        offloaded_fragment: the same for states in host memory, where DeepSpeed has a kernel of its own; None: it is
            torch's there too.
        deepspeed_type: ``optimizer.type`` in these.
        takes: the config keys beside ``lr`` that it is made with; ``$name`` in its fragments.
        states: what it keeps.
        update_bytes: that torch's kernels read and write for the update of one parameter, its states included unless
            they say more: they go over lists of tensors once for each term. Updates compute next to nothing: memory
            bandwidth limits them, so that no FLOPs are counted.
        fused_update_bytes: the same of torch's fused kernel, which is taken on GPUs; None: there is none.
        offloaded_update_bytes: the same of DeepSpeed's kernel for host memory; None: there is none.
        temporary_bytes: that a step of torch's takes for each number that it works on at a time, on accelerators and
            on CPUs.
        decoupled_decay: whether weight decay acts on the weights alone. If not it is added to the gradient, in a copy.
    """

    fragment: str
    deepspeed_type: str
    takes: tuple[str, ...]
    states: tuple[StateTensor, ...]
    update_bytes: int
    temporary_bytes: Mapping[str, int]
    decoupled_decay: bool
    offloaded_fragment: str | None = None
    offloaded_update_bytes: int | None = None
    fused_update_bytes: int | None = None


# Bytes of updates were counted in torch/optim/adam.py and sgd.py (`_multi_tensor`), temporaries there and in
# `_single_tensor`: AdamW takes the root of the second moment and its quotient. torch's fused AdamW, and DeepSpeed's for
# host memory, read gradient, weight and moments once and write the latter three once.
OPTIMIZERS: dict[str, OptimizerFacts] = {
    "adamw": OptimizerFacts(
        fragment="adamw",
        offloaded_fragment="adamw-offloaded",
        deepspeed_type="AdamW",
        takes=("betas", "eps", "weight_decay"),
        states=(StateTensor("exp_avg"), StateTensor("exp_avg_sq")),
        update_bytes=80,
        fused_update_bytes=28,
        offloaded_update_bytes=28,
        temporary_bytes={"cuda": 0, "cpu": 8},
        decoupled_decay=True,
    ),
    "sgd": OptimizerFacts(
        fragment="sgd",
        deepspeed_type="SGD",
        takes=("momentum", "weight_decay"),
        states=(StateTensor("momentum_buffer", kept_with="momentum", update_bytes=12),),
        update_bytes=12,
        temporary_bytes={"cuda": 0, "cpu": 0},
        decoupled_decay=False,
    ),
}


_OUTSIDE = replace(
    OPTIMIZERS["adamw"],
    takes=(),
    temporary_bytes={"cuda": 4, "cpu": 8},
    fused_update_bytes=None,
    offloaded_fragment=None,
    offloaded_update_bytes=None,
)


def optimizer_facts(name: str) -> OptimizerFacts:
    """What is known of an optimizer of the config; of one from outside, what is assumed.

    Raises KeyError for any other name that is not in the table.
    """
    return _OUTSIDE if is_code(name) else OPTIMIZERS[name]


def facts_of_type(deepspeed_type: str | None) -> OptimizerFacts | None:
    """The entry for ``optimizer.type`` of a DeepSpeed JSON, in any case; None where there is none."""
    wanted = str(deepspeed_type).lower()
    return next((facts for facts in OPTIMIZERS.values() if facts.deepspeed_type.lower() == wanted), None)


def option_keys() -> tuple[str, ...]:
    """The config keys that some optimizer takes beside ``lr``, each once."""
    return tuple(dict.fromkeys(key for facts in OPTIMIZERS.values() for key in facts.takes))


def update_bytes(facts: OptimizerFacts, options: Mapping[str, Any]) -> int:
    """Bytes that an update of torch's moves for one parameter, with these options as in `kept_states`."""
    return facts.update_bytes + sum(state.update_bytes for state in kept_states(facts, options))


def kept_states(facts: OptimizerFacts, options: Mapping[str, Any]) -> tuple[StateTensor, ...]:
    """Those that it keeps with these options, by config key; DeepSpeed's JSON has the same keys."""
    return tuple(state for state in facts.states if state.kept_with is None or options.get(state.kept_with))
