"""The model and engine of one rank, with the loss and the optimizer that the config names."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch

from dstrain.config.schema import RunConfig
from dstrain.engine.build import build_engine
from dstrain.engine.client_optimizer import ClientOptimizer
from dstrain.engine.interface import DTYPES, Engine
from dstrain.engine.zero3 import zero3_init
from dstrain.model.adapters import Adapters
from dstrain.model.architecture import load_config as load_model_config
from dstrain.model.loss import BUILT_IN, OwnLoss, TokenLoss
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from dstrain.model.weights.pretrained import PretrainedWeights
from dstrain.planning.model_shape import is_frozen
from dstrain.planning.plan import Plan
from dstrain.plugins import is_code, load_plugin


def make_model(plan: Plan) -> PipelineModel | UnsplitModel:
    """The model of a plan. One in one piece has its weights then; of one in layers, each has them when it is built.

    Collective with ZeRO-3 for a model in one piece.
    """
    config = plan.run_config
    options: dict[str, Any] = {
        "seed": config.seed,
        "attention": plan.attention_of_model,
        "dtype": DTYPES[config.precision],
        "weights": PretrainedWeights(plan.model.weights_folder) if config.init == "pretrained" else None,
    }
    model_config = load_model_config(plan.model.file)
    if config.adapter is not None:
        options["adapters"] = Adapters(model_config, config.adapter, seed=config.seed)
    if plan.model.pipelines:
        return PipelineModel(model_config, **options)
    return UnsplitModel(model_config, **options, after_build=zero3_init(plan.deepspeed))


def build_rank_engine(
    plan: Plan,
    model: PipelineModel | UnsplitModel,
    device: torch.device,
    loss: TokenLoss,
    optimizer: ClientOptimizer | None,
    *,
    run: str,
) -> Engine:
    """The engine of a plan on this rank. Collective.

    Args:
        model: of `make_model`.
        run: the run's name.
    """
    config = plan.run_config
    return build_engine(
        model,
        deepspeed=_with_own_swap_folder(plan.deepspeed, run),
        cut=plan.layout.cut,
        pipeline=plan.layout.pipeline,
        data_parallel=plan.layout.data_parallel,
        device=device,
        schedule=plan.layout.schedule,
        activation_checkpointing=config.activation_checkpointing,
        is_frozen=lambda name: is_frozen(name, config.freeze),
        loss=loss,
        loss_chunk=plan.loss_chunk,
        optimizer=optimizer,
    )


def token_loss(config: RunConfig) -> TokenLoss:
    """The loss to train with. Raises PluginError where the user's own can't be loaded."""
    if not is_code(config.loss):
        return TokenLoss(BUILT_IN[config.loss])
    function = load_plugin(config.loss, config.code_dirs or (), what="loss")
    return TokenLoss(OwnLoss(config.loss, function, config.loss_options))


def client_optimizer(config: RunConfig) -> ClientOptimizer | None:
    """The user's own optimizer; None for one of dstrain's. Raises PluginError where it can't be loaded."""
    if not is_code(config.optimizer):
        return None
    return ClientOptimizer(
        config.optimizer,
        load_plugin(config.optimizer, config.code_dirs or (), what="optimizer"),
        config.optimizer_options,
        lr=config.lr,
        weight_decay=config.weight_decay,
    )


def _with_own_swap_folder(deepspeed_config: dict[str, Any], run: str) -> dict[str, Any]:
    """Two runs may name one disk for their optimizer states, whose files DeepSpeed names alike."""
    config = copy.deepcopy(deepspeed_config)
    offload = config["zero_optimization"].get("offload_optimizer", {})
    if offload.get("device") == "nvme":
        offload["nvme_path"] = os.path.join(offload["nvme_path"], run)
        os.makedirs(offload["nvme_path"], exist_ok=True)
    return config
