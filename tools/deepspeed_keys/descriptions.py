"""What DeepSpeed's keys are for, where no string below a pydantic field says it."""

from __future__ import annotations

import inspect

_WORDS = """
train_batch_size: samples that one optimizer step takes, over all replicas and micro-batches
train_micro_batch_size_per_gpu: samples that a replica works on at once
gradient_accumulation_steps: micro-batches whose gradients are summed before the optimizer steps
managed_gradient_accumulation: DeepSpeed counts micro-batches itself; false: each step() call is an update
steps_per_print: steps between DeepSpeed's own progress lines; null for none
dump_state: print the engine's settings once it is built
disable_python_gc: switch Python's cyclic garbage collector off while it trains
communication_data_type: precision in which gradients travel between replicas; null: that of the model
seq_parallel_communication_data_type: precision in which gradients travel between ranks of one sequence
prescale_gradients: divide gradients before they are summed over replicas, not after
gradient_predivide_factor: what gradients are divided by before they are summed; the rest is divided after
gradient_allreduce_op: whether replicas' gradients are averaged or summed
gradient_clipping: largest norm of the whole gradient; 0 for none. Left out, DeepSpeed clips at 1.0
zero_allow_untested_optimizer: let ZeRO wrap optimizers that DeepSpeed has not been tested with
zero_force_ds_cpu_optimizer: with offloaded states, refuse any Adam but DeepSpeed's own for CPUs
wall_clock_breakdown: time forward, backward and step, and print it at each steps_per_print
memory_breakdown: print memory in use at several points of the engine
dataloader_drop_last: drop the last, incomplete batch of DeepSpeed's own data loader
log_level: how much DeepSpeed's logger says: debug, info, warning, error
use_data_before_expert_parallelism: order of data and expert parallel groups
sequence_parallel_size: ranks that share one sequence (Ulysses)
data_parallel_size: replicas, where sequence_parallel_size is given
datastates_ckpt: checkpoints by the DataStates engine, with its own settings
weight_quantization: quantize weights when a model is loaded
optimizer: the optimizer that DeepSpeed builds
optimizer.type: its name: one of DeepSpeed's (Adam, AdamW, Lamb, Lion, Adagrad, Muon ...) or of torch.optim
optimizer.params: what its constructor is given
optimizer.legacy_fusion: the old way in which fp16 fuses Lamb's gradients
optimizer.params.lr: learning rate; a scheduler may change it
optimizer.params.betas: decay rates of the moments
optimizer.params.eps: added to the denominator, for numerical stability
optimizer.params.weight_decay: decay of the weights
optimizer.params.momentum: momentum of the gradient
optimizer.params.torch_adam: take torch's Adam, not DeepSpeed's fused one
optimizer.params.adam_w_mode: decay weights as AdamW does; "Adam" does so too unless this is false
optimizer.params.fp32_optimizer_states: moments in fp32 where they live in host memory
scheduler: a learning-rate schedule of DeepSpeed's
scheduler.type: its name: WarmupLR, WarmupDecayLR, WarmupCosineLR, OneCycle, LRRangeTest
scheduler.params: what its constructor is given
pipeline: settings of the pipeline engine
pipeline.stages: number of stages, "auto": as the module was built
pipeline.partition: how layers are partitioned, "best": as the module was built
pipeline.seed_layers: seed each layer before it is built
pipeline.activation_checkpoint_interval: layers between recomputed activations; 0 keeps all
pipeline.pipe_partitioned: share activations out among model-parallel ranks while they travel
pipeline.grad_partitioned: share their gradients out among model-parallel ranks while they travel
pipeline.use_reentrant: recompute with torch's re-entrant checkpointing, which is DeepSpeed's default
activation_checkpointing: settings of deepspeed.checkpointing, Megatron's way to recompute activations
activation_checkpointing.partition_activations: share kept activations out among model-parallel ranks
activation_checkpointing.cpu_checkpointing: keep them in host memory
activation_checkpointing.contiguous_memory_optimization: copy them into one buffer
activation_checkpointing.number_checkpoints: how many that buffer must hold
activation_checkpointing.synchronize_checkpoint_boundary: wait for the device at each of them
activation_checkpointing.profile: time forward and backward of each
flops_profiler: counts FLOPs and time of each module in one step
flops_profiler.enabled: switch it on; it switches wall_clock_breakdown on as well
flops_profiler.recompute_fwd_factor: how much of the forward pass is computed twice
flops_profiler.profile_step: the step that is measured
flops_profiler.module_depth: how deep modules are listed; -1: all
flops_profiler.top_modules: how many modules are listed at each depth
flops_profiler.detailed: list every module
flops_profiler.output_file: where the list goes; null: to the terminal
torch_autocast: torch.autocast around the forward pass
torch_autocast.enabled: switch it on
torch_autocast.dtype: what it computes in
torch_autocast.lower_precision_safe_modules: classes of modules that may be computed in it
data_types: precisions of what is kept
data_types.grad_accum_dtype: in which gradients are accumulated; null: the model's own, bf16 with bf16
data_types.param_dtype: in which parameters are kept; null: that of the mixed precision
data_types.buffer_dtype: in which buffers are kept; null: as they were loaded
data_types.keep_in_fp32_modules: name patterns of buffers that stay fp32; "auto": those that transformers names
checkpoint: how DeepSpeed writes and reads checkpoints
checkpoint.tag_validation: what to do if ranks save under different tags
checkpoint.load_universal: read DeepSpeed's universal format
checkpoint.use_node_local_storage: each node writes to a disk of its own
checkpoint.checkpoint_serialization: write torch's zip format; false: the older one
checkpoint.parallel_write: which ranks write
checkpoint.parallel_write.pipeline_stage: divide the files of a stage's layers among its replicas
checkpoint.writer: FastPersist, the writer for NVMe disks
checkpoint.writer.type: which writer
checkpoint.writer.io_buffer_size: bytes of its buffer
checkpoint.writer.io_buffer_double: two buffers, one filled while the other is written
checkpoint.writer.show_statistics: print what it wrote and how fast
checkpoint.writer.data_parallel: the ranks among which writing is divided
checkpoint.writer.decoupled: write behind the training
checkpoint.writer.io_multiplier: writers a rank
aio: reading and writing NVMe disks, for offload
aio.block_size: bytes of one request
aio.queue_depth: requests in flight
aio.intra_op_parallelism: threads that submit them
aio.single_submit: submit one request at a time
aio.overlap_events: submit while others complete
aio.use_gds: GPUDirect storage, past host memory
comms_logger: times each collective
comms_logger.enabled: switch it on
comms_logger.prof_all: log all operations
comms_logger.prof_ops: the operations that are logged, where not all are
comms_logger.verbose: print each as it happens
comms_logger.debug: with the name of the caller
timers: DeepSpeed's timers
data_efficiency: DeepSpeed's curricula and dropped tokens, with its own data loader
data_efficiency.enabled: switch it on
data_efficiency.seed: of its random choices
data_efficiency.data_sampling: curricula and batches by length
data_efficiency.data_routing: random layer-wise token dropping
autotuning: DeepSpeed's own search for a configuration, started by `deepspeed --autotuning`
autotuning.enabled: switch it on
hybrid_engine: one engine that trains and generates, for reinforcement learning
expert_parallel: experts sharded across ranks (AutoEP)
expert_parallel.enabled: switch it on
expert_parallel.autoep_size: number of ranks over which experts are sharded
tensor_parallel.tp.tp_group: the process group; can't be given in JSON
tensor_parallel.injection_policy_tuple: names of the layers that are reduced, for models without a policy
weight_quantization.num_bits: bits of a weight
weight_quantization.q_type: symmetric or asymmetric
weight_quantization.q_groups: groups of weights with a scale of their own
zero_optimization.leaf_module.classes: classes whose modules are gathered whole
zero_optimization.leaf_module.names: names of modules that are gathered whole
zero_optimization.leaf_module.name_suffixes: how the names of modules end that are gathered whole
hybrid_engine.enabled: switch it on
hybrid_engine.max_out_tokens: most tokens that are generated
"""
DESCRIPTIONS: dict[str, str] = dict(line.split(": ", 1) for line in inspect.cleandoc(_WORDS).splitlines())
