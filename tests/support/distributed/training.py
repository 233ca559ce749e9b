"""The same small training, in any layout through dstrain's engine; the yardsticks are in `yardsticks`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch

from dstrain.planning.model_shape import ModelShape, is_frozen
from dstrain.planning.plan import Plan
from dstrain.plugins import is_code
from tests.support.distributed.layout_case import LayoutCase, plan_on_this_machine

VOCABULARY = 96
SEQ_LEN = 16
GLOBAL_BATCH = 32
WEIGHT_DECAY = 0.1
# Above the rounding noise of gradients that are all but zero (1e-9 here): Adam would blow it up to whole
# steps, in another direction for each order of summation.
EPS = 1e-5
# At which each optimizer visibly trains this model in these steps.
OWN = "own_optimizers:Momentum"
LR = {"adamw": 1e-3, "sgd": 0.3, OWN: 0.3}
# Of an optimizer from outside.
OWN_CODE = Path(__file__).parents[1] / "own_code"
OWN_OPTIONS = {"beta": 0.8}
# By the name of a case's `adapter`: the config's section. All but two begin with matrices that are not zero: what is
# rounded otherwise in a step would be a larger part of a matrix that is only as large as its steps.
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"type": "lora", "r": 4, "alpha": 16},
    "rslora": {"type": "rslora", "r": 8, "alpha": 8, "init": "gaussian"},
    "full": {"type": "lora", "r": 4, "alpha": 16, "init": "orthogonal"},
    "dora": {"type": "dora", "r": 4, "alpha": 16, "init": "orthogonal"},
    "few": {
        "type": "lora",
        "r": 4,
        "alpha": 64,
        "targets": ["q_proj", "v_proj"],
        "exclude": ["0.self_attn.v_proj"],
        "init": "orthogonal",
    },
    "outer": {
        "type": "lora",
        "r": 4,
        "alpha": 4,
        "targets": ["embed_tokens", "lm_head", "down_proj"],
        "init": "orthogonal",
    },
    "head": {"type": "lora", "r": 4, "alpha": 16, "modules_to_save": ["lm_head"], "init": "orthogonal"},
    "ranks": {
        "type": "lora",
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6},
        "alpha_pattern": {"q_proj": 32},
        "init": "orthogonal",
    },
    "4bit": {"type": "lora", "r": 4, "alpha": 16, "init": "gaussian", "base": "4bit"},
    "8bit": {"type": "lora", "r": 4, "alpha": 16, "init": "gaussian", "base": "8bit"},
}
# What it drops is drawn otherwise than by PEFT: it is compared among layouts.
ADAPTERS["dropout"] = {"type": "lora", "r": 4, "alpha": 16, "dropout": 0.2, "init": "orthogonal"}
ADAPTERS["dropout of the head"] = {**ADAPTERS["dropout"], "targets": ["lm_head", "down_proj"]}
ADAPTERS["dropout, dora"] = {**ADAPTERS["dropout"], "type": "dora"}
BEGIN_WITH_ZERO = ("lora", "rslora", "outer", "4bit", "8bit")  # an embedding has no other values
ADAPTER_LR = {"adamw": 3e-3, "sgd": 0.3}
OWN_LOSS = "own_losses:smoothed"
OWN_LOSS_OPTIONS = {"smoothing": 0.2, "z": 0.02}
OWN_SCHEDULE = "own_schedules:wsd"
OWN_SCHEDULE_OPTIONS = {"decay": 0.75, "last": 12}
WARMUP_STEPS = 2  # with a schedule
# What a layout does wrong shows within a few steps where the bound is 1e-5. In 16 bits the bound is a spread between
# trainings, of which so few steps would tell too little.
STEPS = {"fp32": 10, "bf16": 20, "fp16": 20}


@dataclass(frozen=True)
class Case(LayoutCase):
    """One training. ``clip`` 0.5 bites at every step of this model; 0 does not clip."""

    clip: float = 0.5
    steps: int = 0  # 0: as `STEPS` says
    nvme_path: str = ""
    loss_scale_power: int = 16  # fp16: log2 of the first loss scale
    loss: str = "cross-entropy"
    lr_schedule: str = ""  # empty: every step has the same learning rate
    experts: int = 0  # a Mixtral with so many experts and its router loss, in place of a Llama
    attention: str = "sdpa"
    fused: bool = False  # AdamW in one kernel, as on GPUs
    adapter: str = ""  # of `ADAPTERS`; empty: the weights themselves are trained
    longrope: bool = False  # the longer documents of `samples` get other rotary tables than the shorter ones

    ALWAYS_NAMED: ClassVar[tuple[str, ...]] = (
        *("zero", "pipeline", "data_parallel", "precision", "optimizer", "clip", "tied", "accumulation"),
    )
    NEVER_NAMED: ClassVar[tuple[str, ...]] = ("steps", "nvme_path")

    def __post_init__(self) -> None:
        if not self.steps:
            object.__setattr__(self, "steps", STEPS[self.precision])

    @property
    def micro_batch(self) -> int:
        return GLOBAL_BATCH // (self.accumulation * self.data_parallel)

    @property
    def drops(self) -> bool:
        """Whether its adapter has dropout."""
        return bool(self.adapter) and "dropout" in ADAPTERS[self.adapter]

    @property
    def lr(self) -> float:
        if self.adapter:
            return ADAPTER_LR[self.optimizer]
        return LR[self.optimizer if self.optimizer in LR else OWN]

    def in_one_process(self) -> Case:
        """What the yardstick trains: the same but for the layout."""
        plain = Case()
        layout = ("zero", "pipeline", "data_parallel", "checkpointing", "schedule", "offload", "loss_chunk")
        layout += ("attention",)
        if not self.experts:  # a router loss is the product of two means over a micro-batch
            layout += ("accumulation",)
        plain = replace(self, **{name: getattr(plain, name) for name in layout})
        # Hugging Face takes one table for a micro-batch; a row of `samples` has documents of one length.
        return replace(plain, accumulation=GLOBAL_BATCH) if self.longrope else plain

    def named(self, name: str) -> str:
        return f"clip{self.clip:g}" if name == "clip" else super().named(name)


@dataclass
class Outcome:
    """Loss and gradient norm of each step, a validation loss, the weights at the end by Hugging Face names."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    validation: float = 0.0


def model_config(case: Case, **sizes: int) -> Any:
    """The case's model; ``sizes`` are laid over its own."""
    from transformers import LlamaConfig, MixtralConfig

    family, options = LlamaConfig, {}
    if case.experts:
        options = {
            "num_local_experts": case.experts,
            "output_router_logits": True,
            "router_aux_loss_coef": 0.3,
        }
        family = MixtralConfig
    if case.adapter:
        options["initializer_range"] = 0.2  # through a frozen head of small weights nothing could be learned
    if case.longrope:
        pairs = 4
        options["rope_parameters"] = {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 3 * SEQ_LEN // 4,
            "short_factor": [1.0] * pairs,
            "long_factor": [4.0] * pairs,
        }
    return family(
        **options,
        **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, **sizes},
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
    flags = {
        **case.flags(),
        "gradient_clipping": case.clip,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": case.micro_batch,
        "seq_len": SEQ_LEN,
        "steps": case.steps,
        "lr": case.lr,
        "attention": case.attention,
        "weight_decay": WEIGHT_DECAY,
        "eps": EPS,
        "momentum": case.momentum,
        "loss": case.loss,
        "code_dirs": [str(OWN_CODE)],
    }
    if case.adapter:
        flags["adapter"] = ADAPTERS[case.adapter]
    if is_code(case.optimizer):
        flags["optimizer_options"] = OWN_OPTIONS
    if case.loss == OWN_LOSS:
        flags["loss_options"] = OWN_LOSS_OPTIONS
    if case.lr_schedule:
        flags |= {"lr_schedule": case.lr_schedule, "warmup_steps": WARMUP_STEPS}
    if case.lr_schedule == OWN_SCHEDULE:
        flags["lr_schedule_options"] = OWN_SCHEDULE_OPTIONS
    if case.offload == "nvme":
        flags["nvme_path"] = case.nvme_path
    if case.precision == "fp16":
        flags["deepspeed"] = {"fp16": {"initial_scale_power": case.loss_scale_power, "hysteresis": 1}}
    shape = ModelShape.from_record(measured(model_config(case), adapter_of(case)))
    plan = plan_on_this_machine(flags, shape, VOCABULARY)
    if case.fused:
        plan.deepspeed["optimizer"]["params"]["fused"] = True
    return plan


def adapter_of(case: Case) -> Any:
    """The config's section `adapter`, or None."""
    from dstrain.lora import Adapter

    return Adapter.model_validate(ADAPTERS[case.adapter]) if case.adapter else None


def measured(config: Any, adapter: Any = None) -> dict[str, Any]:
    """The model in numbers. The first rank that asks measures it, and the others read what it found: a fifth of the
    work of many a case is saved."""
    from dstrain.model.measuring.measure import measure

    name = sha256(f"{config.to_json_string()} {adapter}".encode()).hexdigest()
    found = Path(os.environ["DSTRAIN_CACHE"]) / f"{name}.json"
    if not found.exists():
        aside = found.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(measure(config, adapter)))
        aside.rename(found)
    return json.loads(found.read_text())


def samples(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch of a step: input_ids, position_ids, labels [GLOBAL_BATCH, SEQ_LEN].

    Rows hold one or two documents, and from 3 to all of their labels: a mean over micro-batches, or
    over replicas, is not the mean over tokens.
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
    for row in range(0, GLOBAL_BATCH // 2, 2):  # few labels in the first half, most in the second
        labels[row, 3 + row // 2 :] = -100
    return ids, position_ids, labels


HELD_OUT = 9999  # the step whose samples are used for the validation loss


def train_in_layout(
    rank: int,
    case: Case,
    save_to: str | None = None,
    start_from: str | None = None,
    other_layout: bool = False,
) -> Outcome:
    """This rank's part, through dstrain's engine. Saves to, or starts from, a folder where one is named.

    ``other_layout``: another layout than this case's has saved there.
    """
    from dstrain.engine.interface import MicroBatch
    from dstrain.model.document_lengths import document_lengths
    from dstrain.train.batches import row_seeds
    from dstrain.train.lr_schedule import LearningRate

    engine, plan = build_case_engine(case)
    lr_of = LearningRate.of(plan.run_config) if case.lr_schedule else lambda step: case.lr
    first = engine.load(Path(start_from), other_layout=other_layout)["step"] + 1 if start_from else 1
    replica = plan.layout.replica(rank)

    def micro_batches(step: int) -> list[MicroBatch]:
        ids, positions, labels = samples(step)
        weight = case.accumulation * case.data_parallel / int((labels != -100).sum())
        parts = []
        for index in range(case.accumulation):
            start = (index * case.data_parallel + replica) * case.micro_batch
            rows = slice(start, start + case.micro_batch)
            seeds = row_seeds(7, step, range(rows.start, rows.stop)) if case.drops else ()
            documents = document_lengths(positions[rows], seeds) if case.drops else None
            parts.append(
                MicroBatch(ids[rows], positions[rows], labels[rows], torch.tensor([weight]), documents)
            )
        return parts

    def validation_batches() -> list[MicroBatch]:
        """Half as many micro-batches again as in training, padded without labels: any number must do."""
        empty = [replace(m, labels=torch.full_like(m.labels, -100)) for m in micro_batches(HELD_OUT)]
        found = micro_batches(HELD_OUT) + empty[: (len(empty) + 1) // 2]
        more = len(found) / case.accumulation
        return [replace(m, weight=m.weight * more) for m in found]

    outcome = Outcome([], [], {})
    for step in range(first, case.steps + 1):
        result = engine.train_batch(micro_batches(step), lr_of(step))
        outcome.losses.append(result.loss)
        outcome.norms.append(result.grad_norm)
        if step in (first, case.steps):
            engine.check_replicas()
    outcome.validation = engine.eval_loss(validation_batches())
    if save_to:
        Path(save_to).mkdir(parents=True, exist_ok=True)
        engine.save(Path(save_to), {"step": case.steps})
    outcome.weights = dict(engine.weights())
    return outcome


def build_case_engine(case: Case, plan: Plan | None = None) -> tuple[Any, Plan]:
    """The engine of this rank, and the plan that it was built from: the case's own, where none is given."""
    from deepspeed.accelerator import get_accelerator

    from dstrain.engine.build import build_engine, start_communication
    from dstrain.engine.interface import DTYPES
    from dstrain.model.adapters import Adapters
    from dstrain.model.pipeline_model import PipelineModel
    from dstrain.train.rank_engine import client_optimizer, token_loss

    # A CPU may have no fp16 of its own; torch computes in it all the same, only slowly.
    get_accelerator().is_fp16_supported = lambda: True
    start_communication()
    plan = plan or make_case_plan(case)
    adapters = Adapters(model_config(case), adapter_of(case), seed=7) if case.adapter else None
    model = PipelineModel(
        model_config(case),
        seed=7,
        dtype=DTYPES[case.precision],
        attention=case.attention,
        adapters=adapters,
    )
    engine = build_engine(
        model,
        deepspeed=plan.deepspeed,
        cut=plan.layout.cut,
        pipeline=plan.layout.pipeline,
        data_parallel=plan.layout.data_parallel,
        schedule=plan.layout.schedule,
        device=torch.device(get_accelerator().current_device_name()),
        activation_checkpointing=case.checkpointing,
        is_frozen=lambda name: is_frozen(name, case.freeze),
        loss=token_loss(plan.run_config),
        loss_chunk=case.loss_chunk or plan.loss_chunk,
        optimizer=client_optimizer(plan.run_config),
    )
    return engine, plan
