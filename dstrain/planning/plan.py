"""The plan: everything that will run, decided before any process starts, as pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.estimate.device import Device
from dstrain.estimate.disk import checkpoint_bytes, disk_bytes
from dstrain.estimate.memory import USABLE, StageMemory, estimate, stage_memory
from dstrain.estimate.stage_time import attended_share, layer_times, stage_shares
from dstrain.estimate.time import StepTime, step_time
from dstrain.estimate.traffic import Traffic
from dstrain.estimate.verdict import memory_verdict
from dstrain.planning.attention import check_attention
from dstrain.planning.batch import Batch, make_batch
from dstrain.planning.checks import (
    check_batch,
    check_frozen,
    check_layerdrop,
    check_model,
    check_partition,
    check_precision,
    refuse,
)
from dstrain.planning.deepspeed.values import deepspeed_config
from dstrain.planning.hooks import HookSpec, check_profiled_ranks, hooks_of, not_covered
from dstrain.planning.layout import Host, Layout, choose_data_parallel, fill_hosts
from dstrain.planning.loss_chunk import loss_chunk
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.stage_partition import cut_as_asked, cut_by_time
from dstrain.planning.warnings import (
    warnings_about,
    warnings_about_balance,
    warnings_about_determinism,
    warnings_about_devices,
    warnings_about_memory,
    warnings_about_time,
)
from dstrain.renamed import CONFIG_KEYS, DATA_SUMMARY, with_new_names
from dstrain.version import __version__

FORMAT = 6
_FORMAT_OF_0_1 = 5


@dataclass(frozen=True)
class Machines:
    """What there is to run on.

    Attributes:
        hosts: names and slots; one local host without a hostfile. Slots are 0 where processes can
            be had at will (CPU).
        accelerator: ``cuda`` or ``cpu``.
        device_names: of one host's devices, for the display.
        precisions: what the devices can compute in.
        memory_bytes: of the smallest device, other hosts' taken to be alike; None: not known.
        flash_packages: the installed ones of ``FLASH_PACKAGES``.
        device: how fast these devices are; None: not known.
    """

    hosts: tuple[Host, ...]
    accelerator: str
    device_names: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32", "bf16", "fp16")
    memory_bytes: int | None = None
    flash_packages: tuple[str, ...] = ()
    device: Device | None = None

    @property
    def slots(self) -> int | None:
        """All devices together; None where processes can be had at will."""
        total = sum(host.slots for host in self.hosts)
        return total or None


@dataclass(frozen=True)
class Plan:
    """Frozen, complete, JSON-serialisable. Nothing later decides what this could have decided.

    Attributes:
        config: the run config, every key.
        origins: origin of each run-config key, for the display.
        layout, batch: ranks and samples.
        accelerator: ``cuda`` or ``cpu``.
        deepspeed: the DeepSpeed JSON; ``deepspeed_origins`` has the origin of each leaf, dotted.
        model: the shape's totals, the file of its Hugging Face config, its folder, and ``init``.
        data: what the prepared data hold: rows, tokens, vocabulary, fingerprint.
        stage_parameters: parameters that each stage holds.
        stage_time: estimated time of each stage over the mean of all.
        stage_memory: estimated bytes on a rank of each stage, by what they hold.
        memory_bytes: of one device; on CPUs of the machine, which its ranks share; None: not known.
        memory_verdict: ``fits``, ``tight`` or ``does not fit``, and by how much; empty where the memory is not known.
        device: what the devices are called.
        time: estimated, of a step and of the run; None where the devices' speed is not known.
        imbalance: estimated time of the slowest stage over the mean.
        imbalance_of_auto: what ``partition: auto`` would reach.
        checkpoint_bytes: estimated, of one checkpoint.
        disk_bytes: estimated, of all that the run leaves on its disk at once, at most.
        loss_chunk: tokens whose logits are made at a time for the loss; 0: all of a micro-batch.
        hooks: what is called beside the training.
        not_covered: what is from outside, and so not covered by the proof that all layouts train the same.
        warnings: what is accepted but worth knowing.
    """

    config: dict[str, Any]
    origins: dict[str, str]
    layout: Layout
    batch: Batch
    accelerator: str
    deepspeed: dict[str, Any]
    deepspeed_origins: dict[str, str]
    model: dict[str, Any]
    data: dict[str, Any]
    stage_parameters: tuple[int, ...]
    stage_time: tuple[float, ...]
    stage_memory: tuple[StageMemory, ...]
    imbalance: float
    imbalance_of_auto: float
    memory_bytes: int | None = None
    memory_verdict: str = ""
    device: str = ""
    time: StepTime | None = None
    loss_chunk: int = 0
    checkpoint_bytes: int = 0
    disk_bytes: int = 0
    hooks: tuple[HookSpec, ...] = ()
    not_covered: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dstrain: str = __version__
    format: int = field(default=FORMAT)

    @property
    def run_config(self) -> RunConfig:
        return RunConfig.model_validate(self.config)

    def to_record(self) -> dict[str, Any]:
        """As JSON-serialisable data, with the rank table spelled out for a reader."""
        record = asdict(self)
        for stage, need in zip(record["stage_memory"], self.stage_memory, strict=True):
            stage["total"] = need.total
        record["layout"]["ranks"] = [
            asdict(place) | {"chunks": [[chunk.start, chunk.stop] for chunk in place.chunks]}
            for place in self.layout.places()
        ]
        return record

    @property
    def identity(self) -> dict[str, Any]:
        """What the runs that go on from a checkpoint must agree with, and the layout, which may change."""
        return {
            "zero": self.config["zero"],
            "pipeline": self.layout.pipeline,
            "schedule": self.layout.schedule,
            "offload": self.config["offload"],
            "data_parallel": self.layout.data_parallel,
            "cut": list(self.layout.cut),
            "micro_batch": self.batch.micro_batch,
            "precision": self.config["precision"],
            "optimizer": self.config["optimizer"],
            **{key: self.config[key] for key in ("betas", "eps", "momentum", "weight_decay", "freeze")},
            "seed": self.config["seed"],
            "global_batch": self.batch.global_batch,
            "seq_len": self.batch.seq_len,
            "pack": self.config["pack"],
            "data": self.data["fingerprint"],
            "parameters": self.model["parameters"],
            "model": self.model["fingerprint"],
            "init": self.model["init"],
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Plan:
        """The plan that `to_record` wrote, in 0.1 too. Raises DstrainError for any other format."""
        if record.get("format") == _FORMAT_OF_0_1:
            record = _from_0_1(record)
        if record.get("format") != FORMAT:
            raise DstrainError(f"the plan has format {record.get('format')}, and this dstrain reads {FORMAT}")
        layout = record["layout"]
        hosts = tuple(Host(host["name"], host["slots"]) for host in layout["hosts"])
        return cls(
            **{
                **record,
                "layout": Layout(
                    hosts,
                    layout["pipeline"],
                    layout["data_parallel"],
                    tuple(layout["cut"]),
                    layout["schedule"],
                ),
                "batch": Batch(**record["batch"]),
                "stage_parameters": tuple(record["stage_parameters"]),
                "stage_time": tuple(record["stage_time"]),
                "stage_memory": tuple(_stage_memory(stage) for stage in record["stage_memory"]),
                "time": _step_time(record["time"]),
                "hooks": tuple(HookSpec(**hook) for hook in record.get("hooks", ())),
                "not_covered": tuple(record.get("not_covered", ())),
                "warnings": tuple(record["warnings"]),
            }
        )


def make_plan(
    resolved: ResolvedConfig,
    machines: Machines,
    shape: ModelShape,
    data: Mapping[str, Any],
    model_file: str,
    model_fingerprint: str = "",
    model_folder: str | None = None,
) -> Plan:
    """Decide everything. A pure function of its arguments.

    Args:
        resolved: what is wanted.
        machines: what there is to run on.
        shape: the model's measured shape.
        data: summary of the prepared data (``train_rows``, ``validation_rows``, ``vocab_size``, ...).
        model_file: the Hugging Face config file that ``shape`` was measured from.
        model_fingerprint: hash of that file's content.
        model_folder: where the model's weights and tokenizer lie; None for a built-in shape.

    Raises:
        DstrainError: whatever can't work, with its origin, its reason and the nearest thing that does.
    """
    config = resolved.config
    refuse(resolved)
    name = (
        machines.device.name if machines.device and machines.accelerator == "cuda" else machines.accelerator
    )
    check_precision(resolved, machines.precisions, name)
    check_attention(resolved, machines.accelerator, machines.flash_packages)
    check_model(shape, resolved, data["vocab_size"])
    check_partition(resolved, shape)

    replicas = choose_data_parallel(
        config.pipeline, config.data_parallel, machines.slots, where=str(resolved.origin("pipeline"))
    )
    hosts = _fill_hosts(machines, config.pipeline * replicas)
    batch = make_batch(
        global_batch=config.global_batch,
        micro_batch=config.micro_batch,
        data_parallel=replicas,
        pipeline=config.pipeline,
        seq_len=config.seq_len,
        where=str(resolved.origin("micro_batch" if config.micro_batch else "global_batch")),
        where_global=str(resolved.origin("global_batch")),
    )
    check_batch(resolved, batch)
    chunk = loss_chunk(batch.micro_batch, config.seq_len, shape.vocab_size, tokenwise=shape.tokenwise_head)
    times = layer_times(
        shape,
        seq_len=config.seq_len,
        attended=attended_share(config),
        blocks_recomputed=config.activation_checkpointing,
        head_recomputed=chunk > 0,
    )
    memory = estimate(
        config,
        shape,
        replicas=replicas,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        device_is_host=machines.accelerator == "cpu",
    )
    # Ranks on CPUs share their machine's memory, which another cut does not make larger.
    limit = None
    if machines.accelerator == "cuda" and machines.memory_bytes is not None:
        limit = USABLE * machines.memory_bytes
    fastest = cut_by_time(times, config.pipeline, config.schedule, memory, limit)
    even = fastest if limit is None else cut_by_time(times, config.pipeline, config.schedule, memory, None)
    asked = cut_as_asked(config.partition, shape, config.pipeline, config.schedule)
    layout = Layout(hosts, config.pipeline, replicas, asked or fastest, config.schedule)
    stage_time = stage_shares(layout, times)
    check_layerdrop(resolved, shape, layout)
    check_frozen(resolved, shape, layout)
    check_profiled_ranks(resolved, layout)
    stage_parameters = tuple(shape.parameters_of(layout.chunks(stage)) for stage in range(config.pipeline))
    deepspeed = deepspeed_config(resolved, batch, machines.accelerator, max(stage_parameters))
    checkpoint = checkpoint_bytes(config, shape, layout, machines.accelerator)
    needs = stage_memory(config, shape, layout, batch, machines.accelerator, deepspeed.values)
    verdict = memory_verdict(layout, needs, machines.memory_bytes, machines.accelerator)
    time = None
    if machines.device is not None and config.precision in machines.device.flops:
        time = step_time(config, shape, layout, batch, machines.device, deepspeed=deepspeed.values)
    return Plan(
        config=config.model_dump(),
        origins={key: str(resolved.origin(key)) for key in config.model_dump()},
        layout=layout,
        batch=batch,
        accelerator=machines.accelerator,
        deepspeed=deepspeed.values,
        deepspeed_origins={".".join(path): origin for path, origin in deepspeed.origins.items()},
        model={
            "file": model_file,
            "folder": model_folder,
            "init": config.init,
            "fingerprint": model_fingerprint,
            "dropout": shape.dropout,
            "type": shape.model_type,
            "parameters": shape.total_parameters,
            "layers": [layer.name for layer in shape.layers],
            "tied": [tied.key for tied in shape.tied],
            "pipelines": shape.pipeline_refusal is None,
        },
        data=dict(data),
        stage_parameters=stage_parameters,
        stage_time=stage_time,
        stage_memory=needs,
        imbalance=max(stage_time),
        imbalance_of_auto=max(stage_shares(replace(layout, cut=fastest), times)),
        memory_bytes=machines.memory_bytes,
        memory_verdict=verdict,
        device=machines.device.name if machines.device else ", ".join(dict.fromkeys(machines.device_names)),
        time=time,
        loss_chunk=chunk,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk_bytes(config, checkpoint, sum(stage_parameters)),
        hooks=hooks_of(config),
        not_covered=not_covered(config),
        warnings=(
            *resolved.notes,
            *warnings_about(config, layout, batch, data, shape, time),
            *warnings_about_determinism(config, machines.accelerator),
            *warnings_about_balance(
                config, max(stage_time), max(stage_shares(replace(layout, cut=even), times))
            ),
            *warnings_about_memory(
                config, layout, batch, shape, needs, machines.memory_bytes, machines.accelerator
            ),
            *(warnings_about_time(config, shape, layout, batch, time) if time else ()),
            *warnings_about_devices(_gpu_names(machines), machines.device, config.precision),
        ),
    )


def _from_0_1(record: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **record,
        "format": FORMAT,
        "config": with_new_names(record["config"], CONFIG_KEYS),
        "origins": with_new_names(record["origins"], CONFIG_KEYS),
        "data": with_new_names(record["data"], DATA_SUMMARY),
    }


def _gpu_names(machines: Machines) -> tuple[str, ...]:
    return machines.device_names if machines.accelerator == "cuda" else ()


def _stage_memory(record: Mapping[str, Any]) -> StageMemory:
    return StageMemory(**{key: value for key, value in record.items() if key != "total"})


def _step_time(record: Mapping[str, Any] | None) -> StepTime | None:
    if record is None:
        return None
    sent = tuple(Traffic(**part) for part in record["traffic"])
    return StepTime(**{**record, "traffic": sent, "assumptions": tuple(record["assumptions"])})


def _fill_hosts(machines: Machines, ranks: int) -> tuple[Host, ...]:
    """The hosts that hold the ranks, each with the slots that are used."""
    if machines.slots is None:
        return (Host(machines.hosts[0].name, ranks),)
    hosts = fill_hosts(machines.hosts, ranks)
    if len({host.slots for host in hosts}) > 1:
        used = ", ".join(f"{host.name} {host.slots}" for host in hosts)
        raise DstrainError(
            f"{ranks} ranks would fill the hosts unevenly ({used}), and DeepSpeed's launcher numbers such"
            " ranks wrongly",
            where="--hostfile",
            hint="give each host the same number of slots, or choose a layout that fills whole hosts",
        )
    return hosts
