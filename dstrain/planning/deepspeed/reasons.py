"""Why the fragments in ``ds_configs/`` set keys to other values than DeepSpeed's defaults."""

from __future__ import annotations

_BOTH_WRITTEN = "both precisions are written out, so that neither depends on a default"
_SHARED_BY_NOBODY = "it is for tensor parallelism, which dstrain does not use"

WHY: dict[str, str] = {
    "communication_data_type": "in the model's own precision the sum over replicas would be rounded, the more the more"
    " there are",
    "data_types.grad_accum_dtype": "left out, DeepSpeed sums micro-batches in the model's precision: bf16 in bf16",
    "torch_autocast.enabled": "the precision key decides this; DeepSpeed would accept both without a warning",
    "zero_allow_untested_optimizer": "without it ZeRO refuses optimizers that are not on DeepSpeed's list, like SGD",
    "zero_force_ds_cpu_optimizer": "with offload, DeepSpeed would refuse torch's SGD",
    "steps_per_print": "dstrain shows and records each step itself",
    "wall_clock_breakdown": "DeepSpeed's pipeline engine fails with it; metrics.jsonl has the time of every step",
    "checkpoint.tag_validation": "ranks that save under different names must stop; DeepSpeed only warns",
    "zero_optimization.overlap_comm": "DeepSpeed can't overlap within a pipeline; without a pipeline you can enable it",
    "zero_optimization.offload_optimizer.device": "set by offload",
    "fp16.enabled": _BOTH_WRITTEN,
    "bf16.enabled": _BOTH_WRITTEN,
    "bf16.check_grad_overflow": "bf16 has the range of fp32: no step should be skipped silently",
    "optimizer.type": "set by optimizer",
    "optimizer.params.adam_w_mode": 'DeepSpeed treats even "Adam" as AdamW, so this is set explicitly',
    "optimizer.params.torch_adam": "DeepSpeed's fused Adam has to be compiled for a GPU; torch's AdamW runs anywhere",
    "pipeline.use_reentrant": "DeepSpeed's own default loses the gradient of an embedding that is recomputed",
    "pipeline.pipe_partitioned": _SHARED_BY_NOBODY,
    "pipeline.grad_partitioned": _SHARED_BY_NOBODY,
}
"""By dotted key. Values that follow from something in the plan say why by their origin; a fragment's other values
are DeepSpeed's defaults."""

AS_DEFAULT = "DeepSpeed's default, written out so that another version can't change it"
