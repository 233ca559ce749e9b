"""Families of every kind through the launcher, in two and four stages, against Hugging Face's model in a plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dstrain.config.schema import RunConfig
from dstrain.data.prepare import prepare
from dstrain.data.rows.order import SampleOrder
from dstrain.model.architecture import load_config
from dstrain.model.pipeline_model import PipelineModel
from dstrain.planning.batch import make_batch
from dstrain.runs.run_folder import RunFolder, read_metrics
from dstrain.train.batches import TrainBatches
from tests.support.e2e import Said

pytestmark = pytest.mark.timeout(300)

STEPS, SEQ_LEN, GLOBAL_BATCH, MICRO_BATCH, SEED, LR = 5, 32, 8, 2, 7, 1e-3
# Above the rounding noise of gradients that are all but zero, which Adam would blow up to whole steps.
EPS = 1e-5

COMMON = {"vocab_size": 260, "bos_token_id": None, "eos_token_id": 256, "pad_token_id": None}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MIXED = ["sliding_attention", "full_attention"] * 2
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": {**SIZES, "head_dim": 8},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "attn_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
    },
    "gemma3_text": {**SIZES, "head_dim": 8, "sliding_window": 8, "layer_types": MIXED},
    "mixtral": {**SIZES, "num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.1},
    "deepseek_v3": {
        **SIZES,
        "num_key_value_heads": 4,
        "head_dim": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
    },
    "bloom": {"hidden_size": 32, "n_layer": 4, "n_head": 4, "attention_dropout": 0.0, "hidden_dropout": 0.0},
    "granite": {**SIZES, "embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5},
}

ALONE = {"bloom"}
"""Families whose own code lets packed documents see each other: the plain loop can't be given packed rows."""


def cases() -> list[Any]:
    """Every family tied and untied, in two and in four stages.

    Heavy: each family in four stages, which load what they start from and are exported, tied and untied by turns; and
    two of them in two stages, which start from random weights. The others are for ``make verify-all``: what a family
    computes in stages is compared by `tests.model.test_model_families`.
    """
    heavy = {(family, number % 2 == 0, 4) for number, family in enumerate(FAMILIES)}
    heavy |= {("gpt2", True, 2), ("mixtral", False, 2)}
    return [
        pytest.param(*case, marks=pytest.mark.heavy if case in heavy else pytest.mark.full)
        for case in product(FAMILIES, [True, False], [2, 4])
    ]


@pytest.mark.parametrize(("family", "tied", "pipeline"), cases())
def test_five_steps_are_those_of_the_plain_loop(
    dstrain: Callable[..., Said], place: Path, cache: Path, family: str, tied: bool, pipeline: int
) -> None:
    """Two stages start from random weights; four load a checkpoint in shards, and are exported in the end."""
    source = place / "source"
    source.mkdir()
    choices = {"model_type": family, "tie_word_embeddings": tied, **COMMON, **FAMILIES[family]}
    (source / "config.json").write_text(json.dumps(choices))
    config = load_config(source)
    hf = initial_model(config)
    if pipeline == 4:
        hf.save_pretrained(source, max_shard_size="40KB")
        assert len(keys_on_disk(source)[1]) > 2, "it is to lie in several files"
    settings = {
        "lr_schedule": "constant",
        "warmup_steps": 0,
        "eps": EPS,
        "validation": 0,
        "save_weights": "true",
    }
    settings |= {"save_every": 0, "sample_tokens": 0}
    # Pretrained weights start from a recipe of their own.
    settings |= {"betas": json.dumps(RunConfig().betas), "weight_decay": RunConfig().weight_decay}
    trained = dstrain(
        *("run", "--model", "source", "--data", "text.jsonl", "--tokenizer", "bytes", "--name", "run"),
        *("--init", "pretrained" if pipeline == 4 else "random", "--zero", "1", "--pipeline", str(pipeline)),
        *("--steps", str(STEPS), "--seq-len", str(SEQ_LEN), "--global-batch", str(GLOBAL_BATCH)),
        *("--micro-batch", str(MICRO_BATCH), "--seed", str(SEED), "--lr", str(LR)),
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        "--no-pack" if family in ALONE else "--pack",
    )
    assert trained.code == 0, trained.err
    folder = RunFolder(place / "runs" / "run")
    records = read_metrics(folder.metrics)
    losses, norms = plain_loop(hf, place / "text.jsonl", cache)

    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert [record["loss"] for record in records] == pytest.approx(losses, rel=1e-5)
    assert [record["grad_norm"] for record in records] == pytest.approx(norms, rel=1e-4)
    wanted = {name: p.detach() for name, p in hf.named_parameters(remove_duplicate=False)}
    files = sorted(folder.weights.iterdir())
    assert_close({name: tensor for path in files for name, tensor in load_file(path).items()}, wanted)
    if pipeline == 2:
        return

    exported = dstrain("export", "run", "out", "--no-loss")
    assert exported.code == 0, exported.err
    again = AutoModelForCausalLM.from_pretrained(place / "out", dtype=torch.float32)
    assert_close({name: p.detach() for name, p in again.named_parameters(remove_duplicate=False)}, wanted)
    assert keys_on_disk(place / "out")[0] == keys_on_disk(source)[0]


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) < 1e-6, name


def keys_on_disk(folder: Path) -> tuple[set[str], list[Path]]:
    files = sorted(folder.glob("*.safetensors"))
    names: set[str] = set()
    for path in files:
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names, files


def adamw(hf: PreTrainedModel, choices: RunConfig) -> torch.optim.AdamW:
    """The optimizer of a plain loop: no weight decay on norms and biases."""
    groups = [
        {"params": [p for p in hf.parameters() if p.ndim >= 2], "weight_decay": choices.weight_decay},
        {"params": [p for p in hf.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LR, betas=tuple(choices.betas), eps=EPS)


def initial_model(config: PretrainedConfig) -> PreTrainedModel:
    """Hugging Face's own model with dstrain's initial weights."""
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    layers = PipelineModel(config, seed=SEED, attention="auto")
    initial: dict[str, torch.Tensor] = {}
    for index in range(layers.num_layers):
        initial |= dict(layers.build(index).named_parameters())
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(initial[name])
    return hf


def plain_loop(hf: PreTrainedModel, text: Path, cache: Path) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of one process without dstrain's engine; ``hf`` is trained."""
    rows = prepare(
        str(text), "bytes", SEQ_LEN, 0.0, cache / "data", pack=hf.config.model_type not in ALONE
    ).train
    batch = make_batch(
        global_batch=GLOBAL_BATCH,
        micro_batch=MICRO_BATCH,
        data_parallel=1,
        pipeline=1,
        seq_len=SEQ_LEN,
        where="test",
    )
    batches = TrainBatches(rows, batch, order=SampleOrder(len(rows), GLOBAL_BATCH, SEED), replica=0)
    choices = RunConfig()
    optimizer = adamw(hf, choices)
    takes_positions = hf.config.model_type != "bloom"
    routed = getattr(hf.config, "output_router_logits", False)
    losses, norms = [], []
    for step in range(1, STEPS + 1):
        parts = batches.micro_batches(step)
        tokens = sum(int((part.labels != -100).sum()) for part in parts)
        total = 0.0
        for part in parts:
            positions = {"position_ids": part.position_ids} if takes_positions else {}
            output = hf(input_ids=part.input_ids, use_cache=False, **positions)
            summed = F.cross_entropy(output.logits.flatten(0, 1), part.labels.flatten(), reduction="sum")
            loss = summed / tokens
            if routed:
                loss = loss + hf.router_aux_loss_coef * output.aux_loss / len(parts)
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(hf.parameters(), choices.gradient_clipping)))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms
