"""The user's own DeepSpeed keys, from ``ds_config`` and ``deepspeed``: read, each with its place, and checked.

What is checked here needs neither the model nor the data nor the machine: whether DeepSpeed knows the key, whether it
takes the value, and whether it does with it in this run what its name says. What contradicts the plan is found when
the JSON is composed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dstrain.config.deepspeed_keys import canonical, what_is_wrong
from dstrain.config.json_reader import read_json
from dstrain.config.loader import ResolvedConfig
from dstrain.config.nested import KeyPath, leaves
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError


@dataclass(frozen=True)
class OwnKey:
    """A key with a value, the place where it is set, and the places of the blocks around it."""

    path: KeyPath
    value: Any
    places: tuple[str, ...]

    @property
    def place(self) -> str:
        return self.places[-1]


@dataclass(frozen=True)
class _Unfit:
    """Why a key can't be used: in which runs, with which values."""

    values: Callable[[Any], bool]
    reason: str
    instead: str
    runs: Callable[[RunConfig], bool] = lambda config: True


def _is_on(value: Any) -> bool:
    """Switched on: pydantic reads these words as no."""
    if isinstance(value, str):
        return value.lower() not in ("auto", "0", "off", "f", "false", "n", "no")
    return value not in (None, False, {})


def _shares_out(value: Any) -> bool:
    """A size of more than 1."""
    return _is_on(value) and value is not True and value not in (1, "1")


_NO_OTHER_AXIS = "dstrain shares a model out among stages and replicas alone, and its ranks are numbered so"
_NAMED_TOO_EARLY = (
    "dstrain names a checkpoint when its files are on the disk, and this writer returns before they are"
)
# Source: runs with DeepSpeed 0.19.8, or the code named.
_UNFIT: dict[KeyPath, _Unfit] = {
    ("wall_clock_breakdown",): _Unfit(
        _is_on,
        "DeepSpeed's pipeline engine fails with it: it starts a timer that runs already",
        "leave it out: metrics.jsonl has the time of every step",
        lambda config: config.pipeline > 1,
    ),
    ("flops_profiler", "enabled"): _Unfit(
        _is_on,
        "it switches wall_clock_breakdown on, with which DeepSpeed's pipeline engine fails",
        "--pipeline 1, or leave it out: dstrain counts FLOPs itself",
        lambda config: config.pipeline > 1,
    ),
    ("managed_gradient_accumulation",): _Unfit(
        lambda value: value is False,
        "then each micro-batch would be a step of the optimizer: dstrain lets DeepSpeed count micro-batches",
        "leave it out; --micro-batch and --global-batch say how many there are",
    ),
    ("gradient_allreduce_op",): _Unfit(
        lambda value: str(value).lower() == "sum",
        "then gradients grow with the number of replicas, and layouts no longer train the same model",
        "leave it out, and raise --lr if a larger step is meant",
    ),
    ("checkpoint", "load_universal"): _Unfit(
        _is_on,
        "DeepSpeed runs whatever the files of a universal checkpoint name",
        "leave it out: `dstrain resume` reads checkpoints of any layout",
    ),
    ("checkpoint", "writer", "decoupled"): _Unfit(
        _is_on, _NAMED_TOO_EARLY, "leave it out; background_save writes behind the training"
    ),
    ("datastates_ckpt",): _Unfit(
        _is_on, _NAMED_TOO_EARLY, "leave it out; background_save writes behind the training"
    ),
    ("data_efficiency", "enabled"): _Unfit(
        _is_on,
        "it works through DeepSpeed's data loader: dstrain reads the data itself, in one order for every layout",
        "leave it out",
    ),
    ("autotuning", "enabled"): _Unfit(
        _is_on, "it is started by DeepSpeed's own launcher alone", "leave it out; `dstrain plan --fit` searches"
    ),
    ("hybrid_engine", "enabled"): _Unfit(
        _is_on, "dstrain builds its engines itself, so that it would have no effect", "leave it out"
    ),
    ("tensor_parallel", "autotp_size"): _Unfit(
        _shares_out, _NO_OTHER_AXIS, "leave it out; --pipeline or --zero 3 share out the weights"
    ),
    ("sequence_parallel_size",): _Unfit(_shares_out, _NO_OTHER_AXIS, "leave it out"),
    ("expert_parallel", "enabled"): _Unfit(
        _is_on, _NO_OTHER_AXIS, "leave it out; --pipeline or --zero 3 share out the experts"
    ),
    ("compile", "deepcompile"): _Unfit(
        _is_on,
        "DeepSpeed accepts it and compiles nothing: that needs a call which dstrain does not make",
        "leave it out",
    ),
    ("zero_optimization", "zenflow"): _Unfit(
        _is_on,
        "ZenFlow updates most weights some steps late: it does not train what one process trains",
        "leave it out; --offload cpu keeps the optimizer's states in host memory",
    ),
}  # fmt: skip

# Deprecated keys whose successors are not for DeepSpeed's JSON to set, but for a key of dstrain's.
_INSTEAD: dict[KeyPath, str] = {
    (
        "zero_optimization",
        "cpu_offload",
    ): "offload_optimizer takes its place, and dstrain's offload sets that: --offload cpu",
    ("zero_optimization", "cpu_offload_param"): "leave it out: dstrain keeps parameters on the device",
    (
        "zero_optimization",
        "cpu_offload_use_pin_memory",
    ): "leave it out: --offload cpu pins memory where there is a GPU",
}


def own_keys(resolved: ResolvedConfig) -> Iterator[OwnKey]:
    """The user's own keys, under DeepSpeed's first names: the file first, the config's mapping over it.

    Raises:
        DstrainError: the file can't be read.
    """
    name = resolved.config.ds_config
    if name is not None:
        document = read_json(Path(name), where=str(resolved.origin("ds_config")))
        for path, value in leaves(document.values):
            places = tuple(f"{name}:{document.lines[path[:depth]]}" for depth in range(1, len(path) + 1))
            yield OwnKey(path, value, places)
    for path, value in leaves(resolved.config.deepspeed):
        yield OwnKey(path, value, tuple(_places(resolved, ("deepspeed", *path))))


def _places(resolved: ResolvedConfig, path: KeyPath) -> Iterator[str]:
    """The place of each key on the way to ``path``, below its first; a block's own line, if it is in the same file."""
    leaf = str(resolved.origin(*path))
    for depth in range(2, len(path)):
        block = str(resolved.blocks.get(path[:depth], leaf))
        yield block if block.rpartition(":")[0] == leaf.rpartition(":")[0] else leaf
    yield leaf


def mistakes(resolved: ResolvedConfig) -> list[DstrainError]:
    """What is wrong with the user's own DeepSpeed keys, each once; or with the file that they should stand in."""
    found: dict[str, DstrainError] = {}
    try:
        keys = list(own_keys(resolved))
    except DstrainError as error:
        return [error]
    for key in keys:
        mistake = _mistake(key, resolved.config)
        if mistake:
            found.setdefault(f"{mistake.where} {mistake.message}", mistake)
    return list(found.values())


def _mistake(key: OwnKey, config: RunConfig) -> DstrainError | None:
    wrong = what_is_wrong(key.path, key.value)
    if wrong:
        wrong = replace(wrong, hint=_INSTEAD.get(key.path, wrong.hint))
        return wrong.at(key.places[wrong.depth - 1])
    path = canonical(key.path)
    for depth in range(1, len(path) + 1):
        unfit = _UNFIT.get(path[:depth])
        value = key.value if depth == len(path) else {path[depth]: key.value}
        if unfit and unfit.values(value) and unfit.runs(config):
            given = f"{'.'.join(path)} = {json.dumps(key.value)}"
            return DstrainError(f"{given}: {unfit.reason}", where=key.place, hint=unfit.instead)
    return None
