"""From choices to a plan: decide, compose DeepSpeed's JSON, estimate, warn. Pure: nothing is looked up or written.

The one thing that is read are the fragments in ``ds_configs/``, which come with dstrain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.estimate.disk import checkpoint_bytes, disk_bytes
from dstrain.estimate.memory import (
    USABLE,
    StageMemory,
    estimate,
    memory_needed,
    memory_verdict,
    stage_memory,
)
from dstrain.estimate.stage_time import attended_share, layer_times, stage_shares
from dstrain.estimate.time import StepTime, step_time
from dstrain.planning.attention import check_attention, with_chosen_attention
from dstrain.planning.batch import Batch, make_batch
from dstrain.planning.buffer_sizes import loss_chunk
from dstrain.planning.checks import refuse
from dstrain.planning.deepspeed.composition import DeepSpeedConfig, deepspeed_config, user_values
from dstrain.planning.hook_specs import check_profiled_ranks, hooks_of
from dstrain.planning.layout import Host, Layout, choose_data_parallel, fill_hosts
from dstrain.planning.model_checks import (
    check_batch,
    check_layerdrop,
    check_model,
    check_partition,
    check_precision,
    check_quantized,
    check_rows,
)
from dstrain.planning.model_shape import ModelShape, check_frozen
from dstrain.planning.partition import cut_as_asked, cut_by_time
from dstrain.planning.plan import Machines, Plan, PlannedData, PlannedModel
from dstrain.planning.recipe_values import fit_recipe, follow_data
from dstrain.planning.warnings import (
    warnings_about,
    warnings_about_balance,
    warnings_about_determinism,
    warnings_about_devices,
    warnings_about_loss,
    warnings_about_lr_schedule,
    warnings_about_memory,
    warnings_about_optimizer,
    warnings_about_pretrained,
    warnings_about_time,
)


def make_plan(
    resolved: ResolvedConfig,
    machines: Machines,
    shape: ModelShape,
    data: PlannedData,
    model_file: str,
    model_fingerprint: str = "",
    model_folder: str | None = None,
    base_fingerprint: str | None = None,
) -> Plan:
    """Decide everything. A pure function of its arguments.

    Args:
        resolved: what is wanted.
        machines: what there is to run on.
        shape: the model's measured shape.
        data: what the prepared data hold.
        model_file: the Hugging Face config file that ``shape`` was measured from.
        model_fingerprint: hash of that file's content.
        model_folder: where the model's weights and tokenizer lie; None for a built-in shape.
        base_fingerprint: hash of the pretrained weights that an adapter is for.

    Raises:
        DstrainError: whatever can't work, with its origin, its reason and the nearest thing that does.
    """
    refuse(resolved)
    resolved = follow_data(fit_recipe(resolved, shape, machines.slots), data)
    config = resolved.config
    chosen = with_chosen_attention(resolved, shape, *machines.kernels)
    _check(resolved, machines, shape, data)
    decided = _decide(chosen, machines, shape)
    deepspeed = deepspeed_config(resolved, decided.batch, machines.accelerator, max(decided.stage_parameters))
    estimates = _estimate(chosen.config, machines, shape, decided, deepspeed)
    device = machines.device.name if machines.device else ", ".join(dict.fromkeys(machines.device_names))
    return Plan(
        config=config.model_dump(),
        origins={key: str(resolved.origin(key)) for key in config.model_dump()},
        layout=decided.layout,
        batch=decided.batch,
        accelerator=machines.accelerator,
        attention=chosen.config.attention,
        deepspeed=deepspeed.values,
        deepspeed_origins={".".join(path): origin for path, origin in deepspeed.origins.items()},
        model=PlannedModel(
            file=model_file,
            folder=model_folder,
            init=config.init,
            fingerprint=model_fingerprint,
            dropout=shape.dropout,
            type=shape.model_type,
            parameters=shape.total_parameters,
            layers=tuple(layer.name for layer in shape.layers),
            tied=tuple(tied.key for tied in shape.tied),
            pipelines=shape.pipeline_refusal is None,
            adapter_parameters=shape.adapter_parameters,
            bits=shape.bits,
            base_fingerprint=base_fingerprint,
        ),
        data=data,
        stage_parameters=decided.stage_parameters,
        stage_time=decided.stage_time,
        stage_memory=estimates.stage_memory,
        imbalance=max(decided.stage_time),
        imbalance_of_auto=decided.imbalance_of_auto,
        memory_bytes=machines.memory_bytes,
        memory_verdict=estimates.memory_verdict,
        device=device,
        time=estimates.time,
        loss_chunk=decided.loss_chunk,
        checkpoint_bytes=estimates.checkpoint_bytes,
        disk_bytes=estimates.disk_bytes,
        hooks=hooks_of(config),
        not_covered=(
            *map(str, config.plugins),
            *(f"DeepSpeed's {key}" for key in deepspeed.not_covered),
        ),
        warnings=(
            *resolved.notes,
            *warnings_about_pretrained(resolved),
            *_warnings(chosen.config, machines, shape, data, decided, estimates),
        ),
    )


@dataclass(frozen=True)
class _Decided:
    """What a plan chooses.

    Attributes:
        stage_parameters, stage_time: as in `Plan`.
        imbalance_of_auto: time of the slowest stage over the mean, as ``partition: auto`` would cut.
        imbalance_without_limit: the same, if memory had no end.
        loss_chunk: as in `Plan`.
    """

    layout: Layout
    batch: Batch
    stage_parameters: tuple[int, ...]
    stage_time: tuple[float, ...]
    imbalance_of_auto: float
    imbalance_without_limit: float
    loss_chunk: int


def _decide(resolved: ResolvedConfig, machines: Machines, shape: ModelShape) -> _Decided:
    """The layout, the batch and the cut. Raises DstrainError as `make_plan` does."""
    config = resolved.config
    replicas = choose_data_parallel(
        config.pipeline, config.data_parallel, machines.slots, where=str(resolved.origin("pipeline"))
    )
    hosts = _fill_hosts(machines, config.pipeline * replicas)
    batch = _batch(resolved, replicas)
    chunk = loss_chunk(batch.micro_batch, config.seq_len, shape.vocab_size, tokenwise=shape.tokenwise_head)
    times = layer_times(
        shape,
        seq_len=config.seq_len,
        attended=attended_share(config),
        blocks_recomputed=config.activation_checkpointing,
        head_recomputed=chunk > 0,
    )
    fastest, without_limit = _fastest_cuts(resolved, machines, shape, hosts, batch, times)
    asked = cut_as_asked(config.partition, shape, config.pipeline, config.schedule)
    layout = Layout(hosts, config.pipeline, replicas, asked or fastest, config.schedule)
    check_rows(resolved, shape, batch)
    check_layerdrop(resolved, shape, layout)
    check_frozen(resolved, shape, layout)
    check_quantized(resolved, shape)
    check_profiled_ranks(resolved, layout)
    return _Decided(
        layout=layout,
        batch=batch,
        stage_parameters=tuple(shape.parameters_of(layout.chunks(stage)) for stage in range(config.pipeline)),
        stage_time=stage_shares(layout, times),
        imbalance_of_auto=max(stage_shares(replace(layout, cut=fastest), times)),
        imbalance_without_limit=max(stage_shares(replace(layout, cut=without_limit), times)),
        loss_chunk=chunk,
    )


def _check(resolved: ResolvedConfig, machines: Machines, shape: ModelShape, data: PlannedData) -> None:
    """Refuse what no layout would mend. Raises DstrainError."""
    on_cuda = machines.device is not None and machines.accelerator == "cuda"
    name = machines.device.name if machines.device is not None and on_cuda else machines.accelerator
    check_precision(resolved, machines.precisions, name)
    check_attention(resolved, machines.accelerator, machines.flash_packages)
    check_model(shape, resolved, data.vocab_size)
    check_partition(resolved, shape)


def _batch(resolved: ResolvedConfig, replicas: int) -> Batch:
    """How the global batch is shared out. Raises DstrainError where it can't be."""
    config = resolved.config
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
    return batch


def _fastest_cuts(
    resolved: ResolvedConfig,
    machines: Machines,
    shape: ModelShape,
    hosts: Sequence[Host],
    batch: Batch,
    times: tuple[int, ...],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The fastest cut that fits in memory, and the fastest of all.

    Which cuts fit is searched for with an estimate that adds up over layers; the fastest one is looked at exactly.
    """
    config = resolved.config
    memory = estimate(
        config,
        shape,
        replicas=batch.data_parallel,
        micro_batch=batch.micro_batch,
        accumulation=batch.accumulation,
        device_is_host=machines.accelerator == "cpu",
    )
    # Ranks on CPUs share their machine's memory, which another cut does not make larger.
    limit = None
    if machines.accelerator == "cuda" and machines.memory_bytes is not None:
        limit = USABLE * machines.memory_bytes
    fastest = cut_by_time(times, config.pipeline, config.schedule, memory, None)
    if limit is None:
        return fastest, fastest
    layout = Layout(tuple(hosts), config.pipeline, batch.data_parallel, fastest, config.schedule)
    needs = stage_memory(config, shape, layout, batch, machines.accelerator, user_values(resolved))
    if memory_needed(layout, needs, machines.accelerator)[0] <= limit:
        return fastest, fastest
    return cut_by_time(times, config.pipeline, config.schedule, memory, limit), fastest


@dataclass(frozen=True)
class _Estimates:
    """What the run will need and take; the attributes are those of `Plan`."""

    stage_memory: tuple[StageMemory, ...]
    memory_verdict: str
    time: StepTime | None
    checkpoint_bytes: int
    disk_bytes: int


def _estimate(
    config: RunConfig, machines: Machines, shape: ModelShape, decided: _Decided, deepspeed: DeepSpeedConfig
) -> _Estimates:
    layout, batch, device = decided.layout, decided.batch, machines.device
    needs = stage_memory(config, shape, layout, batch, machines.accelerator, deepspeed.values)
    checkpoint = checkpoint_bytes(config, shape, layout, machines.accelerator)
    time = None
    if device is not None and config.precision in device.flops:
        time = step_time(config, shape, layout, batch, device, deepspeed=deepspeed.values)
    return _Estimates(
        stage_memory=needs,
        memory_verdict=memory_verdict(layout, needs, machines.memory_bytes, machines.accelerator),
        time=time,
        checkpoint_bytes=checkpoint,
        disk_bytes=disk_bytes(config, checkpoint, sum(decided.stage_parameters)),
    )


def _warnings(
    config: RunConfig,
    machines: Machines,
    shape: ModelShape,
    data: PlannedData,
    decided: _Decided,
    estimates: _Estimates,
) -> list[str]:
    """What is accepted but worth knowing."""
    layout, batch, time = decided.layout, decided.batch, estimates.time
    names = machines.device_names if machines.accelerator == "cuda" else ()
    return [
        *warnings_about(config, layout, batch, data, shape, time),
        *warnings_about_loss(config, shape, batch),
        *warnings_about_optimizer(config),
        *warnings_about_lr_schedule(config),
        *warnings_about_determinism(config, machines.accelerator),
        *warnings_about_balance(config, max(decided.stage_time), decided.imbalance_without_limit),
        *warnings_about_memory(
            config,
            layout,
            batch,
            shape,
            estimates.stage_memory,
            machines.memory_bytes,
            machines.accelerator,
        ),
        *(warnings_about_time(config, shape, layout, batch, time) if time else ()),
        *warnings_about_devices(names, machines.device, config.precision),
    ]


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
