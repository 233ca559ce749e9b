"""Loads a checkpoint of any layout into an engine of another layout.

Each rank opens the old layout's files and reads the numbers that it owns: its stage's layers, and of these its
partition of the fp32 weights and the optimizer's states. Nothing is written, and nothing is kept twice.

DeepSpeed's own way is a universal checkpoint: a second copy of all states on the disk, converted by a process
that unpickles whatever the files name. It knows neither ZeRO-0 nor ZeRO-3 below a pipeline, and leaves out frozen
parameters and buffers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from deepspeed import comm as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import nn

from dstrain.control_group import barrier
from dstrain.engine.checkpoint_files import SavedTensor
from dstrain.engine.checkpoint_state import MASTER, SavedParameter
from dstrain.engine.client_optimizer import hugging_face_name
from dstrain.errors import DstrainError
from dstrain.model.adapters import has_adapters
from dstrain.optimizers import facts_of_type, kept_states

Matched = dict[nn.Parameter, SavedParameter]
Say = Callable[[str], None]

# A long reading says this often how far it is.
_SECONDS_BETWEEN_WORDS = 10.0


class Restorable(Protocol):
    """What is needed of a `SavedState`."""

    @property
    def folder(self) -> Path: ...

    @property
    def parameters(self) -> Mapping[str, SavedParameter]: ...

    @property
    def buffers(self) -> Mapping[str, SavedTensor]: ...

    @property
    def counters(self) -> Mapping[str, int]: ...

    @property
    def loss_scaler(self) -> Any: ...

    @property
    def ours(self) -> dict[str, Any]: ...


@torch.no_grad()
def restore(engine: DeepSpeedEngine, saved: Restorable, say: Say) -> dict[str, Any]:
    """Give the engine the state of a checkpoint, whatever layout that was saved by. Collective.

    The engine is as it was built: it has trained no step. Its weights, fp32 masters, optimizer states and their
    counts of steps, frozen parameters, buffers, counters and fp16's loss scale become the checkpoint's. What the
    layout does not change comes with the engine: the learning rate and the decay of its parameter groups.

    Args:
        say: takes a line for the user, where the reading takes long.

    Returns:
        What dstrain's own saving left in the checkpoint.

    Raises:
        DstrainError: a file can't be read, or the checkpoint lacks something that this rank needs.
    """
    matched = _match(engine.module, saved)
    _refuse_other_shapes(matched, saved)
    if saved.counters["global_steps"] > saved.counters["skipped_steps"]:
        _refuse_lost_states(_needed_states(engine), matched, saved)
    if isinstance(engine.optimizer, DeepSpeedZeroOptimizer_Stage3):
        _fill_shards(engine.optimizer, matched, say)
    else:
        for parameter, held in matched.items():
            if not parameter.requires_grad:
                _whole(parameter, held).into(parameter, held.weight)
        if isinstance(engine.optimizer, DeepSpeedZeroOptimizer):
            _fill_partitions(engine.optimizer, matched, say)
        else:
            _fill_plain(engine.optimizer, matched, say)
    for name, buffer in engine.module.named_buffers():
        if hugging_face_name(name) in saved.buffers:
            buffer.copy_(saved.buffers[hugging_face_name(name)].read())
    if engine.fp16_enabled():
        engine.optimizer.loss_scaler = copy.deepcopy(saved.loss_scaler)
    for name, count in saved.counters.items():
        setattr(engine, name, count)
    return saved.ours


def _match(module: nn.Module, saved: Restorable) -> Matched:
    """This rank's parameters and what the checkpoint holds of them. Raises DstrainError."""
    matched = {}
    adapted = has_adapters(module)
    for name, parameter in module.named_parameters():
        held = saved.parameters.get(hugging_face_name(name))
        if held is None and adapted and not parameter.requires_grad:
            continue  # the model that the adapters are for has its weights
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if held is None or held.weight.shape != shape:
            found = "does not hold it" if held is None else f"has one of {list(held.weight.shape)}"
            raise DstrainError(
                f"this run's model has a parameter {hugging_face_name(name)} of {list(shape)}, and the checkpoint"
                f" {found}",
                where=str(saved.folder),
                hint="resume with the model that the checkpoint was made with",
            )
        matched[parameter] = held
    return matched


def _needed_states(engine: DeepSpeedEngine) -> set[str]:
    """The tensors that the engine's optimizer keeps for a parameter, as far as dstrain knows it."""
    facts = facts_of_type(engine.optimizer_name())
    options = engine.optimizer_params() or {}
    return {state.name for state in kept_states(facts, options)} if facts is not None else set()


def _refuse_other_shapes(matched: Matched, saved: Restorable) -> None:
    """Refuse states that can't be cut as the parameters are. Raises DstrainError."""
    for parameter, held in matched.items():
        for key, value in held.values.items():
            if parameter.requires_grad and torch.is_tensor(value) and value.ndim:
                raise DstrainError(
                    f"the optimizer's {key} of {held.name} has not a number for each of the parameter's: another layout"
                    " can't share it out",
                    where=str(saved.folder),
                    hint="resume in the layout that it was made with",
                )


def _refuse_lost_states(needed: set[str], matched: Matched, saved: Restorable) -> None:
    """Refuse to train on with an optimizer that would start from nothing. Raises DstrainError."""
    for parameter, held in matched.items():
        lost = needed - held.states.keys()
        if parameter.requires_grad and lost:
            raise DstrainError(
                f"the checkpoint does not say which optimizer state ({' and '.join(sorted(lost))})"
                f" belongs to {held.name}: an older dstrain saved ZeRO-0 states without names",
                where=str(saved.folder),
                hint="resume once in the layout that it was made with; the next checkpoint can be resumed"
                " in any layout",
            )


@dataclass(frozen=True)
class _Share:
    """What a rank keeps of a parameter: ``numel`` numbers from ``start`` of it, at ``at`` of a flat tensor."""

    saved: SavedParameter
    start: int
    numel: int
    at: int

    def into(self, target: torch.Tensor, source: SavedTensor) -> None:
        if self.numel:
            here = target.data.view(-1).narrow(0, self.at, self.numel)
            here.copy_(source.part(self.start, self.numel))


class _Progress:
    """Says now and then how much of this rank's part is read: that of the tensors ``flats``."""

    def __init__(self, flats: Iterable[torch.Tensor], say: Say) -> None:
        self._numbers = sum(flat.numel() for flat in flats)
        self._say = say
        self._read = 0
        self._said_at = time.monotonic()

    def of(self, shares: Iterable[_Share]) -> Iterator[_Share]:
        """The same shares; the caller reads each before it takes the next."""
        for share in shares:
            yield share
            self._read += share.numel
            if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_WORDS:
                self._said_at = time.monotonic()
                self._say(f"rank {dist.get_rank()} has read {self._read / self._numbers:.0%} of its part")


def _whole(parameter: nn.Parameter, saved: SavedParameter) -> _Share:
    return _Share(saved, 0, parameter.numel(), 0)


def _fill_plain(optimizer: torch.optim.Optimizer, matched: Matched, say: Say) -> None:
    """ZeRO-0: the optimizer's parameters are the model's, and fp32."""
    progress = _Progress(matched, say)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = matched[parameter]
            _fill(optimizer, parameter, [held], progress.of([_whole(parameter, held)]))


def _fill_partitions(optimizer: DeepSpeedZeroOptimizer, matched: Matched, say: Say) -> None:
    """ZeRO-1 and 2: of each group one flat partition of fp32 weights and states; the weights follow from these."""
    progress = _Progress(optimizer.single_partition_of_fp32_groups, say)
    for parameters, flat in zip(
        optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        shares = []
        for parameter in parameters:
            mapping = parameter._hp_mapping
            if mapping is not None:  # None: this rank's partition holds nothing of it
                there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                shares.append(_Share(matched[parameter], there.start, there.numel, here.start))
        members = [matched[parameter] for parameter in parameters]
        _fill(optimizer.optimizer, flat, members, progress.of(shares))
    barrier()  # the gathering waits for no rank that still reads
    optimizer.update_lp_params()


def _fill_shards(optimizer: DeepSpeedZeroOptimizer_Stage3, matched: Matched, say: Say) -> None:
    """ZeRO-3: each parameter is cut among the replicas; a replica's shares lie one behind the other."""
    progress = _Progress(optimizer.fp32_partitioned_groups_flat, say)
    optimizer.checkpoint_event_prologue()  # nothing stays gathered
    for index, parameters in enumerate(optimizer.fp16_groups):
        shares = []
        for parameter in parameters:
            _, at, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            shares.append(_shard(parameter, matched[parameter], at))
        flat = optimizer.fp32_partitioned_groups_flat[index]
        members = [matched[parameter] for parameter in parameters]
        _fill(optimizer.optimizer, flat, members, progress.of(shares))
        optimizer._reassign_or_swap_out_partitioned_parameters(index)
    for parameter, held in matched.items():
        if not parameter.requires_grad:
            _shard(parameter, held, 0).into(_partition(parameter), held.weight)
    barrier()  # the gathering waits for no rank that still reads
    optimizer.checkpoint_event_epilogue()


def _partition(parameter: Any) -> torch.Tensor:
    """This rank's share of a parameter that DeepSpeed has cut; torch's class does not know this attribute."""
    share: torch.Tensor = parameter.ds_tensor
    return share


def _shard(parameter: Any, saved: SavedParameter, at: int) -> _Share:
    """The last shares are padded, and may be padding alone."""
    room = parameter.partition_numel()
    start = min(room * dist.get_rank(group=parameter.ds_process_group), parameter.ds_numel)
    return _Share(saved, start, min(room, parameter.ds_numel - start), at)


def _fill(
    optimizer: torch.optim.Optimizer,
    flat: torch.Tensor,
    members: Sequence[SavedParameter],
    shares: Iterable[_Share],
) -> None:
    """Fill a tensor of the optimizer with fp32 weights, and make its states.

    Args:
        flat: what the optimizer takes for a parameter; what no share covers is padding.
        members: all parameters of its group, those included of which this rank has no share.
    """
    states: dict[str, Any] = {
        key: torch.zeros_like(flat)
        for key in sorted({key for member in members for key in member.states} - {MASTER})
    }
    for share in shares:
        share.into(flat, share.saved.most_precise)
        for key, state in states.items():
            share.into(state, share.saved.states[key])
    values = members[0].values
    for member in members[1:]:
        if not _equal(member.values, values):
            raise ValueError(f"{values} and {member.values} are kept of parameters of one group")
    if states or values:  # else no step was taken yet, or the optimizer keeps nothing
        optimizer.state[flat] = {
            **states,
            **{key: _as_kept_by(optimizer, key, value, flat) for key, value in values.items()},
        }


def _equal(some: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Whether these are the same numbers, in tensors or not."""
    return some.keys() == others.keys() and all(bool(value == others[key]) for key, value in some.items())


def _as_kept_by(optimizer: torch.optim.Optimizer, key: str, value: Any, of: torch.Tensor) -> Any:
    """A value of a state, as this optimizer keeps it for ``of``, which may be another than has saved it.

    torch counts steps in a tensor, a fused AdamW in one beside its parameter, and DeepSpeed's AdamW for states in host
    memory in a number.
    """
    if key == "step" and isinstance(optimizer, DeepSpeedCPUAdam):
        return int(value)
    if key == "step" and isinstance(optimizer, torch.optim.Adam):
        device = of.device if optimizer.defaults.get("fused") else "cpu"
        return torch.tensor(float(value), dtype=torch.float32, device=device)
    return value.clone() if torch.is_tensor(value) else copy.deepcopy(value)
