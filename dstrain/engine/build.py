"""Builds this rank's process group and engine from a model and a DeepSpeed JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.comm import comm
from deepspeed.constants import default_pg_timeout
from deepspeed.runtime.config import DeepSpeedConfig
from torch import distributed, nn

from dstrain.control_group import barrier, control_group
from dstrain.engine.client_optimizer import ClientOptimizer, group_parameters, hugging_face_name
from dstrain.engine.deepspeed_patches import PatchedEngine
from dstrain.engine.interface import Engine
from dstrain.engine.loopback_store import init_method
from dstrain.engine.pipeline_engine import DualPipeVStagedEngine, StagedEngine, ZeroBubbleEngine
from dstrain.engine.pipeline_module import DualPipeVStagedModule, SingleStageModel, StagedModule
from dstrain.engine.rank_engines import OneStageEngine, PipelinedEngine
from dstrain.engine.safe_unpickling import read_safely
from dstrain.engine.zero3 import zero3_init
from dstrain.model.head_output import HeadOutputRequest
from dstrain.model.loss import TokenLoss
from dstrain.model.pipeline_model import PipelineModel, TiedWeight
from dstrain.model.unsplit_model import UnsplitModel


def build_engine(
    model: PipelineModel | UnsplitModel,
    *,
    deepspeed: dict[str, Any],
    cut: Sequence[int],
    pipeline: int,
    data_parallel: int,
    device: torch.device,
    schedule: str = "1f1b",
    activation_checkpointing: bool = False,
    is_frozen: Callable[[str], bool] = lambda name: False,
    loss: TokenLoss | None = None,
    loss_chunk: int = 0,
    optimizer: ClientOptimizer | None = None,
) -> Engine:
    """This rank's engine. ``torch.distributed`` is initialised by ``deepspeed.init_distributed``.

    Args:
        model: its layers; or, for one stage, a model that can't be split into layers.
        deepspeed: the whole DeepSpeed JSON, as the plan composed it.
        cut: first layer of each stage, and the number of layers at the end.
        pipeline: ranks of one replica. With ``dualpipev`` each holds two stages.
        is_frozen: whether the parameter of a Hugging Face name is not trained.
        loss: to train with; None: the cross-entropy, which evaluations have in any case.
        loss_chunk: tokens whose logits are made at a time for the loss; 0 for all at once.
        optimizer: the user's own; None: that of the JSON.
        activation_checkpointing: for one stage; the pipeline's interval stands in the JSON.

    Raises:
        DstrainError: activations of a model in one piece can't be recomputed, or the optimizer can't be made.
    """
    weight_decay = optimizer.weight_decay if optimizer else deepspeed["optimizer"]["params"]["weight_decay"]
    ties = model.tied if isinstance(model, PipelineModel) else ()
    tied = {f"{layer}.{path}" for weight in ties for layer, path in weight.owners}
    model.to(device)
    if pipeline > 1:
        assert isinstance(model, PipelineModel), "a model in one piece has one stage"
        module_class, engine_class = {
            "1f1b": (StagedModule, StagedEngine),
            "zb-h1": (StagedModule, ZeroBubbleEngine),
            "dualpipev": (DualPipeVStagedModule, DualPipeVStagedEngine),
        }[schedule]
        staged = module_class(
            model, cut=cut, pipeline=pipeline, data_parallel=data_parallel, deepspeed=deepspeed
        )
        if staged.head is not None:
            staged.head.set_loss(loss, loss_chunk)
        _freeze(staged, is_frozen, ties)
        groups = group_parameters(staged.named_parameters(), weight_decay=weight_decay, tied=tied)
        return PipelinedEngine(
            _make(engine_class, staged, groups, deepspeed, staged.mpu(), optimizer), optimizer
        )
    whole: SingleStageModel | UnsplitModel
    head: HeadOutputRequest
    if isinstance(model, PipelineModel):
        model.after_build = zero3_init(deepspeed)
        whole = SingleStageModel(model, activation_checkpointing=activation_checkpointing).to(device)
        head = whole.head
    else:
        whole = head = model
        if activation_checkpointing:
            model.recompute_blocks()
    barrier()  # the training's groups wait for no rank that reads its weights from a slow disk
    head.set_loss(loss, loss_chunk)
    _freeze(whole, is_frozen, ties)
    groups = group_parameters(whole.named_parameters(), weight_decay=weight_decay, tied=tied)
    return OneStageEngine(_make(PatchedEngine, whole, groups, deepspeed, None, optimizer), head, optimizer)


def _freeze(module: nn.Module, is_frozen: Callable[[str], bool], tied: Sequence[TiedWeight]) -> None:
    """Layers are numbered in front of the Hugging Face name; a tied weight is frozen by any of its names."""
    frozen_ties = {
        f"{layer}.{path}"
        for weight in tied
        if any(is_frozen(path) for _, path in weight.owners)
        for layer, path in weight.owners
    }
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if name in frozen_ties or is_frozen(hugging_face_name(name)):
            parameter.requires_grad_(False)


def _make(
    engine_class: type[Any],
    module: nn.Module,
    groups: list[dict[str, Any]],
    deepspeed: dict[str, Any],
    mpu: Any,
    optimizer: ClientOptimizer | None,
) -> Any:
    """As ``deepspeed.initialize`` does, which knows only its own engine classes."""
    document = copy.deepcopy(deepspeed)
    engine = engine_class(
        args=None,
        model=module,
        optimizer=optimizer,
        model_parameters=groups,
        mpu=mpu,
        config=document,
        config_class=DeepSpeedConfig(document, mpu),
    )
    read_safely(engine)
    return engine


def start_communication(timeout: float | None = None) -> None:
    """Initialise ``torch.distributed`` through DeepSpeed, with the rank and address that the launcher gave, and the
    group beside it (`dstrain.control_group`).

    The groups that DeepSpeed makes later get the same timeout; torch would give them 10 minutes with NCCL.

    Args:
        timeout: seconds that a rank waits for others in the training's collectives; None: DeepSpeed's, the minutes of
            DEEPSPEED_TIMEOUT or 10.

    On CPUs DeepSpeed first compiles an all-reduce through shared memory, for about a minute, and keeps
    64 MB in /dev/shm for each rank, which stay there when it is killed. Only inference calls it
    (``deepspeed.comm.inference_all_reduce``): training takes torch's collectives. So it is left out.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    patience = default_pg_timeout if timeout is None else timedelta(seconds=timeout)
    deepspeed.init_distributed(verbose=False, timeout=patience, init_method=init_method())
    comm.cdb.new_group = lambda ranks: distributed.new_group(ranks, timeout=patience)
    control_group()
