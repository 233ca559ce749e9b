"""What DeepSpeed's source does not say of its keys in a way that a program could find.

`table` finds the keys and their defaults by itself; here stand the types of those whose default is null,
blocks in which any key may stand, and keys that were renamed.
Sources: https://www.deepspeed.ai/docs/config-json and the code that reads each key, DeepSpeed 0.19.8.
"""

from __future__ import annotations

from typing import Any

# Types of keys without a default that tells: names joined by |, or the texts that DeepSpeed takes.
TYPES: dict[str, str | list[str]] = {
    "train_batch_size": "int|null",
    "train_micro_batch_size_per_gpu": "int|null",
    "gradient_accumulation_steps": "int|null",
    "steps_per_print": "int|null",
    "communication_data_type": ["fp32", "fp16", "bf16"],
    "seq_parallel_communication_data_type": ["fp32", "fp16", "bf16"],
    "gradient_allreduce_op": ["mean", "sum"],
    "activation_checkpointing.number_checkpoints": "int|null",
    "torch_autocast.dtype": [
        "bfloat16",
        "float16",
        "torch.bfloat16",
        "torch.float16",
        "bf16",
        "fp16",
        "half",
    ],
    "torch_autocast.lower_precision_safe_modules": "list|null",
    "optimizer.type": "str|null",
    "optimizer.legacy_fusion": "bool|null",
    "optimizer.params": "dict|null",
    "scheduler.type": "str|null",
    "scheduler.params": "dict|null",
    "flops_profiler.output_file": "str|null",
    "autotuning.metric_path": "str|null",
    "autotuning.arg_mappings": "dict|null",
    "autotuning.model_info.num_params": "int|null",
    "autotuning.model_info.hidden_size": "int|null",
    "autotuning.model_info.num_layers": "int|null",
    "autotuning.model_info_path": "str|null",
    "autotuning.max_train_batch_size": "int|null",
    "data_efficiency.data_sampling.curriculum_learning.curriculum_metrics": "dict|null",
    "data_efficiency.data_sampling.dynamic_batching.max_batch_size": "int|null",
    "data_efficiency.data_sampling.dynamic_batching.max_tokens": "int|null",
    "checkpoint.tag_validation": ["Warn", "Ignore", "Fail"],
    "checkpoint.writer.type": ["mock", "python", "fast"],
    "checkpoint.writer.data_parallel": ["replica", "socket", "machine"],
    "data_types.grad_accum_dtype": ["fp32", "fp16", "bf16"],
    "data_types.param_dtype": ["fp32", "fp16", "bf16"],
    "data_types.buffer_dtype": ["fp32", "fp16", "bf16"],
    "data_types.keep_in_fp32_modules": "str|list",
    "datastates_ckpt": "bool|dict",
    "log_level": "str|null",
    "pipeline.stages": "int|str",
    "pipeline.use_reentrant": "bool|null",
    "sequence_parallel_size": "int|null",
    "data_parallel_size": "int|null",
    "vocabulary_size": "int|null",
    "expert_parallel.preset_model": "str|null",
    "expert_parallel.moe_layer_pattern": "str|null",
    "expert_parallel.expert_pattern": "str|null",
    "expert_parallel.router_pattern": "str|null",
    "expert_parallel.route_norm": "bool|null",
    "expert_parallel.num_expert_groups": "int|null",
    "expert_parallel.num_limited_groups": "int|null",
    "expert_parallel.load_balance_coeff": "float|null",
    "expert_parallel.routed_scaling_factor": "float|str",
    "expert_parallel.top_k": "int|str",
    "expert_parallel.expert_w1": "str|null",
    "expert_parallel.expert_w2": "str|null",
    "expert_parallel.expert_w3": "str|null",
    "expert_parallel.num_experts_attr": "str|null",
    "expert_parallel.top_k_attr": "str|null",
    "expert_parallel.has_shared_experts": "bool|null",
    "expert_parallel.shared_experts_pattern": "str|null",
    "expert_parallel.shared_experts_gate_pattern": "str|null",
    "expert_parallel.expert_activation": "str|null",
}

# Choices that DeepSpeed puts into upper or lower case before it compares.
ANY_CASE = frozenset(
    {
        "communication_data_type", "seq_parallel_communication_data_type", "gradient_allreduce_op",
        "checkpoint.tag_validation", "checkpoint.writer.type", "checkpoint.writer.data_parallel",
    }
)  # fmt: skip

# Blocks whose content DeepSpeed hands on as it is: data_efficiency's parts to its data sampler and its random LTD.
FREE = frozenset(
    {
        "data_efficiency.data_sampling",
        "data_efficiency.data_sampling.curriculum_learning",
        "data_efficiency.data_sampling.dynamic_batching",
        "data_efficiency.data_routing",
        "data_efficiency.data_routing.random_ltd",
    }
)

# Keys that are not read while the config is built in a process that is in no world, with their defaults:
# pipe/engine.py, compile/init_sp.py, config.py.
READ_ELSEWHERE: dict[str, Any] = {
    "pipeline.use_reentrant": None,
    "sequence_parallel_size": None,
    "data_parallel_size": None,
}

# Keys of older versions that are neither read nor refused.
REMOVED: dict[str, str] = {
    "allgather_size": "it was part of the form zero_optimization: true; use zero_optimization.allgather_bucket_size",
    "disable_allgather": "DeepSpeed reads it and does nothing with it",
    "vocabulary_size": "DeepSpeed only warns where it is not a multiple of 8; leave it out",
    "activation_checkpointing.partitioned_activations": "its name is partition_activations",
    "bf16.check_overflow": "its name is check_grad_overflow",
    "optimizer.params.max_grad_norm": "DeepSpeed refuses it; use gradient_clipping",
}

# Another name under which DeepSpeed reads the same block.
ALIASES: dict[str, str] = {"bfloat16": "bf16"}
