"""DeepSpeed keys set by the user in ``ds_config`` and ``deepspeed``: read with their lines, and checked.

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


_NO_OTHER_AXIS = (
    "dstrain splits a model over pipeline stages and replicas only, and numbers its ranks accordingly"
)
_NAMED_TOO_EARLY = (
    "dstrain completes a checkpoint when its files are on disk, but this writer returns earlier"
)
# Source: runs with DeepSpeed 0.19.8, or the code named.
_UNFIT: dict[KeyPath, _Unfit] = {
    ("wall_clock_breakdown",): _Unfit(
        _is_on,
        "DeepSpeed's pipeline engine fails with it: it starts a timer that is already running",
        "remove it: metrics.jsonl has the time of every step",
        lambda config: config.pipeline > 1,
    ),
    ("flops_profiler", "enabled"): _Unfit(
        _is_on,
        "it enables wall_clock_breakdown, with which DeepSpeed's pipeline engine fails",
        "--pipeline 1, or remove it: dstrain counts FLOPs itself",
        lambda config: config.pipeline > 1,
    ),
    ("managed_gradient_accumulation",): _Unfit(
        lambda value: value is False,
        "each micro-batch would become an optimizer step: dstrain lets DeepSpeed count micro-batches",
        "remove it; --micro-batch and --global-batch decide the number",
    ),
    ("gradient_allreduce_op",): _Unfit(
        lambda value: str(value).lower() == "sum",
        "gradients would grow with the number of replicas, and layouts would no longer train the same model",
        "remove it, and raise --lr if you want larger steps",
    ),
    ("checkpoint", "load_universal"): _Unfit(
        _is_on,
        "DeepSpeed runs code that is named in the files of a universal checkpoint",
        "remove it: `dstrain resume` reads checkpoints of any layout",
    ),
    ("checkpoint", "writer", "decoupled"): _Unfit(
        _is_on, _NAMED_TOO_EARLY, "remove it; background_save writes checkpoints in the background"
    ),
    ("datastates_ckpt",): _Unfit(
        _is_on, _NAMED_TOO_EARLY, "remove it; background_save writes checkpoints in the background"
    ),
    ("data_efficiency", "enabled"): _Unfit(
        _is_on,
        "it needs DeepSpeed's data loader, but dstrain reads the data itself, in the same order for every layout",
        "remove it",
    ),
    ("autotuning", "enabled"): _Unfit(
        _is_on, "only DeepSpeed's own launcher starts it", "remove it; `dstrain plan --fit` searches for layouts"
    ),
    ("hybrid_engine", "enabled"): _Unfit(
        _is_on, "it would have no effect: dstrain builds its engines itself", "remove it"
    ),
    ("tensor_parallel", "autotp_size"): _Unfit(
        _shares_out, _NO_OTHER_AXIS, "remove it; --pipeline or --zero 3 shard the weights"
    ),
    ("sequence_parallel_size",): _Unfit(_shares_out, _NO_OTHER_AXIS, "remove it"),
    ("expert_parallel", "enabled"): _Unfit(
        _is_on, _NO_OTHER_AXIS, "remove it; --pipeline or --zero 3 shard the experts"
    ),
    ("compile", "deepcompile"): _Unfit(
        _is_on,
        "DeepSpeed accepts it without compiling anything, since that needs a call that dstrain does not make",
        "remove it",
    ),
    ("zero_optimization", "zenflow"): _Unfit(
        _is_on,
        "ZenFlow updates most weights some steps late, so it does not train the same model as one process",
        "remove it; --offload cpu keeps optimizer states in host memory",
    ),
}  # fmt: skip

# Deprecated keys whose successors are not for DeepSpeed's JSON to set, but for a key of dstrain's.
_INSTEAD: dict[KeyPath, str] = {
    (
        "zero_optimization",
        "cpu_offload",
    ): "use --offload cpu, which sets offload_optimizer instead",
    ("zero_optimization", "cpu_offload_param"): "remove it: dstrain keeps parameters on the device",
    (
        "zero_optimization",
        "cpu_offload_use_pin_memory",
    ): "remove it: --offload cpu pins memory on machines with GPUs",
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
