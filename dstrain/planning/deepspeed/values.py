"""The values that a plan derives for DeepSpeed's JSON: each ``$name`` of the fragments, with its reason."""

from __future__ import annotations

from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.planning.batch import Batch
from dstrain.planning.buckets import bucket_size
from dstrain.planning.deepspeed.composition import DeepSpeedConfig, Derived, compose, contradictions


def deepspeed_config(
    resolved: ResolvedConfig, batch: Batch, accelerator: str, stage_parameters: int
) -> DeepSpeedConfig:
    """The DeepSpeed JSON of this plan. Raises DstrainError for a key of the user's that contradicts it."""
    derived = _derived(resolved, batch, accelerator, stage_parameters)
    return compose(_fragments(resolved.config), derived, resolved)


def contradictions_of_config(resolved: ResolvedConfig) -> list[DstrainError]:
    """The user's DeepSpeed keys that contradict the run config itself, whatever the model and the machine.

    What the machine decides, the micro-batch or the number of replicas, is compared when a plan is made.
    """
    config = resolved.config
    micro, replicas, undecided = config.micro_batch, config.data_parallel, []
    if micro is None:
        undecided.append(("train_micro_batch_size_per_gpu",))
    share = (micro or 1) * (replicas or 1)
    if micro is None or replicas is None or config.global_batch % share:
        undecided.append(("gradient_accumulation_steps",))
    batch = Batch(
        config.global_batch, micro or 1, config.global_batch // share, replicas or 1, config.seq_len
    )
    return contradictions(_fragments(config), _derived(resolved, batch, "cpu", 1), resolved, undecided)


def _derived(
    resolved: ResolvedConfig, batch: Batch, accelerator: str, stage_parameters: int
) -> dict[str, Derived]:
    """The value and reason of each ``$name`` in the fragments."""
    config = resolved.config

    def chosen(key: str) -> Derived:
        return Derived(getattr(config, key), f"{key} ({resolved.origin(key)})")

    bucket = bucket_size(stage_parameters)
    sized = f"the largest stage's {stage_parameters:,} parameters"
    return {
        "global_batch": chosen("global_batch"),
        "micro_batch": Derived(batch.micro_batch, f"micro_batch ({resolved.origin('micro_batch')})"),
        "accumulation": Derived(batch.accumulation, "global_batch / (micro_batch x replicas)"),
        "gradient_clipping": chosen("gradient_clipping"),
        "zero": chosen("zero"),
        "bucket_size": Derived(bucket, sized),
        "overlap": Derived(accelerator == "cuda", f"accelerator is {accelerator}"),
        "prefetch_size": Derived(min(bucket, 50_000_000), sized),
        "persistence_threshold": Derived(min(stage_parameters // 100, 100_000), sized),
        "live_parameters": Derived(max(bucket, 1_000_000_000), sized),
        "pin_memory": Derived(accelerator == "cuda", f"accelerator is {accelerator}"),
        "nvme_path": chosen("nvme_path"),
        "sub_group_size": Derived(1_000_000_000, "DeepSpeed's default"),
        "lr": chosen("lr"),
        "betas": chosen("betas"),
        "eps": chosen("eps"),
        "momentum": chosen("momentum"),
        "weight_decay": chosen("weight_decay"),
        "checkpoint_interval": Derived(
            1 if config.activation_checkpointing else 0,
            f"activation_checkpointing ({resolved.origin('activation_checkpointing')})",
        ),
    }


def _fragments(config: RunConfig) -> list[str]:
    """The fragments of these choices, later ones over earlier ones."""
    fragments = ["base", f"zero/{config.zero}", f"precision/{config.precision}"]
    if config.offload == "none":
        fragments.append(f"optimizer/{config.optimizer}")
    else:
        # DeepSpeed has a vectorised AdamW for states in host memory; SGD is torch's own.
        suffix = "-offloaded" if config.optimizer == "adamw" else ""
        fragments += [f"offload/{config.offload}", f"optimizer/{config.optimizer}{suffix}"]
    if config.pipeline > 1:
        fragments.append("pipeline/stages")
    return fragments
