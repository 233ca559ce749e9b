"""Refuses configs that no model could make right, with the reason and the nearest thing that works."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dstrain.addresses import refuse_address
from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.lr_schedules import LR_SCHEDULES
from dstrain.optimizers import optimizer_facts
from dstrain.planning.attention import refuse_attention
from dstrain.planning.batch import make_batch
from dstrain.planning.data_checks import DATA_CHECKS
from dstrain.planning.deepspeed.composition import contradictions_of_config
from dstrain.planning.deepspeed.user_keys import mistakes
from dstrain.planning.hook_specs import refuse_profile
from dstrain.planning.layout import count_chunks
from dstrain.planning.partition import WORDS, blocks_of_chunks
from dstrain.planning.recipe_values import fitting_micro_batch
from dstrain.plugins import is_code


@dataclass(frozen=True)
class Refusal:
    """Why a combination is not accepted, and what to do instead."""

    reason: str
    instead: str
    key: str


def refusal_of(
    *,
    zero: int,
    pipeline: int,
    precision: str = "fp32",
    schedule: str = "1f1b",
    offload: str = "none",
) -> Refusal | None:
    """The first reason against a combination of choices, if there is one.

    Source of each reason: measurements with DeepSpeed 0.19.8. What is accepted is trained in
    tests/distributed, row by row.
    """
    if zero == 0 and precision == "bf16":
        return Refusal(
            "bf16 with ZeRO-0 accumulates gradients in bf16 without a pipeline, and can't load its own"
            " checkpoints with one",
            "--zero 1, which keeps fp32 master weights and sends a quarter more bytes",
            "zero",
        )
    if zero == 0 and precision == "fp16":
        return Refusal(
            "DeepSpeed's fp16 with ZeRO-0 does not scale the loss but unscales the gradients: it trains"
            " another model",
            "--zero 1, which scales both",
            "zero",
        )
    if schedule != "1f1b" and pipeline == 1:
        return Refusal(
            f"--schedule {schedule} requires --pipeline 2 or more",
            "--pipeline 2 or more, or --schedule 1f1b",
            "schedule",
        )
    if schedule == "dualpipev" and zero == 3:
        return Refusal(
            "dualpipev alternates the backward passes of a rank's two stages, but DeepSpeed's ZeRO-3"
            " initialises the gradients of both in the first one of a step",
            "--zero 2 with dualpipev, or --schedule 1f1b with --zero 3",
            "schedule",
        )
    if schedule == "zb-h1" and zero == 3:
        return Refusal(
            "zb-h1 computes the gradients of the weights when DeepSpeed's ZeRO-3 has let go of the weights, whose"
            " gradients then fit nothing",
            "--zero 2 with zb-h1, or --schedule 1f1b with --zero 3",
            "schedule",
        )
    if schedule == "zb-h1" and zero == 2 and offload != "none":
        return Refusal(
            "DeepSpeed's ZeRO-2 hands offloaded gradients to the optimizer in the last backward pass of a"
            " step, which with zb-h1 has only those that were put off",
            "--zero 1 with zb-h1 and offload, or --schedule 1f1b",
            "offload",
        )
    if schedule == "dualpipev" and zero == 2 and offload != "none":
        return Refusal(
            "DeepSpeed's ZeRO-2 hands offloaded gradients to the optimizer in the last backward pass of a"
            " step, which with dualpipev covers only one of a rank's two stages",
            "--zero 1 with dualpipev and offload, or --schedule 1f1b",
            "offload",
        )
    if offload != "none" and zero == 0:
        return Refusal(
            "only ZeRO's optimizers can offload their states",
            "--zero 1 (works with one replica too), or --offload none",
            "offload",
        )
    if offload == "nvme" and zero != 3:
        return Refusal(
            "DeepSpeed can offload optimizer states to disk with ZeRO-3 only",
            "--zero 3, or --offload cpu",
            "offload",
        )
    if offload == "nvme" and pipeline > 1:
        return Refusal(
            "with a pipeline, gradients would have to be read back from disk in each step for tied"
            " weights and the gradient norm",
            "--offload cpu, or --pipeline 1",
            "offload",
        )
    return None


def refuse(resolved: ResolvedConfig) -> None:
    """Refuse what no model, data or machine could make right. Raises DstrainError."""
    for error in refusals(resolved):
        raise error


def refusals(resolved: ResolvedConfig) -> list[DstrainError]:
    """All that `refuse` could say of a config: of each kind the first."""
    return [
        *_raised(resolved, _refuse_combination, _refuse_partition),
        *refusals_in_any_layout(resolved),
        *contradictions_of_config(resolved),
    ]


def refusals_in_any_layout(resolved: ResolvedConfig) -> list[DstrainError]:
    """Those of them that no other layout would fix."""
    of_choices = _raised(
        resolved,
        *(partial(_refuse_address, key) for key in _PATHS),
        _refuse_keep_every,
        _refuse_elastic,
        refuse_attention,
        _refuse_nvme,
        *DATA_CHECKS,
        *(partial(_refuse_options, point) for point in _EXTENSION_POINTS),
        refuse_profile,
    )
    return [*of_choices, *mistakes(resolved)]


def _raised(resolved: ResolvedConfig, *checks: Callable[[ResolvedConfig], None]) -> list[DstrainError]:
    found = []
    for check in checks:
        try:
            check(resolved)
        except DstrainError as error:
            found.append(error)
    return found


_PATHS = ("model", "tokenizer", "runs_dir", "nvme_path", "hostfile", "ds_config")


def _refuse_address(key: str, resolved: ResolvedConfig) -> None:
    value = getattr(resolved.config, key)
    if isinstance(value, str):
        hub, written = key in ("model", "tokenizer"), key in ("runs_dir", "nvme_path")
        refuse_address(value, str(resolved.origin(key)), hub=hub, written=written)


def _refuse_combination(resolved: ResolvedConfig) -> None:
    config = resolved.config
    refusal = refusal_of(
        zero=config.zero,
        pipeline=config.pipeline,
        precision=config.precision,
        schedule=config.schedule,
        offload=config.offload,
    )
    if refusal:
        raise DstrainError(refusal.reason, where=str(resolved.origin(refusal.key)), hint=refusal.instead)


def refuse_batch(resolved: ResolvedConfig) -> None:
    """Where the number of replicas is chosen, the batch can be divided without knowing the machines.

    A plan looks at the machines first: whether they hold so many replicas matters more. Raises DstrainError.
    """
    config = resolved.config
    if config.data_parallel is not None:
        make_batch(
            global_batch=config.global_batch,
            micro_batch=fitting_micro_batch(resolved, config.data_parallel),
            data_parallel=config.data_parallel,
            pipeline=config.pipeline,
            seq_len=config.seq_len,
            where=str(resolved.origin("micro_batch")),
            where_global=str(resolved.origin("global_batch")),
        )


def _refuse_nvme(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.offload == "nvme" and not config.nvme_path:
        raise DstrainError(
            "--offload nvme requires nvme_path, a folder on a local disk",
            where=str(resolved.origin("offload")),
            hint="--set nvme_path=/local/disk/folder",
        )


@dataclass(frozen=True)
class _ExtensionPoint:
    """A key that names something built in, or ``module:name`` with options.

    Attributes:
        key: of the config; its options stand in ``KEY_options``.
        what: the user's own, for messages.
        passed: what dstrain itself passes to it.
        takes: the config keys for a built-in one of this name.
    """

    key: str
    what: str
    passed: tuple[str, ...]
    takes: Callable[[str], tuple[str, ...]]


_EXTENSION_POINTS = (
    _ExtensionPoint("loss", "a loss function", ("logits", "labels"), lambda name: ()),
    _ExtensionPoint(
        "optimizer",
        "an optimizer",
        ("params", "lr", "weight_decay"),
        lambda name: ("lr", *optimizer_facts(name).takes),
    ),
    _ExtensionPoint(
        "lr_schedule",
        "a schedule",
        ("step", "steps"),
        lambda name: ("lr", "warmup_steps", *LR_SCHEDULES[name].takes),
    ),
)


def _refuse_options(point: _ExtensionPoint, resolved: ResolvedConfig) -> None:
    """Refuse options of what is built in, and those that dstrain passes itself. Raises DstrainError."""
    name, key = str(getattr(resolved.config, point.key)), f"{point.key}_options"
    options = getattr(resolved.config, key)
    if options and not is_code(name):
        keys = point.takes(name)
        raise DstrainError(
            f"{key} ({', '.join(options)}) are for {point.what} of your own, and {name} takes"
            f" {'keys of the config' if keys else 'none'}",
            where=str(resolved.origin(key, next(iter(options)))),
            hint=f"the keys of {name}: {', '.join(keys)}" if keys else f"remove {key}",
        )
    for passed in point.passed:
        if passed in options:
            raise DstrainError(
                f"{passed} is passed to {name} by dstrain, and can't stand in {key}",
                where=str(resolved.origin(key, passed)),
                hint=f"the config's own key: --set {passed}=..."
                if passed in RunConfig.model_fields
                else "remove it",
            )


def _refuse_keep_every(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.keep_every and not config.saves:
        raise DstrainError(
            "--keep-every can't be combined with save_every: never, which makes no checkpoints",
            where=str(resolved.origin("keep_every")),
            hint="--save-every 0 saves only those and the last one; or remove --keep-every",
        )


def _refuse_elastic(resolved: ResolvedConfig) -> None:
    config = resolved.config
    if config.elastic and not config.restarts:
        raise DstrainError(
            "--elastic requires --restarts N",
            where=str(resolved.origin("elastic")),
            hint="add --restarts N",
        )


def _refuse_partition(resolved: ResolvedConfig) -> None:
    """Refuse a ``partition`` that is neither a word nor a number for each chunk. Raises DstrainError."""
    config = resolved.config
    where = str(resolved.origin("partition"))
    if config.partition in WORDS:
        return
    blocks = blocks_of_chunks(config.partition)
    if blocks is None:
        near = difflib.get_close_matches(config.partition.strip().lower(), WORDS, n=1)
        raise DstrainError(
            f"unknown partition {config.partition!r}",
            where=where,
            hint=(
                f"did you mean {near[0]}?"
                if near
                else "auto, parameters, uniform, or the number of blocks of each stage: 5,5,5,1"
            ),
        )
    chunks = count_chunks(config.pipeline, config.schedule)
    if len(blocks) != chunks:
        each = "two a rank with dualpipev" if chunks > config.pipeline else "one a stage"
        raise DstrainError(
            f"{config.partition} has {_numbers(len(blocks))}, but --pipeline {config.pipeline} needs {chunks} ({each})",
            where=where,
            hint=f"--partition {','.join(['4'] * chunks)} for {4 * chunks} blocks, or --partition auto",
        )
    empty = [chunk for chunk in range(1, chunks - 1) if blocks[chunk] == 0]
    if empty:
        raise DstrainError(
            f"{config.partition} leaves stage {empty[0] + 1} of {chunks} without a layer",
            where=where,
            hint="only the first, which holds the embedding, and the last, which holds the head, may have 0 blocks",
        )


def _numbers(count: int) -> str:
    return f"{count} number{'s' if count != 1 else ''}"
