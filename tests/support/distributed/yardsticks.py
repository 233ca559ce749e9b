"""What layouts are measured with: Hugging Face's own model in a plain loop, and in torch's DDP.

Nothing of dstrain.engine is used here; only the initial weights are dstrain's, from dstrain.model.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F

from dstrain.plugins import is_code
from tests.support.distributed.training import (
    ADAPTERS,
    EPS,
    GLOBAL_BATCH,
    HELD_OUT,
    OWN_CODE,
    OWN_LOSS_OPTIONS,
    OWN_OPTIONS,
    OWN_SCHEDULE_OPTIONS,
    WARMUP_STEPS,
    WEIGHT_DECAY,
    Case,
    Outcome,
    adapter_of,
    model_config,
    samples,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train_in_plain_loop(
    rank: int, case: Case, micro_batch: int | None = None, shuffle: int | None = None
) -> Outcome:
    """One process, gradient accumulation, torch's optimizer; 16-bit precisions with fp32 master weights.

    Args:
        micro_batch, shuffle: how the samples of a step are grouped, and the seed of their order. The
            mathematics is the same for all; only the order of summation differs.
    """
    hf = _hugging_face_model(case)
    master, optimizer = _optimizer_of(hf, case)
    scale = 2.0**case.loss_scale_power if case.precision == "fp16" else 1.0
    outcome = Outcome([], [], {})
    for step in range(1, case.steps + 1):
        batch = samples(step)
        order = torch.arange(GLOBAL_BATCH)
        if shuffle is not None:
            order = torch.randperm(GLOBAL_BATCH, generator=torch.Generator().manual_seed(shuffle + step))
        total = 0.0
        for group in optimizer.param_groups:
            group["lr"] = _lr_of(case, step)
        for rows in order.split(micro_batch or case.micro_batch):
            loss = _loss_of(hf, rows, batch, case.loss)
            (loss * scale).backward()
            total += loss.item()
            for parameter, copy in master.items():  # gradients are accumulated in fp32
                copy.grad = parameter.grad.float() + (0 if copy.grad is None else copy.grad)
                parameter.grad = None
        outcome.losses.append(total)
        if not all(copy.grad.isfinite().all() for copy in master.values()):
            scale /= 2
            outcome.norms.append(float("inf"))
        else:
            for copy in master.values():
                copy.grad /= scale
            norm = torch.nn.utils.clip_grad_norm_(list(master.values()), case.clip or float("inf"))
            optimizer.step()
            outcome.norms.append(norm.item())
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, copy in master.items():
                parameter.copy_(copy)
    return _finished(hf, outcome)


def train_in_ddp(rank: int, case: Case) -> Outcome:
    """torch.nn.parallel.DistributedDataParallel on the plain model, fp32, accumulation by ``no_sync``."""
    hf = _hugging_face_model(case)
    ddp = torch.nn.parallel.DistributedDataParallel(hf)
    master, optimizer = _optimizer_of(hf, case)
    replicas = torch.distributed.get_world_size()
    outcome = Outcome([], [], {})
    for step in range(1, case.steps + 1):
        batch = samples(step)
        parts = torch.arange(GLOBAL_BATCH).view(-1, replicas, case.micro_batch)[:, rank]
        total = torch.zeros(())
        for index, rows in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else ddp.no_sync():
                loss = _loss_of(ddp, rows, batch) * replicas  # DDP averages over replicas
                loss.backward()
            total += loss.detach() / replicas
        torch.distributed.all_reduce(total)
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), case.clip or float("inf"))
        for parameter, copy in master.items():
            copy.grad = parameter.grad
        optimizer.step()
        ddp.zero_grad()
        with torch.no_grad():
            for parameter, copy in master.items():
                parameter.copy_(copy)
        outcome.losses.append(total.item())
        outcome.norms.append(norm.item())
    return _finished(hf, outcome)


def _hugging_face_model(case: Case) -> torch.nn.Module:
    from fnmatch import fnmatchcase

    from transformers import AutoModelForCausalLM

    from dstrain.model.pipeline_model import PipelineModel

    hf = AutoModelForCausalLM.from_config(model_config(case))
    layers = PipelineModel(model_config(case), seed=7)
    initial: dict[str, torch.Tensor] = {}
    for index in range(layers.num_layers):
        initial |= dict(layers.build(index).named_parameters())
    hf.load_state_dict(initial, strict=not case.tied)
    if case.adapter:
        hf = _adapted(_quantized(hf, case), case)
    for name, parameter in hf.named_parameters(remove_duplicate=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(DTYPES[case.precision])
        if any(fnmatchcase(name, pattern) for pattern in case.freeze):
            parameter.requires_grad_(False)
    return hf.train()


def _quantized(hf: torch.nn.Module, case: Case) -> torch.nn.Module:
    """The same as transformers loads it with bitsandbytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    bits = ADAPTERS[case.adapter].get("base")
    if bits is None:
        return hf
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four["bnb_4bit_compute_dtype"] = DTYPES[case.precision]
    options = {"load_in_4bit": True, **four} if bits == "4bit" else {"load_in_8bit": True}
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[case.precision],
            device_map={"": "cpu"},
            quantization_config=BitsAndBytesConfig(**options, llm_int8_threshold=0.0),
        )
    for module in loaded.modules():
        # In a validation on a CPU with bfloat16 it would pack the weights anew for good, and round their scales.
        module.support_avx512bf16_for_cpu = False
    return loaded


def _adapted(hf: torch.nn.Module, case: Case) -> torch.nn.Module:
    """The same in PEFT's hands, with the initial values that dstrain gives the adapters."""
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    from dstrain.lora import is_adapter_parameter, saved_name
    from dstrain.model.adapters import Adapters
    from dstrain.model.pipeline_model import PipelineModel

    section = {"r": 8, "alpha": 8, "targets": "all-linear", "init": "default", **ADAPTERS[case.adapter]}
    adapted = get_peft_model(
        hf,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=section["r"],
            lora_alpha=section["alpha"],
            target_modules=section["targets"],
            exclude_modules=section.get("exclude"),
            modules_to_save=section.get("modules_to_save"),
            rank_pattern=section.get("rank_pattern", {}),
            alpha_pattern=section.get("alpha_pattern", {}),
            use_rslora=section["type"] == "rslora",
            use_dora=section["type"] == "dora",
            init_lora_weights={"default": True}.get(section["init"], section["init"]),
        ),
    )
    config = model_config(case)
    layers = PipelineModel(config, seed=7, adapters=Adapters(config, adapter_of(case), seed=7))
    initial = {
        saved_name(name): parameter.detach().clone()
        for index in range(layers.num_layers)
        for name, parameter in layers.build(index).named_parameters()
        if is_adapter_parameter(name)
    }
    loaded = set_peft_model_state_dict(adapted, initial)
    assert not loaded.unexpected_keys, loaded.unexpected_keys
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert len(initial) == len(trained), trained
    return adapted


def _optimizer_of(
    hf: torch.nn.Module, case: Case
) -> tuple[dict[torch.nn.Parameter, torch.Tensor], torch.optim.Optimizer]:
    """fp32 master weights by model parameter, and their optimizer."""
    master = {p: p.detach().float().clone().requires_grad_() for p in hf.parameters() if p.requires_grad}
    groups = [
        {"params": [c for c in master.values() if c.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [c for c in master.values() if c.ndim < 2], "weight_decay": 0.0},
    ]
    if is_code(case.optimizer):
        return master, _own(case.optimizer)(groups, lr=case.lr, **OWN_OPTIONS)
    if case.optimizer == "adamw":
        return master, torch.optim.AdamW(groups, lr=case.lr, betas=(0.9, 0.95), eps=EPS)
    return master, torch.optim.SGD(groups, lr=case.lr, momentum=case.momentum)


def _own(name: str) -> Any:
    """The code from outside that a case names."""
    sys.path.append(str(OWN_CODE))
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _lr_of(case: Case, step: int) -> float:
    if not case.lr_schedule:
        return case.lr
    if step <= WARMUP_STEPS:
        return case.lr * step / WARMUP_STEPS
    schedule = _own(case.lr_schedule)
    return case.lr * schedule(step - WARMUP_STEPS, case.steps - WARMUP_STEPS, **OWN_SCHEDULE_OPTIONS)


def _loss_of(
    model: torch.nn.Module, rows: torch.Tensor, batch: tuple[torch.Tensor, ...], name: str = "cross-entropy"
) -> torch.Tensor:
    """These rows' part of the mean over all label tokens of the batch. ``name``: of the training loss."""
    ids, positions, labels = batch
    output = model(input_ids=ids[rows], position_ids=positions[rows], use_cache=False)
    logits = output.logits
    wanted, flat = labels[rows].flatten(), logits.flatten(0, 1).float()
    if is_code(name):
        counts = wanted != -100
        total = _own(name)(flat[counts], wanted[counts], **OWN_LOSS_OPTIONS).sum()
    else:
        total = F.cross_entropy(flat, wanted, ignore_index=-100, reduction="sum")
    loss = total / (labels != -100).sum()
    if getattr(output, "aux_loss", None) is not None and model.training:
        loss = loss + model.router_aux_loss_coef * output.aux_loss * len(rows) / GLOBAL_BATCH
    return loss


def _finished(hf: torch.nn.Module, outcome: Outcome) -> Outcome:
    hf.eval()
    with torch.no_grad():
        alone = hf.config.rope_parameters["rope_type"] == "longrope"
        rows = torch.arange(GLOBAL_BATCH).split(1 if alone else GLOBAL_BATCH)
        outcome.validation = sum(_loss_of(hf, part, samples(HELD_OUT)).item() for part in rows)
    outcome.weights = {
        name.removeprefix("base_model.model."): p.detach().float().clone()
        for name, p in hf.named_parameters(remove_duplicate=False)
        if p.requires_grad or not hasattr(hf, "peft_config")
    }
    return outcome
