"""FLOPs of the layers' forward passes, counted on meta: no weights, no memory."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dstrain.model.anatomy import Anatomy, Refused
from dstrain.model.meta_run import run_on_meta
from dstrain.model.probe import Trial

TOKENS = 128
"""Length of the sequence that a block is measured at; attention's share grows with it."""


def block_flops_per_token(anatomy: Anatomy, index: int) -> int:
    """FLOPs of a block's forward for each of 128 tokens; attention is counted over the full square.

    Where the block cannot run on meta: two for each parameter that a token meets.
    """
    _, block = anatomy.blocks[index]
    try:
        call = Trial(anatomy, extras=anatomy.driver.extras, rows=1, length=TOKENS, stop_at=index).run()[index]
        with FlopCounterMode(display=False) as counter:
            run_on_meta(copy.deepcopy(block), call, anatomy.config.hidden_size, 1, TOKENS)
        counted = counter.get_total_flops() // TOKENS
    except Refused:
        return _by_parameters(block, anatomy.config)
    # Where a family loops over the experts that were chosen, none is chosen on meta: count them by
    # parameters.
    return counted if not _loops_over_experts(anatomy) else counted + _experts(block, anatomy.config)


def outer_flops_per_token(anatomy: Anatomy) -> tuple[int, int]:
    """FLOPs for each token before the blocks, and behind them."""
    trial = _Counted(anatomy, extras=anatomy.driver.extras)
    try:
        trial.run()
    except Refused:
        parameters = sum(
            p.numel() for m in anatomy.layer_modules(anatomy.num_blocks + 1).values() for p in m.parameters()
        )
        return 0, 2 * parameters
    tokens = trial.rows * trial.length
    return trial.flops["before"] // tokens, trial.flops["after"] // tokens


class _Counted(Trial):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flops = {"before": 0, "after": 0}

    def on_meta(self, *args: Any) -> Any:
        # Around the twin only: around the whole trial the counter's hooks would get between its stand-ins.
        with FlopCounterMode(display=False) as counter:
            output = super().on_meta(*args)
        self.flops["after" if self.calls else "before"] += counter.get_total_flops()
        return output


def _loops_over_experts(anatomy: Anatomy) -> bool:
    return getattr(anatomy.config, "_experts_implementation", None) in (None, "eager")


def _experts(block: nn.Module, config: Any) -> int:
    """Two FLOPs for each expert parameter that one token meets."""
    total = _expert_parameters(block)
    chosen, of = _experts_per_token(config)
    return 2 * total * chosen // of


def _by_parameters(block: nn.Module, config: Any) -> int:
    matrices = sum(p.numel() for p in block.parameters() if p.dim() > 1)
    return 2 * (matrices - _expert_parameters(block)) + _experts(block, config)


def _expert_parameters(block: nn.Module) -> int:
    experts = [m for name, m in block.named_modules() if name.rpartition(".")[2] == "experts"]
    return sum(p.numel() for module in experts for p in module.parameters())


def _experts_per_token(config: Any) -> tuple[int, int]:
    chosen = _first(
        config, "num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token", "top_k_experts"
    )
    of = _first(config, "num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")
    return (chosen, of) if chosen and of else (1, 1)


def _first(config: Any, *names: str) -> int:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)
