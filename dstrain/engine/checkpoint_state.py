"""Reads a checkpoint's parameters one by one from DeepSpeed's files, without a GPU or an engine.

What lies in ``state/`` (DeepSpeed 0.19.8, with S a stage and R a replica of it):

- ``layer_NN-model_states.pt``, with stages: one layer's weights in training precision; with ZeRO-3 they
  are empty there;
- ``mp_rank_S_model_states.pt`` (ZeRO-3: ``zero_pp_rank_R_mp_rank_S_model_states.pt``): names and shapes by
  parameter group; without stages the weights; with ZeRO-0 the optimizer's states;
- ``[bf16_]zero_pp_rank_R_mp_rank_S_optim_states.pt``: fp32 weights and optimizer states, flat, group by group.

DeepSpeed's own readers (``zero_to_fp32``, ``ds_to_universal``) unpickle whatever a file names, hold all
ranks' files at once, and know neither ZeRO-2 and 3 below a pipeline nor two stages a rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dstrain.engine.checkpoint_files import PARAMETER_NAMES, TAG, MappedFiles, Piece, SavedTensor
from dstrain.engine.client_optimizer import hugging_face_name
from dstrain.errors import DstrainError
from dstrain.runs.checkpoint.manifest import WHOLE

MASTER = "fp32 master"
"""The fp32 weight among a parameter's states; the others have the optimizer's own names."""

Values = dict[str, dict[str, Any]]
"""By parameter: see `SavedParameter.values`."""

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_LAYER_FILE = re.compile(r"layer_(\d+)-.*model_states\.pt")


@dataclass(frozen=True)
class SavedParameter:
    """One parameter of a checkpoint.

    Attributes:
        name: its Hugging Face name. A tied weight appears under each of its names.
        layer: its layer in [embed, block 0, ..., head]; None for a model in one piece.
        weight: in the precision that the model computed with.
        states: `MASTER` (the fp32 weight; with ZeRO-0 there is none beside ``weight``) and the
            optimizer's tensors by the optimizer's names (``exp_avg``, ``exp_avg_sq``, ``momentum_buffer``),
            of the parameter's shape. Empty for a frozen parameter, and with ZeRO-0 in a checkpoint of before
            the names were kept in it.
        values: what else the optimizer keeps for it, such as its count of steps: numbers, and tensors that have not
            an element for each of the parameter's.
    """

    name: str
    layer: int | None
    weight: SavedTensor
    states: dict[str, SavedTensor]
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def most_precise(self) -> SavedTensor:
        """The fp32 master where there is one, else the weight."""
        return self.states.get(MASTER, self.weight)


class SavedState:
    """All parameters of one checkpoint, in the order of the layers, and the buffers that it holds.

    Memory is taken by the tensors that are read. The files are mapped, those of one stage at a time: their
    pages count as resident while there is room, and the system takes them back where there is none.

    Args:
        checkpoint: a folder ``step-NNNNNN`` of a run's ``checkpoints/``.

    Raises:
        DstrainError: a file is missing or damaged, or the layout's state can't be read without its ranks.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.folder = checkpoint / TAG
        if (self.folder / "offloaded_tensors").exists():
            raise DstrainError(
                "the weights of an `offload: nvme` run lie in DeepSpeed's swap files, which only its own"
                " ranks can read",
                where=str(checkpoint),
                hint="continue with `dstrain resume RUN --steps N --set save_weights=true`: it writes the"
                " final weights as safetensors",
            )
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        self._models = self._by_stage(_MODEL_FILE, names)
        self._optimizers = self._by_stage(_OPTIMIZER_FILE, names)
        self._layers = {int(m[1]): self.folder / m[0] for m in map(_LAYER_FILE.fullmatch, names) if m}
        if not self._models:
            raise DstrainError(
                "there is no DeepSpeed state in this checkpoint", where=str(checkpoint), hint=WHOLE
            )
        replicas = max(len(paths) for paths in self._models + self._optimizers)
        self._files = MappedFiles(most=2 * replicas + 2)
        self.zero = int(self._first_model(0)["ds_config"]["zero_optimization"]["stage"])
        if self.zero and len(self._optimizers) != len(self._models):
            raise DstrainError(
                "optimizer states of some stages are missing", where=str(self.folder), hint=WHOLE
            )

    @property
    def has_masters(self) -> bool:
        """Whether fp32 weights are kept beside those that the model computes with."""
        return self.zero > 0

    @property
    def ours(self) -> dict[str, Any]:
        """What dstrain's own saving left beside DeepSpeed's state."""
        ours: dict[str, Any] = self._first_model(0)["dstrain"]
        return ours

    @property
    def counters(self) -> dict[str, int]:
        """The engine's counts of steps and samples, by DeepSpeed's names."""
        record = self._first_model(0)
        return {name: record[name] for name in ("global_steps", "global_samples", "skipped_steps")}

    @property
    def loss_scaler(self) -> Any:
        """DeepSpeed's loss scale with its counts, as it stood; None with ZeRO-0, which is fp32's alone."""
        if not self.zero:
            return None
        return self._files[self._optimizers[0][0]]["optimizer_state_dict"]["loss_scaler"]

    @cached_property
    def parameters(self) -> dict[str, SavedParameter]:
        """By Hugging Face name."""
        states: dict[str, dict[str, SavedTensor]] = {}
        values: Values = {}
        aliases: dict[str, str] = {}
        for stage in range(len(self._models)):
            for name, key, tensor in self._states_of(stage, values):
                states.setdefault(name, {})[key] = tensor
            # DeepSpeed writes them on the first rank of all only; elsewhere no two layers share a weight.
            aliases |= self._first_model(stage).get("shared_params") or {}
        for alias, source in aliases.items():
            if source in states:
                states[alias] = states[source]
                values[alias] = values.get(source, {})
        weights = self._sharded_weights(states, aliases) if self.zero == 3 else self._whole_weights()
        return {
            hugging_face_name(name): SavedParameter(
                hugging_face_name(name), _layer_of(name), weight, states.get(name, {}), values.get(name, {})
            )
            for name, weight in sorted(weights.items(), key=_by_layer)
        }

    @cached_property
    def buffers(self) -> dict[str, SavedTensor]:
        """The persistent buffers, by Hugging Face name."""
        held = self._held()
        return {hugging_face_name(name): held[name] for name in self._buffer_names() if name in held}

    def _by_stage(self, pattern: re.Pattern[str], names: list[str]) -> list[list[Path]]:
        """Paths of the files that fit the pattern (groups: replica, stage): [stage][replica]."""
        found = sorted(
            (int(match[2]), int(match[1] or 0), match[0]) for match in map(pattern.fullmatch, names) if match
        )
        stages = [
            [self.folder / name for stage, _, name in found if stage == wanted]
            for wanted in range(len({stage for stage, _, _ in found}))
        ]
        replicas = [replica for _, replica, _ in found]
        if (
            replicas != [replica for paths in stages for replica in range(len(paths))]
            or len({len(paths) for paths in stages}) > 1
        ):
            raise DstrainError(
                "files of some ranks are missing from this checkpoint", where=str(self.folder), hint=WHOLE
            )
        return stages

    def _first_model(self, stage: int) -> dict[str, Any]:
        return self._files[self._models[stage][0]]

    def _tensor(self, path: Path, keys: tuple[Any, ...], value: torch.Tensor) -> SavedTensor:
        pieces = (Piece(path, keys, 0, value.numel()),)
        return SavedTensor(tuple(value.shape), value.dtype, pieces, self._files)

    def _held(self) -> dict[str, SavedTensor]:
        """Everything that the layers' files hold, or the one module's: names with their layers in front."""
        if not self._layers:
            path = self._models[0][0]
            return {
                name: self._tensor(path, ("module", name), value)
                for name, value in self._files[path]["module"].items()
            }
        return {
            f"{layer}.{name}": self._tensor(path, (name,), value)
            for layer, path in sorted(self._layers.items())
            for name, value in self._files[path].items()
        }

    def _buffer_names(self) -> set[str]:
        return {
            name for stage in range(len(self._models)) for name in self._first_model(stage)["buffer_names"]
        }

    def _whole_weights(self) -> dict[str, SavedTensor]:
        buffers = self._buffer_names()
        return {name: tensor for name, tensor in self._held().items() if name not in buffers}

    def _sharded_weights(
        self, states: dict[str, dict[str, SavedTensor]], aliases: dict[str, str]
    ) -> dict[str, SavedTensor]:
        """ZeRO-3: the trained weights are the masters, rounded; the frozen ones lie beside the shapes."""
        weights = {}
        for stage, paths in enumerate(self._models):
            for name, shape in (self._first_model(stage).get("frozen_param_shapes") or {}).items():
                weights[name] = self._joined(paths, ("frozen_param_fragments", name), shape)
        for name, placeholder in self._held().items():
            if name in states:
                master = states[name][MASTER]
                weights[name] = SavedTensor(master.shape, placeholder.dtype, master.pieces, self._files)
        return weights | {alias: weights[source] for alias, source in aliases.items() if source in weights}

    def _joined(self, paths: list[Path], keys: tuple[Any, ...], shape: Any, start: int = 0) -> SavedTensor:
        """A tensor that is sharded evenly over the replicas' files, the last share padded."""
        total = math.prod(shape)
        share = math.ceil(total / len(paths))
        pieces = tuple(
            Piece(path, keys, start, max(0, min(share, total - replica * share)))
            for replica, path in enumerate(paths)
        )
        value: Any = self._files[paths[0]]
        for key in keys:
            value = value[key]
        return SavedTensor(tuple(shape), value.dtype, pieces, self._files)

    def _states_of(self, stage: int, values: Values) -> Iterator[tuple[str, str, SavedTensor]]:
        """(name, key, tensor) of a stage's optimizer states; fills ``values``."""
        if self.zero == 0:
            yield from self._plain_states(stage, values)
        elif self.zero == 3:
            yield from self._states_of_shards(stage, values)
        else:
            yield from self._states_of_partitions(stage, values)

    def _plain_states(self, stage: int, values: Values) -> Iterator[tuple[str, str, SavedTensor]]:
        path = self._models[stage][0]
        record, weights = self._files[path], self._held()
        # torch numbers the parameters group after group; their names are dstrain's own record.
        named = (names for group in record["dstrain"].get(PARAMETER_NAMES, ()) for names in group)
        for index, names in enumerate(named):
            state = record["optimizer"]["state"].get(index, {})
            for name in names:
                if name not in weights:
                    continue  # whoever asks for it is told that the checkpoint does not hold it
                shared = _shared(state, math.prod(weights[name].shape))
                for key in shared:
                    yield name, key, self._tensor(path, ("optimizer", "state", index, key), state[key])
                values[name] = _others(state, shared)

    def _states_of_partitions(self, stage: int, values: Values) -> Iterator[tuple[str, str, SavedTensor]]:
        """ZeRO-1 and 2: each group is one flat vector, cut among the replicas without regard to parameters."""
        shapes = {
            name: shape for group in self._first_model(stage)["param_shapes"] for name, shape in group.items()
        }
        pieces: dict[tuple[str, str], list[Piece]] = {}
        dtypes: dict[tuple[str, str], torch.dtype] = {}
        for path in self._optimizers[stage]:
            record = self._files[path]["optimizer_state_dict"]
            for index, mapping in enumerate(record["param_slice_mappings"]):
                state = record["base_optimizer_state"]["state"].get(index, {})
                # The master is saved without the padding at its end, the states with it.
                shared = _shared(state, record["single_partition_of_fp32_groups"][index].numel())
                flat: dict[str, tuple[Any, ...]] = {MASTER: ("single_partition_of_fp32_groups", index)}
                flat |= {key: ("base_optimizer_state", "state", index, key) for key in shared}
                for name, part in mapping.items():
                    for key, keys in flat.items():
                        piece = Piece(path, ("optimizer_state_dict", *keys), part.start, part.numel)
                        pieces.setdefault((name, key), []).append(piece)
                        dtypes[name, key] = torch.float32 if key == MASTER else state[key].dtype
                    values[name] = _others(state, shared)
        for (name, key), parts in pieces.items():
            yield name, key, SavedTensor(tuple(shapes[name]), dtypes[name, key], tuple(parts), self._files)

    def _states_of_shards(self, stage: int, values: Values) -> Iterator[tuple[str, str, SavedTensor]]:
        """ZeRO-3: each parameter is cut among the replicas; a replica's shares lie one behind the other."""
        paths = self._optimizers[stage]
        record = self._files[paths[0]]["optimizer_state_dict"]
        for index, group in enumerate(self._first_model(stage)["param_shapes"]):
            state = record["optimizer_state_dict"]["state"].get(index, {})
            shared = _shared(state, record["fp32_flat_groups"][index].numel())
            flat: dict[str, tuple[Any, ...]] = {MASTER: ("fp32_flat_groups", index)}
            flat |= {key: ("optimizer_state_dict", "state", index, key) for key in shared}
            start = 0
            for name, shape in group.items():
                for key, keys in flat.items():
                    yield name, key, self._joined(paths, ("optimizer_state_dict", *keys), shape, start)
                values[name] = _others(state, shared)
                start += math.ceil(math.prod(shape) / len(paths))


def _shared(state: dict[str, Any], numel: int) -> list[str]:
    """The names of an optimizer's states that have an element for each of the parameter's ``numel``."""
    return [
        key
        for key, value in state.items()
        if torch.is_tensor(value) and value.ndim and value.numel() >= numel
    ]


def _others(state: dict[str, Any], shared: list[str]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in shared and value is not None}


def _layer_of(name: str) -> int | None:
    number = name.partition(".")[0]
    return int(number) if number.isdigit() else None


def _by_layer(item: tuple[str, Any]) -> int:
    return _layer_of(item[0]) or 0
