"""The same small training, once through dstrain's engine in any layout and once in a plain loop."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dstrain.config.loader import load_config
from dstrain.plan.layout import Host
from dstrain.plan.plan import Machines, Plan, make_plan
from dstrain.plan.shape import ModelShape

VOCABULARY = 96
SEQ_LEN = 16
GLOBAL_BATCH = 8
WEIGHT_DECAY = 0.1
# Above the rounding noise of gradients that are all but zero (1e-9 here): Adam would blow it up to whole
# steps, in another direction for each order of summation.
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One training. ``clip`` 0.5 bites at every step of this model; 0 does not clip."""

    zero: int = 0
    pipeline: int = 1
    data_parallel: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    clip: float = 0.5
    tied: bool = True
    micro_batch: int = 1
    checkpointing: bool = False
    schedule: str = "1f1b"
    offload: str = "none"
    steps: int = 10
    layers: int = 4
    lr: float = 1e-2
    extra: tuple[tuple[str, Any], ...] = ()  # further run-config keys

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data_parallel

    @property
    def accumulation(self) -> int:
        return GLOBAL_BATCH // (self.micro_batch * self.data_parallel)

    def one_process(self) -> Case:
        return replace(
            self,
            zero=0,
            pipeline=1,
            data_parallel=1,
            checkpointing=False,
            schedule="1f1b",
            offload="none",
        )

    def __str__(self) -> str:
        parts = [
            f"zero{self.zero}",
            f"pp{self.pipeline}",
            f"dp{self.data_parallel}",
            self.precision,
            self.optimizer,
        ]
        parts += [f"clip{self.clip:g}", "tied" if self.tied else "untied", f"accum{self.accumulation}"]
        if self.checkpointing:
            parts.append("checkpointing")
        parts += [self.schedule] * (self.schedule != "1f1b") + [f"offload={self.offload}"] * (self.offload != "none")
        parts += [f"{key}={value}" for key, value in self.extra]
        return "-".join(parts)


@dataclass
class Outcome:
    """Loss and gradient norm of each step, and the weights at the end by their Hugging Face names."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    held_out: float | None = None
    copies: dict[str, torch.Tensor] | None = None


def model_config(case: Case) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )


def make_case_plan(case: Case) -> Plan:
    """The case's plan, made by the product's own way."""
    from dstrain.model.measure import measure

    flags = {
        "model": "quickstart",
        "zero": case.zero,
        "pipeline": case.pipeline,
        "data_parallel": case.data_parallel,
        "precision": case.precision,
        "optimizer": case.optimizer,
        "gradient_clipping": case.clip,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": case.micro_batch,
        "seq_len": SEQ_LEN,
        "steps": case.steps,
        "lr": case.lr,
        "weight_decay": WEIGHT_DECAY,
        "eps": EPS,
        "schedule": case.schedule,
        "offload": case.offload,
        "activation_checkpointing": case.checkpointing,
        **dict(case.extra),
    }
    shape = ModelShape.from_record(measure(model_config(case)))
    data = {"train_rows": 10_000, "held_out_rows": 100, "vocab_size": VOCABULARY, "fingerprint": "test"}
    return make_plan(load_config(flags=flags), Machines((Host("localhost", 0),), "cpu"), shape, data, "test")


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch of a step: input_ids, position_ids, labels [GLOBAL_BATCH, SEQ_LEN].

    Rows hold one or two documents, and from 3 to all of their labels: a mean over micro-batches is
    not the mean over tokens.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, 1), generator=generator)
    for _ in range(SEQ_LEN - 1):  # each token follows from the one before: there is something to learn
        ids = torch.cat([ids, (5 * ids[:, -1:] + 3) % VOCABULARY], dim=1)
    position_ids = torch.arange(SEQ_LEN).repeat(GLOBAL_BATCH, 1)
    position_ids[1::3, SEQ_LEN // 2 :] -= SEQ_LEN // 2
    labels = torch.roll(ids, -1, dims=1)
    labels[:, -1] = -100
    labels[position_ids == 0] = -100
    for row in range(0, GLOBAL_BATCH, 2):
        labels[row, 3 + row :] = -100
    return ids, position_ids, labels


def train_in_layout(
    rank: int, case: Case, checkpoint: str | None = None, resume: str | None = None
) -> Outcome:
    """Through dstrain's engine: this rank's part. Saves to / starts from a folder where one is named."""
    import deepspeed

    from dstrain.engine.build import build_engine
    from dstrain.engine.interface import MicroBatch
    from dstrain.model.layers import LayeredModel

    from deepspeed.accelerator import get_accelerator

    # This CPU may have no fp16 of its own; torch computes in it all the same, only slowly.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(verbose=False)
    plan = make_case_plan(case)
    model = LayeredModel(model_config(case), seed=7)
    engine = build_engine(
        model,
        deepspeed=plan.deepspeed,
        cut=plan.layout.cut,
        pipeline=plan.layout.pipeline,
        schedule=plan.layout.schedule,
        data_parallel=plan.layout.data_parallel,
        device=torch.device("cpu"),
        activation_checkpointing=case.checkpointing,
    )
    first = engine.load(Path(resume))["step"] + 1 if resume else 1
    replica = plan.layout.replica(rank)

    def micro_batches(step: int) -> list[MicroBatch]:
        ids, positions, labels = samples(step)
        weight = case.accumulation * case.data_parallel / int((labels != -100).sum())
        parts = []
        for index in range(case.accumulation):
            start = (index * case.data_parallel + replica) * case.micro_batch
            rows = slice(start, start + case.micro_batch)
            parts.append(MicroBatch(ids[rows], positions[rows], labels[rows], torch.tensor([weight])))
        return parts

    outcome = Outcome([], [], {})
    for step in range(first, case.steps + 1):
        result = engine.train_batch(micro_batches(step), case.lr)
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
    outcome.held_out = engine.eval_loss(micro_batches(9999))
    if checkpoint:
        Path(checkpoint).mkdir(parents=True, exist_ok=True)
        engine.save(Path(checkpoint), {"step": case.steps})
    outcome.weights = local_weights(engine)
    return outcome


def local_weights(engine: Any) -> dict[str, torch.Tensor]:
    """This rank's parameters in fp32 by their Hugging Face names (gathered, under ZeRO-3)."""
    import deepspeed

    module = engine.engine.module
    found = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            found[name.split(".", 1)[1]] = parameter.detach().float().clone()
    return found


def train_in_plain_loop(rank: int, case: Case) -> Outcome:
    """The yardstick: Hugging Face's own model in one process, gradient accumulation, torch's optimizer.

    Nothing of dstrain.engine is used; the initial weights are the layers' own.
    """
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from dstrain.model.layers import LayeredModel

    hf = AutoModelForCausalLM.from_config(model_config(case))
    layers = LayeredModel(model_config(case), seed=7)
    initial = {}
    for index in range(layers.num_layers):
        initial |= dict(layers.build(index).named_parameters())
    hf.load_state_dict(initial, strict=not case.tied)
    hf.train()
    decay = [p for p in hf.parameters() if p.ndim >= 2]
    rest = [p for p in hf.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}]
    if case.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=case.lr, betas=(0.9, 0.95), eps=EPS)
    else:
        optimizer = torch.optim.SGD(groups, lr=case.lr)

    def loss_of(rows: slice, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        ids, positions, labels = batch
        logits = hf(input_ids=ids[rows], position_ids=positions[rows], use_cache=False).logits
        total = F.cross_entropy(
            logits.flatten(0, 1).float(), labels[rows].flatten(), ignore_index=-100, reduction="sum"
        )
        return total / (labels != -100).sum()

    outcome = Outcome([], [], {})
    for step in range(1, case.steps + 1):
        batch = samples(step)
        total = 0.0
        for start in range(0, GLOBAL_BATCH, case.micro_batch):
            loss = loss_of(slice(start, start + case.micro_batch), batch)
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), case.clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        outcome.losses.append(total)
        outcome.norms.append(float(norm))
    hf.eval()
    with torch.no_grad():
        outcome.held_out = float(loss_of(slice(0, GLOBAL_BATCH), samples(9999)))
    outcome.weights = {name: p.detach().clone() for name, p in hf.named_parameters(remove_duplicate=False)}
    return outcome
