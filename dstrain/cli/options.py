"""The flags of run, plan and config: one for each run-config key, and those that pick the layers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


class _StepsOrTime(click.ParamType):
    """Digits are steps; anything else is left to the config, which knows a length of time."""

    name = "steps|time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]+", value) else value


STEPS_OR_TIME = _StepsOrTime()

# (config key, click type, help). A flag that is not given stays None and lays nothing over the file.
_CHOICES: list[tuple[str, Any, str]] = [
    (
        "zero",
        click.IntRange(0, 3),
        "ZeRO stage: what the replicas share out (1 optimizer, 2 gradients, 3 weights).",
    ),
    ("pipeline", click.IntRange(1), "Number of pipeline stages."),
    ("data_parallel", click.IntRange(1), "Number of replicas. Default: what the devices allow."),
    ("partition", str, "Where stages are cut: auto, parameters, uniform, or layers of each: 5,5,5,1."),
    ("precision", click.Choice(["fp32", "bf16", "fp16"]), "Of parameters and activations."),
    ("schedule", click.Choice(["1f1b", "dualpipev"]), "Order of a pipeline's work."),
    ("offload", click.Choice(["none", "cpu", "nvme"]), "Where the optimizer's states live."),
    ("micro_batch", click.IntRange(1), "Samples that a replica works on at once."),
    ("global_batch", click.IntRange(1), "Samples a step, over all replicas."),
    ("seq_len", click.IntRange(1), "Tokens a sample."),
    ("steps", click.IntRange(1), "Optimizer steps."),
    ("lr", float, "Peak learning rate."),
    ("seed", click.IntRange(0), "Decides initial weights, data order and dropout."),
    ("data", str, "A text file, a folder, JSON lines with a `text` field, or stdlib."),
    ("model", str, "A folder with a Hugging Face config.json, a name on its hub, or a built-in shape."),
    ("init", click.Choice(["random", "pretrained"]), "Start from random weights, or from the model's own."),
    ("tokenizer", str, "A Hugging Face tokenizer folder, or bytes. Default: the model's own."),
    (
        "save_every",
        STEPS_OR_TIME,
        "Steps between checkpoints, or time: 500, 20m, 1h30m; 0: only the last; never.",
    ),
    ("keep", click.IntRange(1), "Newest checkpoints that are kept."),
    ("keep_every", click.IntRange(0), "Checkpoints of every so many steps are made, and kept for good."),
    ("hostfile", str, "Hosts to run on, a line each: NAME slots=N."),
    ("launcher", str, "local, pdsh, openmpi, torchrun, slurm or none. Default: what fits the hosts."),
    (
        "nodes",
        click.IntRange(1),
        "With --launcher none: nodes that dstrain is typed on. Of submit: the job's. Of plan --device: how many.",
    ),
    ("processes", click.IntRange(1), "With --launcher none: ranks on each node. Default: its GPUs."),
    ("master_addr", str, "Name or address at which the others reach rank 0's host."),
    ("master_port", click.IntRange(1, 65535), "TCP port of rank 0's host on which the ranks meet."),
    ("restarts", int, "After a failure go on from the newest checkpoint, so often in a row."),
    ("time_limit", str, "After this time (90s, 20m, 3h50m) end the step, save, and leave."),
    ("name", str, "Name of the run folder."),
    ("ds_config", str, "A DeepSpeed JSON file, laid on top of the composed one."),
]


def choices(function: Callable[..., Any]) -> Callable[..., Any]:
    """All flags that set run-config keys; the command gets them as ``**flags``."""
    function = click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any key of the config; deepspeed.A.B=VALUE reaches into DeepSpeed's.",
    )(function)
    function = click.option(
        "--tracker",
        "trackers",
        multiple=True,
        callback=lambda context, option, value: list(value) or None,
        metavar="NAME",
        help="Where metrics go as well: tensorboard, wandb or mlflow. May be given several times.",
    )(function)
    function = click.option(
        "--pack/--no-pack", "pack", default=None, help="Several documents in a sample, or one."
    )(function)
    function = click.option(
        "--elastic/--no-elastic",
        "elastic",
        default=None,
        help="With --restarts: go on with fewer replicas on the hosts that answer.",
    )(function)
    function = click.option(
        "--deterministic/--no-deterministic",
        "deterministic",
        default=None,
        help="The same bits each time on the same kind of device.",
    )(function)
    function = click.option(
        "--activation-checkpointing/--no-activation-checkpointing",
        "activation_checkpointing",
        default=None,
        help="Recompute each block in the backward pass.",
    )(function)
    for key, kind, text in reversed(_CHOICES):
        function = click.option("--" + key.replace("_", "-"), key, type=kind, default=None, help=text)(
            function
        )
    return function


def layers(function: Callable[..., Any]) -> Callable[..., Any]:
    """Where a config starts from: a recipe, a file."""
    function = click.option(
        "--config", "config_file", metavar="FILE", help="A YAML file with these choices."
    )(function)
    return click.option(
        "--recipe", metavar="NAME", help="A recipe of ds_configs/recipes. Default: quickstart."
    )(function)


def node_rank_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which node a command is typed on: of the one who types, not of the run."""
    return click.option(
        "--node-rank",
        type=click.IntRange(0),
        help="With --launcher none: which node this is, from 0 on. Left out: prepare, and say what to type.",
    )(function)


def given(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given."""
    return {key: value for key, value in flags.items() if value is not None}
