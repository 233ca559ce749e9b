"""The run config: every key with its type, default and description."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

from dstrain.config.data_sources import (
    DataSource,
    Phase,
    ValidationSource,
    check_phases,
    check_sources,
    or_path,
    sources_of,
)
from dstrain.config.hook_choices import (
    Profile,
    check_hooks,
    check_trackers,
    json_schema_of_hooks,
    json_schema_of_trackers,
    name_of,
)
from dstrain.config.passed_variables import check_patterns
from dstrain.config.value_types import (
    DataFormat,
    Fraction,
    HostName,
    NonNegativeInt,
    PositiveInt,
    Precision,
    TypeInWords,
    as_json,
    check_name,
    json_schema_of_names,
)
from dstrain.config.values import seconds
from dstrain.lora import Adapter, check_adapter
from dstrain.losses import LOSSES
from dstrain.lr_schedules import LR_SCHEDULES
from dstrain.optimizers import OPTIMIZERS
from dstrain.plugins import Plugin, is_code

NEVER = "never"
"""As ``save_every``: no checkpoint, not even of the last step. As ``hang_after``: however long it takes."""


class RunConfig(BaseModel):
    """What the user asks for. A flag ``--foo-bar`` sets the key ``foo_bar``.

    Unknown keys and wrong types are refused; nothing is coerced but an integer to a float.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    # Model and data.
    model: str = Field(
        "quickstart",
        description="folder with a config.json, model name on the Hugging Face Hub, or built-in shape",
    )
    init: Literal["random", "pretrained"] = Field(
        "random", description="initial weights: random, or pretrained (those next to the model's config)"
    )
    freeze: list[str] = Field(
        [], description="parameters to freeze, by Hugging Face name; * matches anything"
    )
    adapter: Annotated[
        Adapter | None,
        TypeInWords("lora, rslora, dora, or a mapping: {type, r, alpha, dropout, targets, ...}"),
    ] = Field(
        None,
        description="train low-rank adapters in place of the model's own weights: lora, rslora, dora; with options:"
        " {type: lora, r: 16, alpha: 32, targets: [q_proj, v_proj]}",
    )
    tokenizer: str = Field(
        "auto",
        description="folder or hub name of a Hugging Face tokenizer, or bytes; auto: the model folder's, else bytes",
    )
    data: Annotated[
        str | list[DataSource], TypeInWords("text, or a list of sources: {path, name, format, weight, ...}")
    ] = Field(
        "stdlib",
        description="file, folder, pattern or hub data set: text, JSON Lines, parquet, Arrow, CSV, files of tokens; or"
        " stdlib; or a function of your own that gives the documents: my_module:my_documents; or a list of sources",
        json_schema_extra=or_path,
    )
    data_options: dict[str, Any] = Field(
        {},
        description="keyword arguments of a dataset of your own",
    )
    data_weight_by: Literal["tokens", "documents"] = Field(
        "tokens",
        description="what the weights of several sources are shares of: the tokens of samples (padding aside), or"
        " documents",
    )
    data_phases: list[Phase] = Field(
        [],
        description="other weights of the sources in the course of the run: [{until: 0.9, weights: {web: 3, code: 1}},"
        " {weights: {web: 1, code: 1}}]",
    )
    data_stream: bool = Field(
        False,
        description="train while the data is still being read and tokenized, without a cache of its tokens",
    )
    data_format: DataFormat = Field(
        "auto",
        description="format of the records of files; auto: that of the first record, by its fields; or of files of"
        " tokens: megatron, nanogpt, llm.c; text-0.1: texts, of the files that version 0.1 has read",
    )
    data_fields: dict[str, str] = Field(
        {},
        description="names of the fields in your files, where they are not those of the format: {text: content}",
    )
    chat_template: str | None = Field(
        None,
        description="chat template of conversations: a file with a Jinja template, one of the tokenizer's by name, or"
        " chatml; default: the tokenizer's own",
    )
    train_on: Literal["assistant", "last", "all"] = Field(
        "assistant",
        description="what of a conversation counts in the loss: assistant: what the assistant writes, with the token"
        " that ends its turn; last: its last turn; all: every token",
    )
    train_stop_token: bool = Field(
        True,
        description="count the token that ends an assistant's turn in the loss, so that the model learns to stop",
    )
    on_bad_record: Literal["error", "skip"] = Field(
        "error", description="what to do with a record that can't be trained on: stop, or leave it out"
    )
    too_long: Literal["error", "drop", "cut"] = Field(
        "error",
        description="what to do with a conversation of more than seq_len tokens: stop, leave it out, or cut it",
    )
    attention: str = Field(
        "auto",
        description="attention implementation: sdpa, eager, varlen (torch's flash attention for packed rows, on GPUs),"
        " flex_attention, flash_attention_2, flash_attention_3; auto: on GPUs in 16 bits varlen, else sdpa, as far as"
        " the model family supports it",
    )
    seq_len: PositiveInt = Field(256, description="sequence length of a sample, in tokens")
    begin_token: Literal["auto", "always", "never"] = Field(
        "auto",
        description="what documents begin with: auto: what the tokenizer itself puts in front of a text, mostly its bos"
        " token or nothing; always: its bos token; never: nothing",
    )
    pack: bool = Field(
        True, description="pack several documents into a sample; documents do not attend to each other"
    )
    max_document_bytes: PositiveInt | None = Field(
        None,
        description="bytes of the largest document that is read; default: 64 MiB for a line of a JSON-lines file, which"
        " may be compressed, and 4 GiB for a text file",
    )
    validation: Annotated[
        Fraction | list[ValidationSource],
        TypeInWords("number, or a list of sources: {path, name, format, ...}"),
    ] = Field(
        0.05,
        description="fraction of the documents that is held back for validation; or a list of validation sets, each"
        " with a loss of its own",
        json_schema_extra=or_path,
    )

    # Training length and batch size.
    steps: PositiveInt = Field(100, description="number of optimizer steps")
    global_batch: PositiveInt = Field(32, description="samples per optimizer step, over all replicas")
    micro_batch: PositiveInt | None = Field(
        None,
        description="samples per forward and backward pass of a replica; default: derived from global_batch",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        1234, description="random seed of initial weights, data order and dropout"
    )

    deterministic: bool = Field(
        False,
        description="bit-identical results on the same kind of device; operations that can't guarantee them are errors",
    )

    # Loss, optimizer and learning rate.
    loss: Annotated[
        str, json_schema_of_names(LOSSES), TypeInWords(f"{', '.join(LOSSES)}, or module:name")
    ] = Field(
        "cross-entropy",
        description="training loss of a token; or a loss function of your own: my_module:my_loss. The validation loss"
        " is always the cross-entropy",
    )
    loss_options: dict[str, Any] = Field(
        {},
        description="keyword arguments of a loss function of your own, beside logits and labels",
    )
    optimizer: Annotated[
        str, json_schema_of_names(OPTIMIZERS), TypeInWords(f"{', '.join(OPTIMIZERS)}, or module:name")
    ] = Field(
        "adamw",
        description="what updates the weights; or an optimizer of your own: my_module:MyOptimizer",
    )
    optimizer_options: dict[str, Any] = Field(
        {},
        description="keyword arguments of an optimizer of your own, beside lr",
    )
    lr: Annotated[float, Field(gt=0)] = Field(3e-4, description="peak learning rate")
    lr_schedule: Annotated[
        str, json_schema_of_names(LR_SCHEDULES), TypeInWords(f"{', '.join(LR_SCHEDULES)}, or module:name")
    ] = Field(
        "cosine",
        description="shape of the learning rate after warm-up; or a schedule of your own: my_module:my_schedule",
    )
    lr_schedule_options: dict[str, Any] = Field(
        {},
        description="keyword arguments of a schedule of your own, beside step and steps",
    )
    lr_final: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1, description="final learning rate of the built-in schedules, as a fraction of lr"
    )
    warmup_steps: NonNegativeInt = Field(
        0, description="steps over which the learning rate rises from 0 to lr"
    )
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = Field(
        [0.9, 0.95], description="AdamW: decay rates of the running averages of the gradient and its square"
    )
    eps: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW: epsilon, added to the denominator")
    momentum: Fraction = Field(0.0, description="SGD: momentum")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.1, description="weight decay; not applied to norms and biases"
    )
    gradient_clipping: Annotated[float, Field(ge=0)] = Field(
        1.0, description="maximum norm of the whole model's gradient; 0: no clipping"
    )

    # Parallelism, precision and memory.
    zero: Literal[0, 1, 2, 3] = Field(1, description="ZeRO stage")
    pipeline: PositiveInt = Field(1, description="number of pipeline stages")
    data_parallel: PositiveInt | None = Field(
        None, description="number of replicas; default: as many as the devices allow"
    )
    partition: str = Field(
        "auto",
        description="how layers are assigned to pipeline stages: auto (balances estimated time within each device's"
        " memory), parameters, uniform, or the number of blocks of each stage: 5,5,5,1",
    )
    precision: Precision = Field("fp32", description="data type of parameters and activations")
    schedule: Literal["1f1b", "zb-h1", "dualpipev"] = Field(
        "1f1b",
        description="pipeline schedule; zb-h1: a third of the bubble, gradients of weights are computed later;"
        " dualpipev: two stages per rank, smaller bubble",
    )
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none",
        description="where optimizer states are stored: none (on the device), cpu (host memory), nvme (disk; ZeRO-3)",
    )
    nvme_path: str | None = Field(None, description="folder on a local disk, for offload: nvme")
    activation_checkpointing: bool = Field(
        False, description="recompute the activations of each block in the backward pass"
    )
    hostfile: str | None = Field(None, description="hostfile: one line per host, NAME slots=N")

    # Run folder, checkpoints and launch.
    name: str | None = Field(None, description="name of the run folder; default: date and model")
    runs_dir: str = Field("runs", description="folder that holds the run folders")
    access: Literal["private", "group", "umask"] = Field(
        "private",
        description="who may read a new run folder: only you (private), your group too (group), or as the umask says"
        " (umask)",
    )
    eval_every: NonNegativeInt = Field(
        50, description="steps between evaluations on the validation set; 0: only after the last step"
    )
    eval_samples: PositiveInt = Field(64, description="validation samples per evaluation")
    save_every: int | str = Field(
        100,
        description="steps or time between checkpoints: 500, 20m, 1h30m; 0: only after the last step;"
        " never: no checkpoints",
    )
    time_limit: str | None = Field(
        None,
        description="maximum run time (90s, 20m, 3h50m): the run then finishes its step, saves a checkpoint and exits",
    )
    launcher: Literal["local", "pdsh", "openmpi", "torchrun", "slurm", "none"] | None = Field(
        None,
        description="how ranks are started; default: local, pdsh if a hostfile names other machines,"
        " slurm in a Slurm job with several nodes; none: you start dstrain on each node",
    )
    nodes: PositiveInt | None = Field(
        None, description="with launcher: none: number of nodes on which you start dstrain; default: 1"
    )
    processes: PositiveInt | None = Field(
        None, description="with launcher: none: ranks per node; default: one per GPU"
    )
    master_addr: HostName | None = Field(
        None,
        description="name or address at which rank 0's host is reached; default: its name in the hostfile",
    )
    master_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None,
        description="TCP port on rank 0's host for rendezvous; default: a free port, or 29500 with launcher: none",
    )
    pass_env: list[str] = Field(
        [],
        description="names of environment variables to hand on to ranks on other hosts, where ssh drops them, beside"
        " those of NCCL and the like; * matches anything: [MY_*]. Names that look like secrets are refused",
    )
    communication_timeout: str | None = Field(
        None,
        description="time that a rank waits for the others in a collective of the training (90s, 20m); default: the"
        " minutes of DEEPSPEED_TIMEOUT, or 10m. What happens between steps (checkpoints, hooks) has no such limit",
    )
    restarts: NonNegativeInt = Field(
        0,
        description="maximum restarts after a failure, each from the newest checkpoint; a new checkpoint"
        " resets the count",
    )
    elastic: bool = Field(
        False,
        description="with restarts: continue with fewer replicas if hosts are lost, and with all of them"
        " from the next restart",
    )
    hang_after: str | None = Field(
        None,
        description="time without a step after which a run counts as hung (90s, 20m), or never; default:"
        " 10 times the slowest"
        " step, at least 60s, or 30m for work between steps",
    )
    check_every: NonNegativeInt = Field(
        50, description="steps between checks that replicas and tied weights are bit-identical; 0: no checks"
    )
    save_weights: bool = Field(
        False, description="write the final weights to the run folder as safetensors, one file per stage"
    )
    keep: PositiveInt = Field(2, description="number of newest checkpoints to keep")
    keep_every: NonNegativeInt = Field(
        0,
        description="also save a checkpoint every this many steps and never delete it; 0: off",
    )
    background_save: bool = Field(
        True,
        description="write checkpoints in the background while training continues, if host memory has room for a copy",
    )
    prompt: str = Field("def ", description="prompt that the model continues at the end of the run")
    sample_tokens: NonNegativeInt = Field(120, description="length of that continuation, in tokens; 0: none")

    # Trackers, profiler and hooks.
    trackers: Annotated[list[str | dict[str, Any]], WithJsonSchema(json_schema_of_trackers())] = Field(
        [],
        description="experiment trackers that receive every value of metrics.jsonl: tensorboard, wandb, mlflow; with"
        " options: {name: wandb, project: NAME}",
    )
    profile: Profile | None = Field(
        None, description="record torch.profiler traces: {steps: [FIRST, LAST], ranks: [0]}"
    )
    hooks: Annotated[list[str | dict[str, Any]], WithJsonSchema(json_schema_of_hooks())] = Field(
        [],
        description="your own hook classes, called during training: my_module:MyHook; with options:"
        " {name: my_module:MyHook, options: {...}, optional: true}",
    )
    code_dirs: list[str] | None = Field(
        None,
        description="folders to import your own modules from; default: the folder of the config file and the one that"
        " the run is started from",
    )

    # DeepSpeed keys.
    ds_config: str | None = Field(
        None, description="DeepSpeed JSON file, applied on top of the generated config"
    )
    deepspeed: dict[str, Any] = Field(
        {}, description="DeepSpeed keys, applied on top of the generated config and of ds_config"
    )

    @field_validator("data", "validation", mode="before")
    @classmethod
    def _are_sources(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name == "data" and not isinstance(value, str | list):
            raise ValueError("must be a string, or a list of sources")
        if info.field_name == "validation" and (
            isinstance(value, bool) or not isinstance(value, int | float | list)
        ):
            raise ValueError("must be a number, or a list of validation sets")
        return check_sources(value, str(info.field_name))

    @field_validator("adapter", mode="before")
    @classmethod
    def _is_adapter(cls, value: Any) -> Any:
        return check_adapter(value)

    @field_validator("data_phases", mode="before")
    @classmethod
    def _are_phases(cls, value: Any) -> Any:
        return check_phases(value)

    @field_validator("optimizer", mode="before")
    @classmethod
    def _is_optimizer(cls, value: Any) -> Any:
        return check_name(value, OPTIMIZERS, "my_module:MyOptimizer")

    @field_validator("loss", mode="before")
    @classmethod
    def _is_loss(cls, value: Any) -> Any:
        return check_name(value, LOSSES, "my_module:my_loss")

    @field_validator("lr_schedule", mode="before")
    @classmethod
    def _is_lr_schedule(cls, value: Any) -> Any:
        return check_name(value, LR_SCHEDULES, "my_module:my_schedule")

    @field_validator("zero", mode="before")
    @classmethod
    def _stage_is_a_number(cls, value: Any) -> Any:
        """Python's ``True == 1 == 1.0`` would let ``zero: true`` and ``zero: 1.0`` pass for stage 1."""
        if isinstance(value, bool | float):
            raise ValueError("must be 0, 1, 2 or 3")
        return value

    @field_validator("trackers", mode="before")
    @classmethod
    def _names_trackers(cls, value: Any) -> Any:
        return check_trackers(value)

    @field_validator("hooks", mode="before")
    @classmethod
    def _names_hooks(cls, value: Any) -> Any:
        return check_hooks(value)

    @field_validator("pass_env")
    @classmethod
    def _are_names(cls, value: list[str]) -> list[str]:
        check_patterns(value)
        return value

    @field_validator("time_limit", "hang_after", "communication_timeout")
    @classmethod
    def _is_duration(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and not (value == NEVER and info.field_name == "hang_after"):
            seconds(value)
        return value

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """All user code that this config names, in the order of its keys."""
        named = [
            *(Plugin("data", "dataset", source.path) for source in self.read_sources),
            Plugin("loss", "loss", self.loss),
            Plugin("optimizer", "optimizer", self.optimizer),
            Plugin("lr_schedule", "learning-rate schedule", self.lr_schedule),
        ]
        return (
            *(plugin for plugin in named if is_code(plugin.name)),
            *(Plugin("hooks", "hook", name_of(each)) for each in self.hooks),
        )

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """What is trained on: the one source of ``data``, or those of its list."""
        return sources_of(self.data)

    @property
    def read_sources(self) -> tuple[ValidationSource, ...]:
        """All that is read: to train on, and as validation sets."""
        sets = self.validation if isinstance(self.validation, list) else []
        own = [
            ValidationSource.of(source.validation)
            for source in self.sources
            if isinstance(source.validation, str)
        ]
        return (*self.sources, *sets, *own)

    @property
    def time_limit_seconds(self) -> int | None:
        return None if self.time_limit is None else seconds(self.time_limit)

    @field_validator("save_every", mode="before")
    @classmethod
    def _steps_or_time(cls, value: Any) -> Any:
        """Steps as a number, time as a text; the text of a number is neither."""
        if value == NEVER:
            return value
        if isinstance(value, str):
            try:
                seconds(value)
                return value
            except ValueError:
                pass
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        raise ValueError("must be a number of steps (0 or more), a duration such as 20m or 1h30m, or never")

    @property
    def communication_timeout_seconds(self) -> int | None:
        return None if self.communication_timeout is None else seconds(self.communication_timeout)

    @property
    def hang_after_seconds(self) -> float | None:
        """None: derived from the steps; infinity for never."""
        if self.hang_after == NEVER:
            return float("inf")
        return None if self.hang_after is None else seconds(self.hang_after)

    @property
    def save_every_seconds(self) -> int | None:
        """The time between checkpoints; None where steps are counted, or none are made."""
        timed = isinstance(self.save_every, str) and self.saves
        return seconds(str(self.save_every)) if timed else None

    @property
    def saves(self) -> bool:
        """Whether there are checkpoints at all."""
        return self.save_every != NEVER

    @field_validator(
        *("deepspeed", "data_options", "loss_options", "optimizer_options", "lr_schedule_options"),
        *("trackers", "hooks"),
    )
    @classmethod
    def _is_json(cls, value: Any) -> Any:
        return as_json(value)


def field_names() -> list[str]:
    """Every key of the run config, in the order in which it is documented."""
    return list(RunConfig.model_fields)
