"""Measures a model's shape: parameters and FLOPs of each layer, without its weights.

``python -m dstrain.model.measuring.measure SOURCE OUT.json [ADAPTER.json]`` writes what the plan reads.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from dstrain.child_process import child_main
from dstrain.errors import DstrainError
from dstrain.files import write_atomically
from dstrain.lora import Adapter, base_name
from dstrain.model.adapters import Adapters
from dstrain.model.architecture import load_config
from dstrain.model.capability.attention_support import attention_refusals
from dstrain.model.capability.independence import head_is_tokenwise, judge_packing
from dstrain.model.capability.randomness import (
    adapter_drops_by_layout,
    largest_dropout,
    randomness_beside_dropout,
)
from dstrain.model.measuring.activations import (
    DTYPES,
    Activations,
    MeasuredLayer,
    block_activations,
    blocks_that_run,
    outer_activations,
    saved_of_experts,
)
from dstrain.model.measuring.flops import block_flops, expert_flops, loops_over_experts, outer_flops_per_token
from dstrain.model.measuring.whole_model import measure_whole_model
from dstrain.model.pipeline_split.probe import find_structure
from dstrain.model.pipeline_split.structure import ModelStructure, Refused
from dstrain.model.quantization import bits_of_bitsandbytes, elements, quantized_bytes
from dstrain.model.router import router_coefficient
from dstrain.strict_json import to_json

FORMAT = 15


def measure(config: PretrainedConfig, adapter: Adapter | None = None) -> dict[str, Any]:
    """Measure a causal language model.

    Args:
        adapter: what is trained in place of its parameters: these are in the layers then, by PEFT's names.

    Returns:
        ``format``, ``model_type``, ``hidden_size``, ``vocab_size``, ``max_positions`` (or None), ``layers``
        (each with ``name``, ``kind``, ``parameters``: a tied weight counts in every owner, ``tensors``:
        elements of each parameter by its Hugging Face name, ``quantized``: bytes of those that are,
        ``forward_flops_per_token``: multiply and add are two, ``saved_bytes_per_token``: what the backward pass
        needs, ``working_bytes_per_token``: what the layer takes beside that for a moment, ``given_bytes_per_token``:
        what it is given by the layer before it, in 16 bits and in fp32,
        and all with ``_and_position``: attention's part, to be multiplied by the
        length of the sequence), ``tied`` (``key``,
        ``parameters``, ``layers``: its owners, ``names``: in them), ``total_parameters`` (a tied weight counts once),
        ``bits`` (4bit, 8bit or None: to what the model is quantized), ``pipeline_refusal`` (or None),
        ``dropout`` (the largest probability in the config), ``adapter_drops_by_layout`` and ``randomness`` (see
        ``dstrain.model.capability.randomness``), ``layerdrop`` (with which whole layers are dropped at
        random), ``router_loss`` (whether the loss of its experts' routers is asked for, and the family has one),
        ``tokenwise_head`` (see ``dstrain.model.capability.independence``), ``packing_leak``, ``flash_packing_leak``,
        ``looks_ahead`` and ``row_leak`` (see ``dstrain.model.capability.independence.Packing``),
        ``attention_refusals`` (see ``dstrain.model.capability.attention_support``). For a model that
        cannot be split, the layers are the best guess.

    Raises:
        DstrainError: the model cannot be built.
    """
    structure = find_structure(config)
    adapters = Adapters(structure.config, adapter) if adapter is not None else None
    if adapters is not None:
        run = blocks_that_run(structure)
        structure.add_adapters(adapters)
        for index, why in blocks_that_run(structure).items():
            if why is not None and run[index] is None and adapters.bits is not None:
                raise DstrainError(
                    f"block {index} of this {config.model_type} model does not run with {adapters.bits} weights: {why}",
                    where="adapter.base",
                    hint="leave out adapter.base: the family computes with its weights in a way of its own",
                )
            if why is not None and run[index] is None:
                raise DstrainError(
                    f"PEFT's modules do not run in block {index} of this {config.model_type} model: {why}",
                    where="adapter",
                    hint="adapter.exclude takes modules out that return more than a tensor, such as [router]",
                )
    layers = _layers(structure, adapters)
    packing = judge_packing(config)
    tied = [
        {
            "key": key,
            "parameters": _at(structure, owners[0]).numel(),
            "layers": [index for index, _ in owners],
            "names": [name for _, name in owners],
        }
        for key, owners in structure.tied
    ]
    if not structure.blocks:
        tied = _tied_in_one(structure)
    return {
        "format": FORMAT,
        "model_type": config.model_type,
        "hidden_size": structure.config.hidden_size,
        "vocab_size": structure.config.vocab_size,
        "max_positions": getattr(structure.config, "max_position_embeddings", None),
        "layers": layers,
        "tied": tied,
        "total_parameters": structure.total_parameters,
        "bits": adapters.bits if adapters is not None else bits_of_bitsandbytes(config),
        "pipeline_refusal": structure.refusal,
        "dropout": largest_dropout(structure.config),
        "adapter_drops_by_layout": adapter is not None and adapter_drops_by_layout(config, adapter),
        "randomness": randomness_beside_dropout(config),
        "layerdrop": _layerdrop(structure.config),
        "router_loss": _has_router_loss(config, structure),
        "tokenwise_head": head_is_tokenwise(config),
        "packing_leak": packing.leak,
        "flash_packing_leak": packing.flash_leak,
        "looks_ahead": packing.looks_ahead,
        "row_leak": packing.row_leak,
        "attention_refusals": attention_refusals(config),
    }


def _layers(structure: ModelStructure, adapters: Adapters | None) -> list[dict[str, Any]]:
    if not structure.blocks:
        total = structure.total_parameters
        return [
            _entry(
                "whole",
                "block",
                _tensors_in_one(structure),
                _quantized_in({"": structure.model}),
                total,
                MeasuredLayer(2 * total, 0.0, Activations()),
            )
        ]
    # What belongs to no layer, in models that can't be split: counted with the embedding.
    stranded = {base_name(name): elements(param) for name, param in structure.model.named_parameters()}
    measured = _measured_layers(structure, adapters)
    entries = []
    for index in range(structure.num_blocks + 2):
        modules = structure.layer_modules(index)
        tensors = {
            base_name(f"{path}.{name}"): elements(param)
            for path, module in modules.items()
            for name, param in module.named_parameters()
        }
        count = sum({id(p): elements(p) for m in modules.values() for p in m.parameters()}.values())
        if index == 0:
            count += sum(stranded.values())
            tensors |= stranded
        name = {0: "embed", structure.num_blocks + 1: "head"}.get(index, f"block {index - 1}")
        quantized = _quantized_in(modules)
        entries.append(_entry(name, name.split()[0], tensors, quantized, count, measured[index]))
    return entries


def _quantized_in(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of each quantized weight in modules, which stand at these paths, by its Hugging Face name."""
    return {
        base_name(f"{path}.{name}".lstrip(".")): held
        for path, module in modules.items()
        for name, param in module.named_parameters()
        if (held := quantized_bytes(param)) is not None
    }


def _measured_layers(structure: ModelStructure, adapters: Adapters | None) -> list[MeasuredLayer]:
    """Of [embed, each block, head]: layer by layer, or all together where they can't be separated."""
    if structure.refusal is not None:
        with suppress(Refused):
            whole = measure_whole_model(structure.config, adapters)
            if len(whole) == structure.num_blocks + 2:
                blocks = zip(whole[1:-1], structure.blocks, strict=True)
                return [
                    whole[0],
                    *(_with_experts(structure, each, block) for each, (_, block) in blocks),
                    whole[-1],
                ]
    outer = outer_flops_per_token(structure)
    before, behind = outer_activations(structure)
    known: dict[Any, MeasuredLayer] = {}
    layers = [MeasuredLayer(outer[0], 0.0, before)]
    for index, (_, block) in enumerate(structure.blocks):
        signature = _signature(block)
        if signature not in known:
            known[signature] = MeasuredLayer(
                *block_flops(structure, index), block_activations(structure, index)
            )
        layers.append(known[signature])
    return [*layers, MeasuredLayer(outer[1], 0.0, behind)]


def _with_experts(structure: ModelStructure, measured: MeasuredLayer, block: nn.Module) -> MeasuredLayer:
    """A block whose experts are run one by one, with those that a token meets: on meta none is chosen."""
    if not loops_over_experts(structure):
        return measured
    saved = saved_of_experts(block, structure.config)
    activations = measured.activations
    in_16_bits, in_fp32 = (
        of_others + round(saved * dtype.itemsize)
        for of_others, dtype in zip(activations.saved, DTYPES, strict=True)
    )
    return replace(
        measured,
        flops=measured.flops + expert_flops(block, structure.config),
        activations=replace(activations, saved=(in_16_bits, in_fp32)),
    )


def _tensors_in_one(structure: ModelStructure) -> dict[str, int]:
    """Elements of each parameter by name; 0 under every name but the first of a tied weight."""
    first = {name for name, _ in structure.model.named_parameters()}
    return {
        base_name(name): elements(param) if name in first else 0
        for name, param in structure.model.named_parameters(remove_duplicate=False)
    }


def _tied_in_one(structure: ModelStructure) -> list[dict[str, Any]]:
    """The weights with several names in a model that is measured as one layer."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, param in structure.model.named_parameters(remove_duplicate=False):
        names.setdefault(param, []).append(base_name(name))
    return [
        {"key": alike[0], "parameters": param.numel(), "layers": [0], "names": alike}
        for param, alike in names.items()
        if len(alike) > 1
    ]


def _layerdrop(config: PretrainedConfig) -> float:
    return max(float(getattr(config, name, None) or 0.0) for name in ("layerdrop", "decoder_layerdrop"))


def _has_router_loss(config: PretrainedConfig, structure: ModelStructure) -> bool:
    """Whether training adds a router loss: of the layers, or of a model in one piece, whose family makes it."""
    if structure.refusal is None:
        return structure.router is not None and structure.router.coefficient != 0
    return bool(getattr(config, "output_router_logits", False) and router_coefficient(structure.model))


def _entry(
    name: str,
    kind: str,
    tensors: dict[str, int],
    quantized: dict[str, int],
    parameters: int,
    measured: MeasuredLayer,
) -> dict[str, Any]:
    activations = measured.activations
    return {
        "name": name,
        "kind": kind,
        "parameters": parameters,
        "tensors": tensors,
        "quantized": quantized,
        "forward_flops_per_token": measured.flops,
        "forward_flops_per_token_and_position": measured.flops_of_position,
        "saved_bytes_per_token": list(activations.saved),
        "saved_bytes_per_token_and_position": list(activations.saved_of_position),
        "working_bytes_per_token": list(activations.working),
        "working_bytes_per_token_and_position": list(activations.working_of_position),
        "given_bytes_per_token": list(activations.given),
    }


def _signature(block: nn.Module) -> Any:
    shapes = tuple((name, tuple(param.shape)) for name, param in block.named_parameters())
    return tuple(type(module) for module in block.modules()), shapes


def _at(structure: ModelStructure, owner: tuple[int, str]) -> torch.Tensor:
    index, name = owner
    return next(
        param
        for path, module in structure.layer_modules(index).items()
        for within, param in module.named_parameters(remove_duplicate=False)
        if base_name(f"{path}.{within}") == name
    )


@child_main
def main(arguments: list[str]) -> int:
    """Measure ``SOURCE`` and write ``OUT.json``; the exit code."""
    if len(arguments) not in (2, 3):
        raise DstrainError("usage: python -m dstrain.model.measuring.measure SOURCE OUT.json [ADAPTER.json]")
    source, out, *others = arguments
    adapter = Adapter.model_validate_json(Path(others[0]).read_bytes()) if others else None
    text = to_json(measure(load_config(source), adapter), indent=1)
    write_atomically(Path(out), text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
