"""A training on one rank: what it needs is made, its steps are taken, and its results are written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, TextIO

import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed

from dstrain.config.files import cache_folder
from dstrain.control_group import barrier
from dstrain.data.chat.template import ChatTemplate
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.engine.build import start_communication
from dstrain.engine.interface import Engine
from dstrain.engine.traffic_count import TrafficCount
from dstrain.errors import DstrainError
from dstrain.files import write_json
from dstrain.json_collectives import broadcast_json
from dstrain.planning.plan import Plan
from dstrain.runs.checkpoint.manifest import keep_run_id
from dstrain.runs.protocol import WAITING_FOR_DATA
from dstrain.runs.run_folder import NOTE, RunFolder, last_validation_losses
from dstrain.train.batches import TrainBatches
from dstrain.train.checkpointing.checkpoints import Checkpoints
from dstrain.train.control_client import ControlClient
from dstrain.train.device import be_deterministic, take_device
from dstrain.train.final_output import continuation, save_weights
from dstrain.train.graceful_shutdown import GracefulShutdown
from dstrain.train.hooks import Hooks, start_info
from dstrain.train.host_agreement import check_hosts_agree
from dstrain.train.local_run_folder import record_launch
from dstrain.train.lr_schedule import LearningRate
from dstrain.train.metrics import MetricsFile
from dstrain.train.prefetch import Prefetch
from dstrain.train.rank_engine import build_rank_engine, client_optimizer, make_model, token_loss
from dstrain.train.rank_environment import refuse_another_world
from dstrain.train.run_data import check_model_file, prepare_run_data
from dstrain.train.streams import Streams
from dstrain.train.training_loop import TrainingLoop
from dstrain.train.validation import VALIDATION_LOSS, Validation


def train(folder: RunFolder, console: TextIO | None, control: ControlClient) -> tuple[int, bool]:
    """Train as the run folder's plan says, from its newest checkpoint if there is one; the hooks are told of the end.

    Args:
        folder: holds plan.json; gets metrics, checkpoints and, at the end, result.json.
        console: where rank 0 says a line a step; None on the other ranks.
        control: tells the supervisor of each step, and may ask to stop.

    Returns:
        The last step, and whether it is the run's: the ranks may be asked to leave before.

    Raises:
        DstrainError: what the user can fix (data that changed, a loss that is not a number, a hook that failed).
    """
    hooks = Hooks(lambda line: _say(line, console), control.busy)
    try:
        step, completed = _train(folder, console, control, hooks)
        hooks.ended(step, completed, _result(folder) if completed else {})
    except BaseException as error:
        hooks.failed(error)
        raise
    return step, completed


def _train(
    folder: RunFolder, console: TextIO | None, control: ControlClient, hooks: Hooks
) -> tuple[int, bool]:
    plan = Plan.read(folder.plan)
    config = plan.run_config
    refuse_another_world(plan.layout.world_size, folder, os.environ)
    # Before the ranks meet: a host that lacks something says so by itself, and one that tokenizes takes its time.
    check_model_file(plan)
    data = prepare_run_data(plan)
    if config.deterministic:
        be_deterministic()
    take_device()
    loss = token_loss(config)
    optimizer = client_optimizer(config)
    lr_of = LearningRate.of(config)
    traffic = TrafficCount()
    start_communication(config.communication_timeout_seconds)
    rank = distributed.get_rank()
    replica = plan.layout.replica(rank)
    device = torch.device(get_accelerator().current_device_name())

    check_hosts_agree(folder, plan)
    hooks.load(plan.hooks, config.code_dirs or ())
    leaving = GracefulShutdown(
        lambda: control.asked_to_stop or (rank == 0 and folder.stop_request.exists()),
        config.time_limit_seconds,
    )
    engine = build_rank_engine(plan, make_model(plan), device, loss, optimizer, run=folder.name)
    run_id = _run_id(folder)
    checkpoints = Checkpoints(
        folder.checkpoints,
        keep=config.keep,
        keep_every=config.keep_every,
        background=config.background_save,
        identity=plan.identity,
        run=run_id,
        config=plan.config,
        say=lambda line: _say(line, console),
    )
    first = checkpoints.load_newest(engine) + 1
    if first > 1:
        control.step_ended(first - 1)  # another launch has, and this one is ready to go on
    record_launch(folder, first, device)
    hooks.started(start_info(plan, folder, run_id=run_id, first_step=first, rank=rank))
    metrics = MetricsFile(folder.metrics, after_step=first - 1) if rank == 0 else None

    order = data.order(plan.batch.global_batch, config.seed)
    streams = Streams(data, order, cache_folder() / "streams")
    batches = TrainBatches(data.rows, plan.batch, order=order, replica=replica, seed=plan.run_config.seed)
    validation = Validation(
        data.validation_sets,
        engine,
        plan.batch,
        samples=config.eval_samples,
        replica=replica,
        device=device,
    )
    loop = TrainingLoop(
        plan=plan,
        engine=engine,
        device=device,
        rank=rank,
        lr_of=lr_of,
        traffic=traffic,
        validation=validation,
        checkpoints=checkpoints,
        leaving=leaving,
        control=control,
        hooks=hooks,
        metrics=metrics,
        console=console,
        losses=last_validation_losses(folder.metrics),  # of a run that is resumed at its end
    )
    if first == 1 and validation:
        loop.validate_before_training()
    with (
        hooks.told_of_saves(checkpoints.take_completed),
        checkpoints,  # at its end the last one is complete, and an error lets it be
        Prefetch(
            batches.micro_batches,
            first,
            config.steps,
            device=device,
            late=lambda: control.busy(WAITING_FOR_DATA),
        ) as prefetch,
        streams,
    ):
        if first <= config.steps:
            streams.open(checkpoints.streams)
            control.waits_for = streams.waits_for
        left_after = loop.run(range(first, config.steps + 1), prefetch.take, streams.states)
        control.run_ending()
        if left_after is not None:
            return left_after, False
    if metrics:
        metrics.close()
    if config.save_weights:
        save_weights(engine, folder.weights, plan.layout.stage(rank), replica)
    _finish(folder, plan, engine, data.tokenizer, loop.losses)
    return config.steps, True


def _result(folder: RunFolder) -> dict[str, Any]:
    """What result.json says; on rank 0, which wrote it."""
    if distributed.get_rank() != 0:
        return {}
    result: dict[str, Any] = json.loads(folder.result.read_text(encoding="utf-8"))
    return result


def _run_id(folder: RunFolder) -> str:
    """The run's id on every rank; rank 0 draws it where there is none."""
    drawn = keep_run_id(folder.run_id, folder.checkpoints) if distributed.get_rank() == 0 else ""
    return str(broadcast_json(drawn))


def _say(line: str, console: TextIO | None) -> None:
    """For the user: into this rank's log, and to the command line, which watches for it."""
    with suppress(OSError):  # a full disk under the log
        print(line, flush=True)
    if console:
        console.write(NOTE + line + "\n")


def _finish(
    folder: RunFolder,
    plan: Plan,
    engine: Engine,
    tokenizer: Tokenizer,
    validation_losses: Mapping[str, float],
) -> None:
    """Let the model speak, and leave result.json."""
    config = plan.run_config
    text = None
    if config.sample_tokens:
        text = continuation(
            engine,
            tokenizer,
            _prompt_ids(plan, tokenizer),
            tokens=config.sample_tokens,
            seq_len=config.seq_len,
            micro_batch=plan.batch.micro_batch,
            seed=config.seed,
            stop_tokens=plan.data.stop_tokens,
        )
    if distributed.get_rank() == 0:
        write_json(
            folder.result,
            {
                "steps": config.steps,
                VALIDATION_LOSS: None,
                **validation_losses,
                "prompt": config.prompt,
                "continuation": text,
            },
        )
    barrier()


def _prompt_ids(plan: Plan, tokenizer: Tokenizer) -> list[int]:
    """The prompt as a document begins, or as what a user says."""
    prompt = plan.run_config.prompt
    if not plan.data.chat_template:
        return tokenizer.encode_prompt(prompt)
    template = ChatTemplate(tokenizer, source=plan.data.chat_template, train_on=plan.data.train_on)
    try:
        return template.prompt_ids(prompt)
    except DstrainError:  # it wants a system message, say: no reason to lose a run at its end
        return tokenizer.encode_prompt(prompt)
