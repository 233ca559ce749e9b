"""What each of DeepSpeed's keys does to a run beside its speed, where it has another value than the plan gives it.

Gone through key by key for DeepSpeed 0.19.8, by what its documentation and its configuration classes say of each, and
by the code where these leave it open. A block's line is for all keys in it that have no line of their own: those of a
part of DeepSpeed's that a run can't have are not told apart.
"""

from __future__ import annotations

import inspect

KINDS = {
    "harmless": "results, files and requirements stay as they are; speed and what is printed may change",
    "arithmetic": "changes what is computed, or in which precision",
    "memory": "changes how much memory is taken, and where",
    "files": "writes or moves files outside of what dstrain keeps in the run folder",
    "package": "needs a Python package that dstrain does not install",
    "device": "needs a device that not every machine has: a GPU, or a disk with asynchronous access",
}
"""The kinds of effects, with what each means."""

_EFFECTS = """
train_batch_size: arithmetic
train_micro_batch_size_per_gpu: arithmetic memory
gradient_accumulation_steps: arithmetic memory
managed_gradient_accumulation: arithmetic
steps_per_print: harmless
dump_state: harmless
disable_python_gc: memory
communication_data_type: arithmetic
seq_parallel_communication_data_type: arithmetic
prescale_gradients: arithmetic
gradient_predivide_factor: arithmetic
gradient_allreduce_op: arithmetic
gradient_clipping: arithmetic
zero_allow_untested_optimizer: harmless
zero_force_ds_cpu_optimizer: harmless
memory_breakdown: harmless
wall_clock_breakdown: harmless
log_level: harmless
dataloader_drop_last: harmless
use_data_before_expert_parallelism: harmless
sequence_parallel_size: arithmetic
data_parallel_size: arithmetic
datastates_ckpt: files package
optimizer: arithmetic
scheduler: arithmetic
fp16.enabled: arithmetic memory
fp16.auto_cast: arithmetic
fp16.loss_scale: arithmetic
fp16.initial_scale_power: arithmetic
fp16.loss_scale_window: arithmetic
fp16.hysteresis: arithmetic
fp16.consecutive_hysteresis: arithmetic
fp16.min_loss_scale: arithmetic
fp16.fp16_master_weights_and_grads: arithmetic memory
bf16.enabled: arithmetic memory
bf16.check_grad_overflow: arithmetic
bf16.immediate_grad_update: arithmetic memory
bf16.bf16_master_weights_and_grads: arithmetic memory
bf16.bf16_optimizer_states: arithmetic memory
torch_autocast: arithmetic memory
data_types: arithmetic memory
zero_optimization.stage: memory
zero_optimization.contiguous_gradients: memory
zero_optimization.reduce_scatter: memory
zero_optimization.reduce_bucket_size: memory
zero_optimization.use_multi_rank_bucket_allreduce: memory
zero_optimization.allgather_partitions: memory
zero_optimization.allgather_bucket_size: memory
zero_optimization.overlap_comm: memory
zero_optimization.load_from_fp32_weights: harmless
zero_optimization.elastic_checkpoint: files
zero_optimization.offload_param: memory device
zero_optimization.offload_param.device: memory
zero_optimization.offload_param.pin_memory: memory
zero_optimization.offload_optimizer: memory
zero_optimization.offload_optimizer.nvme_path: files device
zero_optimization.offload_optimizer.super_offload: arithmetic memory device
zero_optimization.offload_optimizer.ratio: memory
zero_optimization.sub_group_size: memory
zero_optimization.stage3_max_live_parameters: memory
zero_optimization.stage3_max_reuse_distance: memory
zero_optimization.stage3_prefetch_bucket_size: memory
zero_optimization.stage3_param_persistence_threshold: memory
zero_optimization.stage3_model_persistence_threshold: memory
zero_optimization.stage3_gather_16bit_weights_on_model_save: memory
zero_optimization.stage3_module_granularity_threshold: memory
zero_optimization.stage3_use_all_reduce_for_fetch_params: memory
zero_optimization.stage3_allgather_sequential: memory
zero_optimization.parameter_alignment: memory
zero_optimization.compute_grad_norm: arithmetic
zero_optimization.ignore_unused_parameters: harmless
zero_optimization.legacy_stage1: arithmetic
zero_optimization.round_robin_gradients: memory
zero_optimization.zero_hpz_partition_size: memory
zero_optimization.zero_quantized_weights: arithmetic memory device
zero_optimization.zero_quantized_nontrainable_weights: arithmetic memory device
zero_optimization.zero_quantized_gradients: arithmetic device
zero_optimization.memory_efficient_linear: arithmetic memory
zero_optimization.pipeline_loading_checkpoint: harmless
zero_optimization.override_module_apply: harmless
zero_optimization.log_trace_cache_warnings: harmless
zero_optimization.enable_sanity_checks: harmless
zero_optimization.save_muon_momentum_buffer_in_memory: memory
zero_optimization.leaf_module: memory
zero_optimization.zenflow: arithmetic memory
weight_quantization: arithmetic memory
tensor_parallel: arithmetic memory
expert_parallel: arithmetic memory
data_efficiency: arithmetic
hybrid_engine: memory
compile: memory
compile.deepcompile: arithmetic memory
compile.debug_log: files
pipeline.stages: memory
pipeline.partition: memory
pipeline.seed_layers: arithmetic
pipeline.activation_checkpoint_interval: memory
pipeline.use_reentrant: arithmetic
pipeline.pipe_partitioned: memory
pipeline.grad_partitioned: memory
activation_checkpointing: memory
activation_checkpointing.profile: harmless
activation_checkpointing.synchronize_checkpoint_boundary: harmless
checkpoint.tag_validation: harmless
checkpoint.load_universal: files
checkpoint.use_node_local_storage: files
checkpoint.parallel_write: files
checkpoint.checkpoint_serialization: files
checkpoint.writer: files device
checkpoint.writer.show_statistics: harmless
aio: device
aio.block_size: memory device
aio.queue_depth: memory device
comms_logger: harmless
timers: harmless
flops_profiler: harmless
flops_profiler.output_file: files
tensorboard: files package
wandb: files package
comet: files package
csv_monitor: files
autotuning: files
"""
EFFECTS: dict[str, tuple[str, ...]] = {
    key: tuple(kinds.split())
    for key, kinds in (line.split(": ", 1) for line in inspect.cleandoc(_EFFECTS).splitlines())
}


def effects_of(path: tuple[str, ...]) -> list[str]:
    """The effects of a key: its own line's, or that of the innermost block around it.

    Raises:
        KeyError: nobody has looked at it yet.
    """
    for depth in range(len(path), 0, -1):
        found = EFFECTS.get(".".join(path[:depth]))
        if found is not None:
            return list(found)
    raise KeyError(f"{'.'.join(path)} has no line in tools/deepspeed_keys/effects.py")
