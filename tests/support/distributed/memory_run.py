"""A short training whose tensors are counted: two steps in any layout through dstrain's engine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from dstrain.planning import buffer_sizes
from dstrain.planning.model_shape import ModelShape, is_frozen
from dstrain.planning.plan import Plan
from dstrain.rehearsal.memory_count import Counted, MemoryCount
from dstrain.rehearsal.memory_owners import held_parameters, note_gradients, optimizer_states, watch_gradients
from tests.support.distributed.layout_case import LayoutCase, plan_on_this_machine
from tests.support.distributed.training import OWN_CODE, measured

VOCABULARY = 1500
MICRO_BATCH = 2


@dataclass(frozen=True)
class MemoryCase(LayoutCase):
    """One layout; the sizes are such that no two dimensions of the model or the batch are equal."""

    tied: bool = False
    momentum: float = 0.9  # with optimizer sgd
    attention: str = "sdpa"
    family: str = "llama"
    seq_len: int = 96
    pack: bool = True
    loss: str = "cross-entropy"
    adapter: str = ""  # to what its base is quantized: none, 4bit, 8bit; empty: the weights are trained
    bucket: int = (
        0  # elements of DeepSpeed's buckets; 0: as the plan says, which is all that a stage here has
    )

    @contextmanager
    def chunks(self) -> Iterator[None]:
        """Let the plan make the logits of so many tokens at a time as ``loss_chunk`` says, if it says something."""
        usual = buffer_sizes.LOGITS
        if self.loss_chunk:
            buffer_sizes.LOGITS = 4 * VOCABULARY * self.loss_chunk
        try:
            yield
        finally:
            buffer_sizes.LOGITS = usual


def model_config(case: MemoryCase) -> Any:
    from transformers import GPT2Config, LlamaConfig

    if case.family == "gpt2":
        return GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=160,
            n_layer=case.layers,
            n_head=5,
            n_positions=256,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=case.tied,
            attn_implementation=case.attention,
        )
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=case.layers,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=1024,
        tie_word_embeddings=case.tied,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=case.attention,
    )


def adapter_of(case: MemoryCase) -> Any:
    from dstrain.lora import Adapter

    return Adapter(r=8, base=None if case.adapter == "none" else case.adapter) if case.adapter else None  # type: ignore[arg-type]


def plan_of(case: MemoryCase) -> tuple[Plan, ModelShape]:
    flags = {
        **case.flags(),
        "global_batch": MICRO_BATCH * case.accumulation * case.data_parallel,
        "micro_batch": MICRO_BATCH,
        "seq_len": case.seq_len,
        "pack": case.pack,
        "attention": case.attention,
        "steps": 3,
        "loss": case.loss,
        "code_dirs": [str(OWN_CODE)],
        "lr": 1e-3,
        "weight_decay": 0.1,
        "gradient_clipping": 1.0,
        "momentum": case.momentum if case.optimizer == "sgd" else 0.0,
    }
    if case.bucket:
        flags["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": case.bucket}}
    if case.adapter:
        flags["adapter"] = adapter_of(case).model_dump()
    shape = ModelShape.from_record(measured(model_config(case), adapter_of(case)))
    with case.chunks():
        return plan_on_this_machine(flags, shape, VOCABULARY), shape


def count(rank: int, case: MemoryCase, traced: bool = False) -> Counted:
    """This rank's tensors in the second step of a training, when the optimizer has its state."""
    from dstrain.engine.build import build_engine, start_communication
    from dstrain.engine.interface import DTYPES, MicroBatch
    from dstrain.model.adapters import Adapters
    from dstrain.model.pipeline_model import PipelineModel
    from dstrain.train.rank_engine import token_loss

    start_communication()
    plan, _ = plan_of(case)
    counter = MemoryCount(VOCABULARY, traced=traced)
    random = torch.Generator().manual_seed(rank)
    section = adapter_of(case)
    model = PipelineModel(
        model_config(case),
        seed=7,
        dtype=DTYPES[case.precision],
        attention=case.attention,
        adapters=Adapters(model_config(case), section, seed=7) if section is not None else None,
    )
    with counter, released_when_done():
        adapter = build_engine(
            model,
            deepspeed=plan.deepspeed,
            cut=plan.layout.cut,
            pipeline=plan.layout.pipeline,
            data_parallel=plan.layout.data_parallel,
            schedule=plan.layout.schedule,
            device=torch.device("cpu"),
            activation_checkpointing=case.checkpointing,
            is_frozen=lambda name: is_frozen(name, case.freeze),
            loss=token_loss(plan.run_config),
            loss_chunk=plan.loss_chunk,
        )
        engine = adapter.engine
        counter.shapes = {torch.Size(getattr(p, "ds_shape", p.shape)) for p in engine.module.parameters()}
        counter.own("parameters", held_parameters(engine))
        watch_gradients(engine, counter)

        def micro_batches() -> list[MicroBatch]:
            """With tensors of their own, as the loader gives them."""
            found = []
            for _ in range(case.accumulation):
                ids = torch.randint(0, VOCABULARY, (MICRO_BATCH, case.seq_len), generator=random)
                found.append(MicroBatch(ids, positions(case), ids, torch.tensor([1e-3])))
            return found

        adapter.train_batch(micro_batches(), 1e-3)
        counter.own("optimizer", optimizer_states(engine))
        note_gradients(engine, counter)
        since = counter.now()
        adapter.train_batch(micro_batches(), 1e-3)
    return counter.counted(since)


@contextmanager
def released_when_done() -> Iterator[None]:
    """Let a collective return when its thread has let go of the tensor, so that what is alive depends on no clock.

    Gloo's thread says first that it is done and drops its reference then: a bucket that the caller has dropped could
    live into what comes next.
    """

    def waiting(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            before = tensor._use_count()  # type: ignore[attr-defined]
            work = collective(tensor, *args, **kwargs)
            end = time.monotonic() + 5
            while work is None and tensor._use_count() > before and time.monotonic() < end:  # type: ignore[attr-defined]
                time.sleep(0)
            return work

        return call

    names = ("all_reduce", "reduce", "broadcast")
    with patch.multiple(dist, **{name: waiting(getattr(dist, name)) for name in names}):
        yield


def positions(case: MemoryCase) -> torch.Tensor:
    """Of one micro-batch: two documents in each row, or with ``pack: false`` one."""
    found = torch.arange(case.seq_len).repeat(MICRO_BATCH, 1)
    if case.pack:
        found[:, case.seq_len // 3 :] -= case.seq_len // 3
    return found
