"""Counts the FLOPs of each layer's forward pass on the meta device."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dstrain.model.pipeline_split.meta_run import run_on_meta
from dstrain.model.pipeline_split.probe import ProbeRun
from dstrain.model.pipeline_split.structure import ModelStructure, Refused
from dstrain.model.quantization import elements

LENGTH = 256
"""A block is measured at this length and at twice it; recurrent families work in chunks that divide it."""


def flop_counter() -> FlopCounterMode:
    """Counts the products with quantized weights too."""
    products: dict[Any, Any] = {}
    if "bitsandbytes" in sys.modules:
        operators = torch.ops.bitsandbytes
        products = {operators.gemm_4bit: _of_packed_product, operators.int8_scaled_mm: _of_product}
    return FlopCounterMode(display=False, custom_mapping=products)


def _of_packed_product(given: Sequence[int], packed: Any, shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(given) * shape[0]


def _of_product(given: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(given) * weight[0]


def per_token(at_length: float, at_double: float, length: int = LENGTH) -> tuple[float, float]:
    """What a token costs at sequence length S is fixed + share x S: both from totals of two sequences.

    Args:
        at_length, at_double: of a whole sequence of ``length`` tokens, and of twice as many.
    """
    share = max(0.0, (at_double - 2 * at_length) / (2 * length**2))
    return at_double / (2 * length) - share * 2 * length, share


def block_flops(structure: ModelStructure, index: int) -> tuple[int, float]:
    """FLOPs of a block's forward for a token: the fixed part, and attention's for each position of the sequence.

    Attention is counted over the full square of positions, so a sliding window as if it had no end. Where the
    block cannot run on meta: two for each parameter that a token meets, and nothing for attention.
    """
    _, block = structure.blocks[index]
    try:
        fixed, share = per_token(*(_count(structure, index, length) for length in (LENGTH, 2 * LENGTH)))
    except Refused:
        return _by_parameters(block, structure.config), 0.0
    # Where a family loops over the experts that were chosen, none is chosen on meta: count them by
    # parameters.
    experts = expert_flops(block, structure.config) if loops_over_experts(structure) else 0
    return round(fixed) + experts, share


def _count(structure: ModelStructure, index: int, length: int) -> int:
    """FLOPs of a block's forward for one sequence. Raises Refused where it does not run on meta."""
    _, block = structure.blocks[index]
    call = ProbeRun(
        structure, extras=structure.partial_forward.extras, rows=1, length=length, stop_at=index
    ).run()[index]
    counter = flop_counter()
    with counter:
        run_on_meta(copy.deepcopy(block), call, structure.hidden, 1, length)
    return counter.get_total_flops()


def outer_flops_per_token(structure: ModelStructure) -> tuple[int, int]:
    """FLOPs for each token before the blocks, and behind them."""
    trial = _Counted(structure, extras=structure.partial_forward.extras)
    try:
        trial.run()
    except Refused:
        parameters = sum(
            elements(p)
            for m in structure.layer_modules(structure.num_blocks + 1).values()
            for p in m.parameters()
        )
        return 0, 2 * parameters
    tokens = trial.rows * trial.length
    return trial.flops["before"] // tokens, trial.flops["after"] // tokens


class _Counted(ProbeRun):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flops = {"before": 0, "after": 0}

    def on_meta(self, *args: Any) -> Any:
        # Around the stand-in only: around the whole trial the counter's hooks would get between its stand-ins.
        with flop_counter() as counter:
            output = super().on_meta(*args)
        self.flops["after" if self.calls else "before"] += counter.get_total_flops()
        return output


def loops_over_experts(structure: ModelStructure) -> bool:
    """Whether a block runs its chosen experts one by one: on meta then none is."""
    return getattr(structure.config, "_experts_implementation", None) in (None, "eager")


def expert_parameters_met(block: nn.Module, config: Any) -> int:
    """Parameters of the experts that one token meets."""
    chosen, of = _experts_per_token(config)
    return _expert_parameters(block) * chosen // of


def expert_flops(block: nn.Module, config: Any) -> int:
    """Of a token's forward pass in the experts that it meets."""
    return 2 * expert_parameters_met(block, config)


def _by_parameters(block: nn.Module, config: Any) -> int:
    matrices = sum(elements(p) for p in block.parameters() if p.dim() > 1)
    return 2 * (matrices - _expert_parameters(block)) + expert_flops(block, config)


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
