"""What the keys of other trainers are called here: the exact translation, values included.

One table, for the hints of unknown keys and for docs/migration.md. A key that is nested there (torchtitan's sections)
stands here with dots. Sources: transformers' ``TrainingArguments``, axolotl's ``AxolotlInputConfig``, LLaMA-Factory's
``hparams``, torchtitan's ``JobConfig``, DeepSpeed's JSON, and the flags of Megatron-LM.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.config.values import leaves

HF = "HF Trainer"
TRL = "TRL"
AXOLOTL = "axolotl"
LLAMA_FACTORY = "LLaMA-Factory"
TORCHTITAN = "torchtitan"
DEEPSPEED = "DeepSpeed"
_HF_AND_OTHERS = (HF, AXOLOTL, LLAMA_FACTORY)  # both extend TrainingArguments


@dataclass(frozen=True)
class ForeignKey:
    """A key of other trainers.

    Attributes:
        trainers: those that have it.
        rule: what to write here instead of the key with this value.
        example: a value that it has there.
    """

    trainers: tuple[str, ...]
    rule: Callable[[Any], str]
    example: Any

    def translate(self, value: Any) -> str:
        """What to write here instead, in one line, whatever the value is."""
        if isinstance(value, str) and not (value.isprintable() and len(value) <= _MOST_SHOWN):
            value = _json(value[:_MOST_SHOWN])
        text = self.rule(value)
        return text if len(text) <= 2 * _MOST_SHOWN else f"{text[: 2 * _MOST_SHOWN]}..."


def _written(key: str, value: Any) -> str:
    """One line of YAML."""
    return f"{key}: {value if isinstance(value, str) else _json(value)}"


def _json(value: Any) -> str:
    """As JSON; what YAML knows and JSON does not, such as a date, as text."""
    return json.dumps(value, default=str)


def _same(key: str) -> Callable[[Any], str]:
    return lambda value: _written(key, value)


def _note(text: str) -> Callable[[Any], str]:
    return lambda value: text


def _switch(on: str, off: str) -> Callable[[Any], str]:
    return lambda value: off if value in (False, None, "no", "none", "off", "") else on


def _scaled(key: str, factor: str) -> Callable[[Any], str]:
    """A share of the steps, of which only the user knows the number."""
    return lambda value: f"{key}: {_json(value)} x {factor}, as a number of steps"


_MOST_SHOWN = 300  # characters of a value
_EPOCH = "the training samples, which `dstrain plan` shows, / global_batch"

_OPTIMIZER_NAMES = {
    "adamw": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "adam": "adamw",
    "fusedadam": "adamw",
    "sgd": "sgd",
}


def _optimizer(value: Any) -> str:
    name = _OPTIMIZER_NAMES.get(str(value).lower())
    return (
        f"optimizer: {name}"
        if name
        else "optimizer: module:name, an optimizer of your own (docs/extending.md)"
    )


_SCHEDULE_NAMES = {"linear": "linear", "cosine": "cosine", "constant": "constant"}


def _lr_schedule(value: Any) -> str:
    text = str(value).lower()
    if text in _SCHEDULE_NAMES:  # those of transformers and torchtitan end at 0
        end = "" if text == "constant" else " with lr_final: 0"
        return f"lr_schedule: {text}{end}"
    if text == "constant_with_warmup":
        return "lr_schedule: constant with warmup_steps"
    return "lr_schedule: module:name, a schedule of your own (docs/extending.md)"


_PRECISION_NAMES = {
    **dict.fromkeys(("bfloat16", "bf16-mixed", "bf16-true", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("float16", "16-mixed", "half", "torch.float16"), "fp16"),
    **dict.fromkeys(("float32", "32", "32-true", "torch.float32", "no"), "fp32"),
}


def _precision(value: Any) -> str:
    return f"precision: {_PRECISION_NAMES.get(str(value).lower(), 'fp32, bf16 or fp16')}"


_PIPELINE_SCHEDULES = {"1f1b": "1f1b", "zbvzerobubble": "dualpipev", "zbv": "dualpipev"}


def _pipeline_schedule(value: Any) -> str:
    return f"schedule: {_PIPELINE_SCHEDULES.get(str(value).lower(), '1f1b, zb-h1 or dualpipev')}"


def _too_long(value: Any) -> str:
    return f"too_long: {({'drop': 'drop', 'truncate': 'cut', 'raise': 'error'}).get(str(value).lower(), 'error')}"


def _strategy(key: str, count: str, never: str) -> Callable[[Any], str]:
    def translate(value: Any) -> str:
        if value in (False, "no"):
            return f"{key}: {never}"
        if value == "epoch":
            return f"{key}: {_EPOCH}"
        return f"{key}: a number of steps (there it is {count})"

    return translate


def _report_to(value: Any) -> str:
    names = value if isinstance(value, list) else [value]
    known = [name for name in ("tensorboard", "wandb", "mlflow") if name in names or "all" in names]
    if not known:
        return "remove it: without trackers nothing is reported"
    return f"trackers: [{', '.join(known)}]"


def _data(value: Any) -> str:
    """axolotl's list of data sets, LLaMA-Factory's names."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, Mapping) and isinstance(value.get("path"), str):
        value = value["path"]
    if isinstance(value, str):
        return f"data: {value}, as a text file, folder or JSON Lines file"
    return "data: one text file, folder or JSON Lines file"


def _validation(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1:
        return f"validation: {value:g} / the number of documents, a fraction below 1"
    return _written("validation", value)


def _flash(value: Any) -> str:
    text = str(value).lower()
    if text in ("auto", "disabled", "false", "none"):
        return "attention: auto"
    return "attention: flash_attention_3" if text == "fa3" else "attention: flash_attention_2"


def _checkpointing(value: Any) -> str:
    return f"activation_checkpointing: {'false' if value in (False, None, 'none') else 'true'}"


def _epochs(value: Any) -> str:
    epochs = value if isinstance(value, (int, float)) else "epochs"
    return f"steps: {epochs} x {_EPOCH}"


def _per_epoch(key: str) -> Callable[[Any], str]:
    return lambda value: f"{key}: {_EPOCH} / {value}"


def _dp_shard(value: Any) -> str:
    return f"zero: 3 with data_parallel: {value}" if isinstance(value, int) and value > 1 else "zero: 3"


def _stage(value: Any) -> str:
    """LLaMA-Factory's task, or ZeRO's number without its block."""
    if value in (0, 1, 2, 3) and not isinstance(value, bool):
        return _written("zero", value)
    known = {
        "pt": "remove it: texts are trained on as texts",
        "sft": "remove it, and start from --recipe sft",
    }
    return known.get(str(value).lower(), "remove it: dstrain trains on texts and on conversations")


def _recent(value: Any) -> str:
    if not isinstance(value, int) or value <= 0:
        return "keep: a large number"
    return f"keep: {value}"


_ACCUMULATION = "remove it: it follows from global_batch / (micro_batch x replicas)"
_NOT_SPLIT = (
    "remove it: dstrain splits a model by pipeline (stages of layers) and zero (states and parameters)"
)


def _in_adapter(key: str) -> Callable[[Any], str]:
    return lambda value: f"adapter: {{{key}: {_json(value)}}}"


def _quantization_bit(value: Any) -> str:
    if value in (4, 8):
        return f"adapter: {{base: {value}bit}}"
    return "remove it: adapter.base can be 4bit or 8bit"


def _targets(value: Any) -> str:
    names = value.split(",") if isinstance(value, str) else value
    return (
        "adapter: {targets: all-linear}"
        if names in (["all"], ["all-linear"])
        else _in_adapter("targets")(names)
    )


def _finetuning_type(value: Any) -> str:
    if value == "lora":
        return "adapter: lora"
    return "remove it: all parameters are trained, unless freeze: [patterns] names some"


_LOGGED = "remove it: every step is logged, in the run folder's metrics.jsonl"
_NO_REMOTE_CODE = "remove it: code that comes with a model is never run"
_LOADER = "remove it: the data is tokenized before the first step, and read from the cache"
_RESUME = "remove it: `dstrain resume RUN` continues a run"
_HUB = "remove it: `dstrain export RUN FOLDER` writes a folder that can be uploaded"
_NO_FSDP = "zero: 3, which shards parameters, gradients and optimizer states"
_DDP = "remove it: DeepSpeed reduces the gradients; its keys stand under `deepspeed:`"
_COMPILE = "remove it: dstrain does not compile models"


def _entries(
    trainers: tuple[str, ...], entries: Mapping[str, tuple[Callable[[Any], str], Any]]
) -> dict[str, ForeignKey]:
    return {name: ForeignKey(trainers, translate, example) for name, (translate, example) in entries.items()}


FOREIGN_KEYS: dict[str, ForeignKey] = {
    **_entries(
        _HF_AND_OTHERS,
        {
            "learning_rate": (_same("lr"), 5e-5),
            "max_steps": (_same("steps"), 1000),
            "num_train_epochs": (_epochs, 3),
            "per_device_train_batch_size": (_same("micro_batch"), 4),
            "per_gpu_train_batch_size": (_same("micro_batch"), 4),
            "per_device_eval_batch_size": (
                _note("remove it: validation takes the micro-batch of training"),
                8,
            ),
            "gradient_accumulation_steps": (_note(_ACCUMULATION), 8),
            "auto_find_batch_size": (
                _note("remove it: `dstrain plan --fit` finds a micro-batch that fits before anything starts"),
                True,
            ),
            "gradient_checkpointing": (_checkpointing, True),
            "gradient_checkpointing_kwargs": (
                _note("activation_checkpointing: true; it has no options"),
                {"use_reentrant": False},
            ),
            "max_grad_norm": (_same("gradient_clipping"), 1.0),
            "lr_scheduler_type": (_lr_schedule, "cosine"),
            "lr_scheduler_kwargs": (
                _note("lr_schedule_options, for a schedule of your own: docs/extending.md"),
                {"num_cycles": 1},
            ),
            "warmup_ratio": (_scaled("warmup_steps", "steps"), 0.03),
            "optim": (_optimizer, "adamw_torch"),
            "optim_args": (
                _note("optimizer_options, for an optimizer of your own: docs/extending.md"),
                "a=1",
            ),
            "adam_beta1": (lambda value: f"betas: [{value}, 0.95], both of them", 0.9),
            "adam_beta2": (lambda value: f"betas: [0.9, {value}], both of them", 0.999),
            "adam_epsilon": (_same("eps"), 1e-8),
            "bf16": (_switch("precision: bf16", "precision: fp32, the default"), True),
            "fp16": (_switch("precision: fp16", "precision: fp32, the default"), True),
            "bf16_full_eval": (_note("remove it: validation takes the precision of training"), True),
            "fp16_full_eval": (_note("remove it: validation takes the precision of training"), True),
            "torch_compile": (_note(_COMPILE), True),
            "torch_compile_backend": (_note(_COMPILE), "inductor"),
            "torch_compile_mode": (_note(_COMPILE), "default"),
            "logging_steps": (_note(_LOGGED), 10),
            "logging_strategy": (_note(_LOGGED), "steps"),
            "logging_first_step": (_note(_LOGGED), True),
            "logging_dir": (
                _note("trackers: [{name: tensorboard}], which writes into the run folder"),
                "logs",
            ),
            "report_to": (_report_to, ["wandb"]),
            "run_name": (_same("name"), "my-run"),
            "output_dir": (
                lambda value: (
                    f"runs_dir: the folder that holds runs, and name: {value or 'the run'} for this one"
                ),
                "out",
            ),
            "overwrite_output_dir": (
                _note("remove it: a run is never written over; choose another name"),
                True,
            ),
            "eval_steps": (_same("eval_every"), 500),
            "eval_strategy": (_strategy("eval_every", "eval_steps", "0, only after the last step"), "steps"),
            "evaluation_strategy": (
                _strategy("eval_every", "eval_steps", "0, only after the last step"),
                "no",
            ),
            "eval_delay": (_note("remove it: validation begins with the first eval_every"), 100),
            "save_steps": (_same("save_every"), 500),
            "save_strategy": (_strategy("save_every", "save_steps", "never"), "steps"),
            "save_total_limit": (_recent, 2),
            "save_only_model": (
                _note("save_weights: true with save_every: never, if the run shall not be resumed"),
                True,
            ),
            "load_best_model_at_end": (
                _note("remove it: keep_every keeps checkpoints for good, and metrics.jsonl has their losses"),
                True,
            ),
            "metric_for_best_model": (
                _note("remove it: metrics.jsonl has the validation losses"),
                "eval_loss",
            ),
            "resume_from_checkpoint": (_note(_RESUME), True),
            "ignore_data_skip": (
                _note("remove it: a resumed run goes on with the sample after the last one"),
                True,
            ),
            "data_seed": (_note("seed: one for initial weights, data order and dropout"), 42),
            "full_determinism": (_switch("deterministic: true", "deterministic: false"), True),
            "use_cpu": (_note("remove it, and set DS_ACCELERATOR=cpu in the environment"), True),
            "no_cuda": (_note("remove it, and set DS_ACCELERATOR=cpu in the environment"), True),
            "dataloader_num_workers": (_note(_LOADER), 4),
            "dataloader_pin_memory": (_note(_LOADER), True),
            "dataloader_prefetch_factor": (_note(_LOADER), 2),
            "dataloader_drop_last": (
                _note("remove it: every step has global_batch samples; the order begins anew at the end"),
                True,
            ),
            "remove_unused_columns": (_note("remove it: only the text is read"), False),
            "group_by_length": (_note("pack: true, which leaves no padding to save"), True),
            "label_smoothing_factor": (
                _note("loss: module:name, a loss of your own (docs/extending.md)"),
                0.1,
            ),
            "neftune_noise_alpha": (_note("remove it: no noise is added to embeddings"), 5.0),
            "use_liger_kernel": (
                _note("remove it: the loss of a model that can be split is computed in parts of its logits"),
                True,
            ),
            "use_cache": (_note("remove it: training keeps no cache of earlier tokens"), False),
            "eval_on_start": (
                _note("remove it: the validation loss is computed before the first step"),
                True,
            ),
            "push_to_hub": (_note(_HUB), True),
            "hub_model_id": (_note(_HUB), "me/model"),
            "hub_strategy": (_note(_HUB), "end"),
            "hub_token": (_note("remove it: HF_TOKEN in the environment serves downloads"), "..."),
            "fsdp": (_note(_NO_FSDP), "full_shard"),
            "fsdp_config": (_note(_NO_FSDP), {}),
            "ddp_find_unused_parameters": (_note(_DDP), False),
            "ddp_bucket_cap_mb": (_note(_DDP), 25),
            "ddp_backend": (_note("remove it: nccl on GPUs, gloo on CPUs"), "nccl"),
            "ddp_timeout": (_note("communication_timeout: a time, such as 30m"), 1800),
            "local_rank": (_note("remove it: the launcher sets it"), -1),
            "do_train": (_note("remove it: `dstrain run` trains"), True),
            "do_eval": (_note("eval_every: a number of steps"), True),
            "disable_tqdm": (
                _note("remove it: where the output is no terminal there is no moving line"),
                True,
            ),
            "max_seq_length": (_same("seq_len"), 2048),
            "max_length": (_same("seq_len"), 2048),
            "packing": (_same("pack"), True),
            "model_name_or_path": (_same("model"), "my/model"),
            "attn_implementation": (_same("attention"), "sdpa"),
            "torch_dtype": (_precision, "bfloat16"),
            "trust_remote_code": (_note(_NO_REMOTE_CODE), True),
            "tokenizer_name": (_same("tokenizer"), "folder"),
        },
    ),
    **_entries(
        (TRL,),
        {
            "assistant_only_loss": (_switch("train_on: assistant, the default", "train_on: all"), True),
            "completion_only_loss": (_switch("train_on: assistant, the default", "train_on: all"), True),
            "dataset_text_field": (lambda value: f"data_fields: {{text: {_json(value)}}}", "content"),
            "chat_template_path": (_same("chat_template"), "chat.jinja"),
        },
    ),
    **_entries(
        (AXOLOTL,),
        {
            "base_model": (_same("model"), "my/model"),
            "base_model_config": (_same("model"), "my/model"),
            "tokenizer_config": (_same("tokenizer"), "folder"),
            "sequence_len": (_same("seq_len"), 2048),
            "sample_packing": (_same("pack"), True),
            "train_on_inputs": (_switch("train_on: all", "train_on: assistant, the default"), False),
            "train_on_eos": (
                lambda value: f"train_stop_token: {'false' if value == 'none' else 'true'}",
                "turn",
            ),
            "roles_to_train": (_note("train_on: assistant, last or all"), ["assistant"]),
            "excess_length_strategy": (_too_long, "drop"),
            "eval_sample_packing": (_note("pack: true, for training and validation alike"), True),
            "pad_to_sequence_len": (
                _note("remove it: samples always have seq_len tokens"),
                True,
            ),
            "micro_batch_size": (_same("micro_batch"), 2),
            "num_epochs": (_epochs, 1),
            "datasets": (_data, [{"path": "data.jsonl", "type": "completion"}]),
            "pretraining_dataset": (_data, "data.jsonl"),
            "test_datasets": (_note("validation: a fraction of the documents of data"), []),
            "val_set_size": (_validation, 0.05),
            "dataset_prepared_path": (
                _note("remove it: tokens are cached in ~/.cache/dstrain, or in DSTRAIN_CACHE"),
                "prepared",
            ),
            "flash_attention": (_switch("attention: flash_attention_2", "attention: auto"), True),
            "sdp_attention": (_switch("attention: sdpa", "attention: auto"), True),
            "flex_attention": (_switch("attention: flex_attention", "attention: auto"), True),
            "eager_attention": (_switch("attention: eager", "attention: auto"), True),
            "xformers_attention": (_note("attention: sdpa"), True),
            "lr_scheduler": (_lr_schedule, "cosine"),
            "evals_per_epoch": (
                _per_epoch("eval_every"),
                4,
            ),
            "saves_per_epoch": (
                _per_epoch("save_every"),
                1,
            ),
            "cosine_min_lr_ratio": (_same("lr_final"), 0.1),
            "lora_r": (_in_adapter("r"), 16),
            "lora_alpha": (_in_adapter("alpha"), 32),
            "lora_dropout": (_in_adapter("dropout"), 0.05),
            "lora_target_modules": (_targets, ["q_proj"]),
            "lora_target_parameters": (_in_adapter("target_parameters"), ["mlp.experts.down_proj"]),
            "lora_target_linear": (_switch("adapter: {targets: all-linear}", "remove it"), True),
            "lora_modules_to_save": (_in_adapter("modules_to_save"), ["lm_head"]),
            "peft_use_dora": (_switch("adapter: dora", "remove it"), True),
            "peft_use_rslora": (_switch("adapter: rslora", "remove it"), True),
            "load_in_4bit": (_switch("adapter: {base: 4bit}", "remove it"), True),
            "load_in_8bit": (_switch("adapter: {base: 8bit}", "remove it"), True),
            "lora_model_dir": (_in_adapter("from"), "my-adapter"),
            "unfrozen_parameters": (
                _note("freeze: [patterns], the parameters that are not trained"),
                ["model.*"],
            ),
            "wandb_project": (lambda value: f"trackers: [{{name: wandb, project: {value}}}]", "my-project"),
            "wandb_name": (_same("name"), "my-run"),
            "mlflow_experiment_name": (_note("trackers: [mlflow]"), "my-experiment"),
            "use_tensorboard": (_switch("trackers: [tensorboard]", "remove it"), True),
            "tensor_parallel_size": (_note(_NOT_SPLIT), 2),
            "context_parallel_size": (_note(_NOT_SPLIT), 2),
            "sequence_parallel_degree": (_note(_NOT_SPLIT), 2),
            "dp_shard_size": (_dp_shard, 8),
            "dp_replicate_size": (_same("data_parallel"), 2),
            "auto_resume_from_checkpoints": (_note("restarts: 3, which also restarts after a failure"), True),
            "early_stopping_patience": (_note("a hook of your own can stop a run: docs/extending.md"), 3),
            "special_tokens": (_note("remove it: the tokenizer's own are taken"), {"pad_token": "<pad>"}),
        },
    ),
    **_entries(
        (LLAMA_FACTORY,),
        {
            "pure_bf16": (
                _note("precision: bf16; ZeRO keeps fp32 master weights beside them"),
                True,
            ),
            "cutoff_len": (_same("seq_len"), 2048),
            "dataset": (_data, "my_data"),
            "dataset_dir": (_note("data: the path of the file or folder"), "data"),
            "eval_dataset": (_note("validation: a fraction of the documents of data"), "my_data"),
            "val_size": (_validation, 0.1),
            "max_samples": (_note("remove it, and name a smaller file as data"), 1000),
            "neat_packing": (_same("pack"), True),
            "flash_attn": (_flash, "fa2"),
            "stage": (_stage, "pt"),
            "train_on_prompt": (_switch("train_on: all", "train_on: assistant, the default"), True),
            "mask_history": (_switch("train_on: last", "train_on: assistant, the default"), True),
            "formatting": (_note("data_format: messages, sharegpt, alpaca or auto"), "sharegpt"),
            "finetuning_type": (_finetuning_type, "lora"),
            "freeze_trainable_layers": (_note("freeze: [patterns], the parameters that are not trained"), 2),
            "lora_rank": (_in_adapter("r"), 8),
            "lora_target": (_targets, "all"),
            "additional_target": (_in_adapter("modules_to_save"), ["lm_head"]),
            "use_dora": (_switch("adapter: dora", "remove it"), True),
            "use_rslora": (_switch("adapter: rslora", "remove it"), True),
            "quantization_bit": (_quantization_bit, 4),
            "adapter_name_or_path": (_in_adapter("from"), "my-adapter"),
            "template": (
                _note("remove it: the tokenizer's own is taken; or chat_template: chatml, or a Jinja file"),
                "llama3",
            ),
            "preprocessing_num_workers": (_note(_LOADER), 16),
            "overwrite_cache": (_note("remove it: the cache knows when the data has changed"), True),
            "plot_loss": (
                _note("remove it: metrics.jsonl has every loss; trackers: [tensorboard] draws them"),
                True,
            ),
            "disable_gradient_checkpointing": (
                lambda value: _checkpointing(not value),
                True,
            ),
        },
    ),
    **_entries(
        (TORCHTITAN,),
        {
            "model.name": (_note("model: a folder with a config.json, or a name on the hub"), "llama3"),
            "model.flavor": (_note("model: a folder with a config.json, or a name on the hub"), "8B"),
            "model.hf_assets_path": (_same("model"), "folder"),
            "model.tokenizer_path": (_same("tokenizer"), "folder"),
            "optimizer.name": (_optimizer, "AdamW"),
            "optimizer.lr": (_same("lr"), 8e-4),
            "optimizer.eps": (_same("eps"), 1e-8),
            "optimizer.beta1": (lambda value: f"betas: [{value}, 0.95], both of them", 0.9),
            "optimizer.beta2": (lambda value: f"betas: [0.9, {value}], both of them", 0.95),
            "optimizer.weight_decay": (_same("weight_decay"), 0.1),
            "optimizer.implementation": (_note("remove it"), "fused"),
            "lr_scheduler.warmup_steps": (_same("warmup_steps"), 200),
            "lr_scheduler.decay_type": (_lr_schedule, "linear"),
            "lr_scheduler.min_lr_factor": (_same("lr_final"), 0.1),
            "lr_scheduler.decay_ratio": (_note("a schedule of your own: docs/extending.md"), 0.8),
            "training.local_batch_size": (
                lambda value: f"global_batch: {value} x replicas",
                8,
            ),
            "training.global_batch_size": (_same("global_batch"), 64),
            "training.seq_len": (_same("seq_len"), 8192),
            "training.max_norm": (_same("gradient_clipping"), 1.0),
            "training.steps": (_same("steps"), 1000),
            "training.dataset": (_data, "c4"),
            "training.dataset_path": (_same("data"), "folder"),
            "training.compile": (_note(_COMPILE), True),
            "training.mixed_precision_param": (_precision, "bfloat16"),
            "training.mixed_precision_reduce": (
                _note("deepspeed: {communication_data_type: fp32}"),
                "float32",
            ),
            "training.seed": (_same("seed"), 42),
            "training.deterministic": (_same("deterministic"), True),
            "training.enable_cpu_offload": (_switch("offload: cpu", "offload: none"), True),
            "debug.seed": (_same("seed"), 42),
            "debug.deterministic": (_same("deterministic"), True),
            "parallelism.data_parallel_replicate_degree": (_same("data_parallel"), 2),
            "parallelism.data_parallel_shard_degree": (_dp_shard, -1),
            "parallelism.pipeline_parallel_degree": (_same("pipeline"), 4),
            "parallelism.pipeline_parallel_schedule": (_pipeline_schedule, "1F1B"),
            "parallelism.pipeline_parallel_microbatch_size": (_same("micro_batch"), 1),
            "parallelism.tensor_parallel_degree": (_note(_NOT_SPLIT), 2),
            "parallelism.context_parallel_degree": (_note(_NOT_SPLIT), 2),
            "parallelism.expert_parallel_degree": (_note(_NOT_SPLIT), 2),
            "checkpoint.enable": (_switch("save_every: a number of steps", "save_every: never"), True),
            "checkpoint.interval": (_same("save_every"), 500),
            "checkpoint.folder": (_note("remove it: checkpoints stand in the run folder"), "checkpoint"),
            "checkpoint.keep_latest_k": (_recent, 10),
            "checkpoint.async_mode": (
                lambda value: f"background_save: {'false' if value == 'disabled' else 'true'}",
                "async",
            ),
            "checkpoint.initial_load_path": (_note("model: a folder, with init: pretrained"), "folder"),
            "activation_checkpoint.mode": (_checkpointing, "full"),
            "compile.enable": (_note(_COMPILE), True),
            "metrics.log_freq": (_note(_LOGGED), 10),
            "metrics.enable_tensorboard": (_switch("trackers: [tensorboard]", "remove it"), True),
            "metrics.enable_wandb": (_switch("trackers: [wandb]", "remove it"), True),
            "profiling.enable_profiling": (_note("profile: {steps: [FIRST, LAST]}"), True),
            "profiling.profile_freq": (_note("profile: {steps: [FIRST, LAST]}"), 100),
            "validation.enable": (_switch("eval_every: a number of steps", "eval_every: 0"), True),
            "validation.freq": (_same("eval_every"), 100),
            "validation.steps": (_note("eval_samples: this x the batch"), 10),
            "job.dump_folder": (_same("runs_dir"), "outputs"),
            "job.description": (_same("name"), "my-run"),
            "comm.init_timeout_seconds": (_note("communication_timeout: a time, such as 30m"), 300),
        },
    ),
    **_entries(
        (DEEPSPEED, "Megatron-LM"),
        {
            "batch_size": (
                _note(
                    "global_batch is the number of samples per step, micro_batch per forward and backward"
                    " pass of a replica"
                ),
                8,
            ),
            "train_batch_size": (_same("global_batch"), 64),
            "global_batch_size": (_same("global_batch"), 64),
            "train_micro_batch_size_per_gpu": (_same("micro_batch"), 4),
            "zero_stage": (_same("zero"), 2),
            "tensor_model_parallel_size": (_note(_NOT_SPLIT), 2),
            "pipeline_model_parallel_size": (_same("pipeline"), 4),
            "seq_length": (_same("seq_len"), 2048),
            "train_iters": (_same("steps"), 1000),
            "lr_warmup_iters": (_same("warmup_steps"), 100),
            "lr_decay_style": (_lr_schedule, "cosine"),
            "clip_grad": (_same("gradient_clipping"), 1.0),
            "save_interval": (_same("save_every"), 500),
            "eval_interval": (_same("eval_every"), 500),
            "recompute_granularity": (_checkpointing, "full"),
        },
    ),
    **_entries(
        ("nanoGPT", "Lightning", "Accelerate"),
        {
            "block_size": (_same("seq_len"), 1024),
            "max_iters": (_same("steps"), 5000),
            "warmup_iters": (_same("warmup_steps"), 100),
            "grad_clip": (_same("gradient_clipping"), 1.0),
            "gradient_clip_val": (_same("gradient_clipping"), 1.0),
            "out_dir": (_note("runs_dir: the folder that holds runs, and name: a name for this one"), "out"),
            "wandb": (_switch("trackers: [wandb]", "remove it"), True),
            "wandb_log": (_switch("trackers: [wandb]", "remove it"), True),
            "tensorboard": (_switch("trackers: [tensorboard]", "remove it"), True),
            "compile": (_note(_COMPILE), True),
            "scheduler": (_lr_schedule, "cosine"),
            "mixed_precision": (_precision, "bf16"),
            "dtype": (_precision, "bfloat16"),
            "tp": (_note(_NOT_SPLIT), 2),
            "pp": (_same("pipeline"), 4),
            "dp": (_same("data_parallel"), 2),
            "max_epochs": (_epochs, 3),
            "epochs": (_epochs, 3),
        },
    ),
}
"""By name; a key in a section as ``section.key``."""

# Values that other trainers take for a key of the same name, in small letters.
_VALUES: dict[str, Mapping[str, str]] = {
    "optimizer": _OPTIMIZER_NAMES,
    "precision": _PRECISION_NAMES,
    "lr_schedule": {"constant_with_warmup": "constant"},
    "schedule": _PIPELINE_SCHEDULES,
}


def translate(key: str, value: Any) -> str | None:
    """What to write here for a key of another trainer; None where it is not known.

    Args:
        value: of the key; a mapping is a section, each known key of which is translated.
    """
    if key in FOREIGN_KEYS:
        return FOREIGN_KEYS[key].translate(value)
    if isinstance(value, Mapping):
        named = {".".join((key, *path)): inner for path, inner in leaves(value)}
        found = [FOREIGN_KEYS[name].translate(inner) for name, inner in named.items() if name in FOREIGN_KEYS]
        return "; ".join(dict.fromkeys(found)) or None
    return None


def translate_value(key: str, value: Any) -> str | None:
    """What to write for a value that another trainer's key of the same name takes; None where it is not known."""
    if isinstance(value, Mapping):
        return translate(key, value)
    if not isinstance(value, str):
        return None
    if key == "deepspeed":  # the HF Trainer's and axolotl's key is the path of a JSON file
        return _written("ds_config", value)
    ours = _VALUES.get(key, {}).get(value.lower())
    return f"{key}: {ours}" if ours else None
