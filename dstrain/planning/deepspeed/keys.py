"""What dstrain has to say of DeepSpeed's keys, in one table: who decides a key, its value, and why.

A key that stands in a fragment of ``ds_configs/`` and is not here has DeepSpeed's default, written down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.config.values import KeyPath
from dstrain.optimizers import option_keys
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import (
    LIVE_PARAMETERS,
    PREFETCH_BUCKET,
    SUB_GROUP,
    bucket_size,
    persistence_threshold,
)

AS_DEFAULT = "DeepSpeed's default, written out so that another version can't change it"
"""Why a fragment sets a key for which the table has no reason."""


@dataclass(frozen=True)
class Decided:
    """What a plan has decided before DeepSpeed's JSON is composed.

    Attributes:
        accelerator: ``cuda`` or ``cpu``.
        stage_parameters: of the largest stage.
    """

    resolved: ResolvedConfig
    batch: Batch
    accelerator: str
    stage_parameters: int

    @property
    def sized(self) -> str:
        return f"the largest stage's {self.stage_parameters:,} parameters"


@dataclass(frozen=True)
class Derived:
    """A value, and why it is so."""

    value: Any
    origin: str


@dataclass(frozen=True)
class Derivation:
    """How the plan derives a value. ``name``: stands for it in a fragment, behind a ``$``."""

    name: str
    of: Callable[[Decided], Derived]


@dataclass(frozen=True)
class Unfit:
    """Why the user can't set a key: to which values, in which runs, and what to do instead."""

    values: Callable[[Any], bool]
    reason: str
    instead: str
    runs: Callable[[RunConfig], bool] = lambda config: True


@dataclass(frozen=True)
class Needed:
    """The Python package without which a key can't be switched on, and what does the same in dstrain."""

    package: str
    instead: str = ""


@dataclass(frozen=True)
class Key:
    """A key of DeepSpeed's, or a block of them.

    Attributes:
        owner: the run-config key that decides it, and all that stands in it: setting it elsewhere would break the
            plan's word.
        derived: its value, where a fragment has ``$name``.
        why: the reason for the value in a fragment, where that is not DeepSpeed's default.
        unfit: the values that the user can't give it.
        successor: of a deprecated key: which key of dstrain's takes its place, where DeepSpeed names one of its own
            that dstrain decides.
    """

    owner: str | None = None
    derived: Derivation | None = None
    why: str | None = None
    unfit: Unfit | None = None
    successor: str | None = None


def owner_of(path: KeyPath) -> str | None:
    """The run-config key that decides this key of DeepSpeed's, if one does: its own, or that of the nearest block."""
    for depth in range(len(path), 0, -1):
        key = KEYS.get(path[:depth])
        if key is not None and key.owner is not None:
            return key.owner
    return None


def why(path: KeyPath) -> str:
    """The reason for the value that a fragment gives a key."""
    key = KEYS.get(path)
    return key.why if key is not None and key.why is not None else AS_DEFAULT


def _chosen(name: str) -> Derivation:
    """The run config's own value."""

    def derive(decided: Decided) -> Derived:
        resolved = decided.resolved
        return Derived(getattr(resolved.config, name), f"{name} ({resolved.origin(name)})")

    return Derivation(name, derive)


def _sized(name: str, size: Callable[[int], int]) -> Derivation:
    """What follows from the parameters of the largest stage."""
    return Derivation(name, lambda decided: Derived(size(decided.stage_parameters), decided.sized))


def _on_cuda(name: str) -> Derivation:
    """Whether there are GPUs."""
    return Derivation(
        name, lambda decided: Derived(decided.accelerator == "cuda", f"accelerator is {decided.accelerator}")
    )


def _micro_batch(decided: Decided) -> Derived:
    return Derived(decided.batch.micro_batch, f"micro_batch ({decided.resolved.origin('micro_batch')})")


def _accumulation(decided: Decided) -> Derived:
    return Derived(decided.batch.accumulation, "global_batch / (micro_batch x replicas)")


def _checkpoint_interval(decided: Decided) -> Derived:
    key = "activation_checkpointing"
    recomputed = decided.resolved.config.activation_checkpointing
    return Derived(1 if recomputed else 0, f"{key} ({decided.resolved.origin(key)})")


def is_on(value: Any) -> bool:
    """Whether a value is switched on: pydantic reads these words as no."""
    if isinstance(value, str):
        return value.lower() not in ("auto", "0", "off", "f", "false", "n", "no")
    return value not in (None, False, {})


def _shares_out(value: Any) -> bool:
    """A size of more than 1."""
    return is_on(value) and value is not True and value not in (1, "1")


def _with_stages(config: RunConfig) -> bool:
    return config.pipeline > 1


def _with_zero(config: RunConfig) -> bool:
    return config.zero > 0


def _without_offload(config: RunConfig) -> bool:
    return config.offload == "none"


# zero/stage_1_and_2.py and stage3.py: "is not yet supported with reduce scatter enabled". Without reduce scatter,
# ZeRO-3 does not multiply again where the factor is the number of replicas (`__avg_scatter_contiguous_grads`).
_NO_SCALING = "DeepSpeed's ZeRO fails with it, or divides gradients twice"
_SCALED_ANYWAY = "remove it: gradients travel in fp32, where their mean does not overflow"
_NO_MASTERS = "without offloaded states DeepSpeed keeps master weights in fp32 only"
_MASTERS_OFFLOADED = "remove it, or --offload cpu"
_BUCKET = _sized("bucket_size", bucket_size)
_LIVE = _sized("live_parameters", lambda parameters: max(bucket_size(parameters), LIVE_PARAMETERS))
_BOTH_WRITTEN = "both precisions are written out, so that neither depends on a default"
_SHARED_BY_NOBODY = "it is for tensor parallelism, which dstrain does not use"
_NO_OTHER_AXIS = (
    "dstrain splits a model over pipeline stages and replicas only, and numbers its ranks accordingly"
)
_NAMED_TOO_EARLY = (
    "dstrain completes a checkpoint when its files are on disk, but this writer returns earlier"
)
_BEHIND = "remove it; background_save writes checkpoints in the background"

# Source of what is unfit: runs with DeepSpeed 0.19.8, or the code named.
_TABLE: dict[str, Key] = {
    # The batch.
    "train_batch_size": Key(owner="global_batch", derived=_chosen("global_batch")),
    "train_micro_batch_size_per_gpu": Key(
        owner="micro_batch", derived=Derivation("micro_batch", _micro_batch)
    ),
    "gradient_accumulation_steps": Key(
        owner="micro_batch", derived=Derivation("accumulation", _accumulation)
    ),
    "managed_gradient_accumulation": Key(
        unfit=Unfit(
            lambda value: value is False,
            "each micro-batch would become an optimizer step: dstrain lets DeepSpeed count micro-batches",
            "remove it; --micro-batch and --global-batch decide the number",
        )
    ),
    # Gradients and the optimizer.
    "gradient_clipping": Key(owner="gradient_clipping", derived=_chosen("gradient_clipping")),
    "prescale_gradients": Key(unfit=Unfit(is_on, _NO_SCALING, _SCALED_ANYWAY, _with_zero)),
    "gradient_predivide_factor": Key(
        unfit=Unfit(
            lambda value: value not in (1, "1", "1.0", "auto"), _NO_SCALING, _SCALED_ANYWAY, _with_zero
        )
    ),
    "gradient_allreduce_op": Key(
        unfit=Unfit(
            lambda value: str(value).lower() == "sum",
            (
                "gradients would grow with the number of replicas, and layouts would no longer train the"
                " same model"
            ),
            "remove it, and raise --lr if you want larger steps",
        )
    ),
    "communication_data_type": Key(
        why="in the model's own precision the sum over replicas would be rounded, the more the more there are"
    ),
    "optimizer": Key(owner="optimizer"),
    "optimizer.type": Key(why="set by optimizer"),
    **{f"optimizer.params.{key}": Key(owner=key, derived=_chosen(key)) for key in ("lr", *option_keys())},
    "optimizer.params.adam_w_mode": Key(
        why=('DeepSpeed treats even "Adam" as AdamW, so this is set explicitly')
    ),
    "optimizer.params.torch_adam": Key(
        why="DeepSpeed's fused Adam has to be compiled for a GPU; torch's AdamW runs anywhere"
    ),
    "optimizer.params.fused": Key(
        derived=_on_cuda("fused"), why="torch's kernel for all of AdamW takes no memory beside the states"
    ),
    "scheduler": Key(owner="lr_schedule"),
    "scheduler.params.warmup_max_lr": Key(owner="lr"),
    "scheduler.params.warmup_num_steps": Key(owner="warmup_steps"),
    "scheduler.params.total_num_steps": Key(owner="steps"),
    "scheduler.params.cos_min_ratio": Key(owner="lr_final"),
    "zero_allow_untested_optimizer": Key(
        why="without it ZeRO refuses optimizers that are not on DeepSpeed's list, like SGD"
    ),
    "zero_force_ds_cpu_optimizer": Key(why="with offload, DeepSpeed would refuse torch's SGD"),
    # Precision.
    "fp16.enabled": Key(owner="precision", why=_BOTH_WRITTEN),
    "bf16.enabled": Key(owner="precision", why=_BOTH_WRITTEN),
    "fp16.fp16_master_weights_and_grads": Key(
        unfit=Unfit(is_on, _NO_MASTERS, _MASTERS_OFFLOADED, _without_offload)
    ),
    "bf16.bf16_master_weights_and_grads": Key(
        unfit=Unfit(is_on, _NO_MASTERS, _MASTERS_OFFLOADED, _without_offload)
    ),
    "bf16.check_grad_overflow": Key(why="bf16 has the range of fp32: no step should be skipped silently"),
    "data_types": Key(owner="precision"),
    "data_types.grad_accum_dtype": Key(
        why="left out, DeepSpeed sums micro-batches in the model's precision: bf16 in bf16"
    ),
    "torch_autocast": Key(owner="precision"),
    "torch_autocast.enabled": Key(
        why="the precision key decides this; DeepSpeed would accept both without a warning"
    ),
    # ZeRO.
    "zero_optimization.stage": Key(owner="zero", derived=_chosen("zero")),
    "zero_optimization.compute_grad_norm": Key(
        unfit=Unfit(
            lambda value: not is_on(value) and value != "auto",
            "gradients could not be clipped, and metrics.jsonl would have no gradient norm",
            "remove it",
        )
    ),
    "zero_optimization.reduce_bucket_size": Key(derived=_BUCKET),
    "zero_optimization.allgather_bucket_size": Key(derived=_BUCKET),
    "zero_optimization.overlap_comm": Key(
        derived=_on_cuda("overlap"),
        why="DeepSpeed can't overlap within a pipeline; without a pipeline you can enable it",
    ),
    "zero_optimization.stage3_prefetch_bucket_size": Key(
        derived=_sized("prefetch_size", lambda parameters: min(bucket_size(parameters), PREFETCH_BUCKET))
    ),
    "zero_optimization.stage3_param_persistence_threshold": Key(
        derived=_sized("persistence_threshold", persistence_threshold)
    ),
    "zero_optimization.stage3_max_live_parameters": Key(derived=_LIVE),
    "zero_optimization.stage3_max_reuse_distance": Key(derived=_LIVE),
    "zero_optimization.sub_group_size": Key(
        derived=Derivation("sub_group_size", lambda decided: Derived(SUB_GROUP, "DeepSpeed's default"))
    ),
    "zero_optimization.offload_optimizer": Key(owner="offload"),
    "zero_optimization.offload_optimizer.device": Key(why="set by offload"),
    "zero_optimization.offload_optimizer.pin_memory": Key(derived=_on_cuda("pin_memory")),
    "zero_optimization.offload_optimizer.nvme_path": Key(derived=_chosen("nvme_path")),
    "zero_optimization.offload_param": Key(owner="offload"),
    "zero_optimization.cpu_offload": Key(successor="use --offload cpu, which sets offload_optimizer instead"),
    "zero_optimization.cpu_offload_param": Key(successor="remove it: dstrain keeps parameters on the device"),
    "zero_optimization.cpu_offload_use_pin_memory": Key(
        successor="remove it: --offload cpu pins memory on machines with GPUs"
    ),
    "zero_optimization.zenflow": Key(
        unfit=Unfit(
            is_on,
            (
                "ZenFlow updates most weights some steps late, so it does not train the same model as one"
                " process"
            ),
            "remove it; --offload cpu keeps optimizer states in host memory",
        )
    ),
    # Stages, and other ways to share a model out.
    "pipeline": Key(owner="pipeline"),
    "pipeline.activation_checkpoint_interval": Key(
        derived=Derivation("checkpoint_interval", _checkpoint_interval)
    ),
    "pipeline.use_reentrant": Key(
        why="DeepSpeed's own default loses the gradient of an embedding that is recomputed"
    ),
    "pipeline.pipe_partitioned": Key(why=_SHARED_BY_NOBODY),
    "pipeline.grad_partitioned": Key(why=_SHARED_BY_NOBODY),
    "tensor_parallel.autotp_size": Key(
        unfit=Unfit(_shares_out, _NO_OTHER_AXIS, "remove it; --pipeline or --zero 3 shard the weights")
    ),
    "sequence_parallel_size": Key(unfit=Unfit(_shares_out, _NO_OTHER_AXIS, "remove it")),
    "expert_parallel.enabled": Key(
        unfit=Unfit(is_on, _NO_OTHER_AXIS, "remove it; --pipeline or --zero 3 shard the experts")
    ),
    # Checkpoints.
    "checkpoint.tag_validation": Key(
        why="ranks that save under different names must stop; DeepSpeed only warns"
    ),
    "checkpoint.load_universal": Key(
        unfit=Unfit(
            is_on,
            "DeepSpeed runs code that is named in the files of a universal checkpoint",
            "remove it: `dstrain resume` reads checkpoints of any layout",
        )
    ),
    "checkpoint.writer.decoupled": Key(unfit=Unfit(is_on, _NAMED_TOO_EARLY, _BEHIND)),
    "datastates_ckpt": Key(unfit=Unfit(is_on, _NAMED_TOO_EARLY, _BEHIND)),
    # What DeepSpeed says, and what it would do by itself.
    "steps_per_print": Key(why="dstrain shows and records each step itself"),
    "wall_clock_breakdown": Key(
        why="DeepSpeed's pipeline engine fails with it; metrics.jsonl has the time of every step",
        unfit=Unfit(
            is_on,
            "DeepSpeed's pipeline engine fails with it: it starts a timer that is already running",
            "remove it: metrics.jsonl has the time of every step",
            _with_stages,
        ),
    ),
    "flops_profiler.enabled": Key(
        unfit=Unfit(
            is_on,
            "it enables wall_clock_breakdown, with which DeepSpeed's pipeline engine fails",
            "--pipeline 1, or remove it: dstrain counts FLOPs itself",
            _with_stages,
        )
    ),
    "data_efficiency.enabled": Key(
        unfit=Unfit(
            is_on,
            (
                "it needs DeepSpeed's data loader, but dstrain reads the data itself, in the same order"
                " for every layout"
            ),
            "remove it",
        )
    ),
    "autotuning.enabled": Key(
        unfit=Unfit(
            is_on,
            "only DeepSpeed's own launcher starts it",
            "remove it; `dstrain plan --fit` searches for layouts",
        )
    ),
    "hybrid_engine.enabled": Key(
        unfit=Unfit(is_on, "it would have no effect: dstrain builds its engines itself", "remove it")
    ),
    "compile.deepcompile": Key(
        unfit=Unfit(
            is_on,
            (
                "DeepSpeed accepts it without compiling anything, since that needs a call that dstrain"
                " does not make"
            ),
            "remove it",
        )
    ),
}
KEYS: dict[KeyPath, Key] = {tuple(dotted.split(".")): key for dotted, key in _TABLE.items()}
"""By path, under DeepSpeed's first names."""

NEEDS_CUDA: frozenset[KeyPath] = frozenset(
    ("zero_optimization", key)
    for key in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
)
"""Keys whose kernels DeepSpeed compiles for CUDA alone: on CPUs a rank would find that out."""

_TRACKERS = ": `trackers: [{}]` is dstrain's own"
PACKAGES: dict[KeyPath, Needed] = {
    ("tensorboard", "enabled"): Needed("tensorboard", _TRACKERS.format("tensorboard")),
    ("wandb", "enabled"): Needed("wandb", _TRACKERS.format("wandb")),
    ("comet", "enabled"): Needed("comet_ml"),
    ("datastates_ckpt",): Needed("datastates"),
}
"""The switches that need a package which does not come with DeepSpeed."""
