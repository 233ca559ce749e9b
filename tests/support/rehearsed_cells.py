"""Plans of true size whose ranks are rehearsed: by the tests, and for the table of docs/rehearsed.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import dstrain
from dstrain.api.rehearsing import RehearsalResult
from dstrain.config.files import ds_configs
from dstrain.report.rehearsal import waits_in_a_step
from tests.support.sampling import full, heavy

Effort = Literal["test", "heavy", "full"]

STATED_MODELS: Mapping[str, Mapping[str, Any]] = {
    "llama3.1-8b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "llama-70b": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "tie_word_embeddings": False,
    },
    "gemma2-2b": {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "gpt2-1.5b": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": 50257,
        "n_embd": 1600,
        "n_layer": 48,
        "n_head": 25,
        "n_positions": 1024,
        "tie_word_embeddings": True,
    },
    "gemma3n-e2b": {  # can't be split into stages
        "model_type": "gemma3n_text",
        "architectures": ["Gemma3nForCausalLM"],
        "vocab_size": 262400,
        "vocab_size_per_layer_input": 262144,
        "hidden_size": 2048,
        "hidden_size_per_layer_input": 256,
        "intermediate_size": 8192,
        "num_hidden_layers": 30,
        "num_kv_shared_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "altup_num_inputs": 4,
        "laurel_rank": 64,
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20,
        "tie_word_embeddings": True,
    },
    "roformer": {
        "model_type": "roformer",
        "architectures": ["RoFormerForCausalLM"],
        "vocab_size": 50000,
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "is_decoder": True,
        "tie_word_embeddings": False,
    },
}
"""The ``config.json`` of models that dstrain has no shape of."""


@dataclass(frozen=True)
class RehearsedCell:
    """One plan, and the stages of it that are rehearsed.

    Attributes:
        choices: of `dstrain.load_config`; ``model`` may be one of `STATED_MODELS`.
        waits: the most places in a step where the host may wait for the GPU; None: `usual_waits`.
        stages: those that are rehearsed.
        gpus_per_node: of the plan.
        effort: which of the make targets rehearses it.
        known: the beginning of a difference from the plan that is known; empty where there is none.
    """

    name: str
    choices: dict[str, Any]
    waits: int | None = None
    stages: tuple[int, ...] = (0,)
    gpus_per_node: int = 8
    effort: Effort = "full"
    known: str = ""

    def __str__(self) -> str:
        return self.name

    @property
    def model(self) -> str:
        return str(self.choices["model"])

    @property
    def usual_waits(self) -> int:
        """For loss and gradient norm, which are read together. fp16 looks for an overflow before, and ZeRO-3 waits for
        its reductions in each micro-batch, and once for what it keeps gathered."""
        choices = self.choices
        replicas = choices.get("nodes", 1) * self.gpus_per_node // choices.get("pipeline", 1)
        micro_batches = choices["global_batch"] // (choices["micro_batch"] * replicas)
        fp16 = choices.get("precision") == "fp16"
        return 1 + fp16 + (micro_batches + 1 if choices["zero"] == 3 else 0)


def _cell(name: str, *bases: Mapping[str, Any], **options: Any) -> RehearsedCell:
    options_of_cells = ("waits", "stages", "gpus_per_node", "effort", "known")
    own = {key: options.pop(key) for key in options_of_cells if key in options}
    choices: dict[str, Any] = {}
    for base in bases:
        choices |= base
    return RehearsedCell(name, choices | options, **own)


_1B = {"model": "llama-1b", "seq_len": 2048, "global_batch": 16, "micro_batch": 1}
_1B_4K = {"model": "llama-1b", "seq_len": 4096, "global_batch": 64, "micro_batch": 1}
_8B = {"model": "llama-8b", "seq_len": 4096, "global_batch": 128, "micro_batch": 1, "nodes": 4}
_70B = {"model": "llama-70b", "seq_len": 4096, "global_batch": 128, "micro_batch": 1, "nodes": 8}
_RECOMPUTE = {"activation_checkpointing": True}
_PACKED = {"pack": True}
_32K = {"model": "llama3.1-8b", "seq_len": 32768}
_MIXTRAL = {"model": "mixtral-8x7b", "seq_len": 4096, "global_batch": 128, "micro_batch": 1, "nodes": 8}
_QWEN = {"model": "qwen3-30b-a3b", "seq_len": 4096, "global_batch": 128, "micro_batch": 1, "nodes": 8}
_DUAL = {"schedule": "dualpipev"}
_LORA = {"adapter": {"type": "lora", "r": 16}}
_DORA = {"adapter": {"type": "dora", "r": 16}}


def rehearse_cell(cell: RehearsedCell, folder: Path) -> RehearsalResult:
    """Rehearse it on H100 GPUs, in bf16 where it does not say otherwise.

    Args:
        folder: for its data and its model; data and models of other cells may lie there.
    """
    choices = {**cell.choices, "model": model_of(cell, folder)}
    return rehearse_on_h100(folder, stages=cell.stages, gpus_per_node=cell.gpus_per_node, **choices)


def rehearse_on_h100(
    folder: Path, *, stages: Any = None, gpus_per_node: int = 8, **choices: Any
) -> RehearsalResult:
    """Rehearse a plan on H100 GPUs, in bf16 where the choices do not say otherwise.

    Args:
        folder: for the data, which are enough for long rows.
    """
    data = folder / "text.jsonl"
    if not data.exists():
        text = "what is said here is read by nobody " * 100
        data.write_text("".join(json.dumps({"text": f"{number} {text}"}) + "\n" for number in range(200)))
    flags = {"data": str(data), "tokenizer": "bytes", "precision": "bf16", "validation": 0.1}
    config = dstrain.load_config(**{**flags, **choices})
    return dstrain.rehearse(config, device="h100-80g", gpus_per_node=gpus_per_node, stages=stages)


def by_effort(cells: Sequence[RehearsedCell]) -> list[Any]:
    """The cells as parameters of a test, each for its make target."""
    marked = {"test": lambda cell: [cell], "heavy": heavy, "full": full}
    return [case for cell in cells for case in marked[cell.effort](cell)]


def assert_plan_holds(cell: RehearsedCell, folder: Path) -> None:
    """Rehearse it: all agrees with the plan, and the host waits no more often than is allowed."""
    result = rehearse_cell(cell, folder)
    unknown = [
        difference
        for stage in result.stages
        for difference in stage.differences
        if not (cell.known and difference.startswith(cell.known))
    ]
    assert unknown == []
    for stage in result.stages:
        budget = cell.usual_waits if cell.waits is None else cell.waits
        assert waits_in_a_step(stage) <= budget, [w for w in stage.waits if w["phase"] == "step 2"]


def model_of(cell: RehearsedCell, folder: Path) -> str:
    """What `load_config` takes for the cell's model. What is no shape of dstrain's, or is pretrained, lies in a folder
    below `folder` then, with weights that hold zeros and no room on the disk."""
    name = cell.model
    pretrained = cell.choices.get("init") == "pretrained"
    if name not in STATED_MODELS and not pretrained:
        return str(name)
    place = folder / f"{name}-{'pretrained' if pretrained else 'shape'}"
    if not place.exists():
        place.mkdir(parents=True)
        stated = STATED_MODELS.get(name) or json.loads((ds_configs() / "models" / f"{name}.json").read_text())
        (place / "config.json").write_text(json.dumps(stated))
        if pretrained:
            _write_zeros(place)
    return str(place)


def _write_zeros(folder: Path) -> None:
    """``model.safetensors`` in bf16, as transformers writes it, in a sparse file."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        if name in (model.all_tied_weights_keys or {}):
            continue
        begin, end = end, end + 2 * prod(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


CELLS = [
    _cell("1b-zero1-pp2-dp4", _1B, zero=1, pipeline=2, stages=(1,), effort="test"),
    # The largest gradient, the embedding's, comes when the activations of its micro-batch are gone.
    _cell("1b-zero1-pp2-dp4-first", _1B, zero=1, pipeline=2, effort="heavy"),
    _cell("1b-zero0-pp1-fp32", _1B, zero=0, precision="fp32"),
    _cell("1b-zero1-pp1", _1B, zero=1),
    _cell("1b-zero2-pp1", _1B, zero=2),
    _cell("1b-zero3-pp1", _1B, zero=3),
    _cell("1b-zero1-pp1-recomputing", _1B_4K, _RECOMPUTE, zero=1),
    _cell("1b-zero3-pp1-recomputing", _1B_4K, _RECOMPUTE, zero=3),
    _cell("1b-zero0-pp2-fp32", _1B, zero=0, pipeline=2, precision="fp32", stages=(0, 1)),
    _cell("1b-zero2-pp2", _1B, zero=2, pipeline=2, stages=(0, 1)),
    _cell("1b-zero2-pp2-recomputing", _1B_4K, _RECOMPUTE, zero=2, pipeline=2, stages=(0, 1)),
    _cell("1b-zero3-pp2", _1B, zero=3, pipeline=2, stages=(0, 1)),
    _cell("1b-zero1-pp4", _1B_4K, zero=1, pipeline=4, stages=(0, 3)),
    _cell("1b-zero3-pp4-recomputing", _1B_4K, _RECOMPUTE, zero=3, pipeline=4, stages=(0, 3)),
    _cell("1b-zero1-pp8", _1B_4K, zero=1, pipeline=8, stages=(0, 7)),
    _cell("1b-zero0-pp2-dualpipev", _1B_4K, _DUAL, zero=0, pipeline=2, precision="fp32", stages=(0, 1)),
    _cell("1b-zero1-pp4-dualpipev", _1B_4K, _DUAL, zero=1, pipeline=4, stages=(0, 3)),
    _cell("1b-zero1-pp4-dualpipev-recomputing", _1B_4K, _DUAL, _RECOMPUTE, zero=1, pipeline=4),
    _cell("1b-zero1-pp2-packed", _1B_4K, _PACKED, zero=1, pipeline=2, stages=(0, 1)),
    _cell("1b-zero3-pp1-packed-32k", _1B, _PACKED, _RECOMPUTE, seq_len=32768, zero=3),
    _cell("1b-zero1-pp1-micro-batch-4", _1B_4K, zero=1, micro_batch=4),
    _cell("1b-zero1-pp1-one-micro-batch", _1B, zero=1, global_batch=8),
    _cell("1b-zero2-pp1-one-micro-batch", _1B, zero=2, global_batch=8),
    _cell("1b-zero1-pp2-fp16", _1B, zero=1, pipeline=2, precision="fp16"),
    _cell("1b-zero1-pp1-fp32", _1B, zero=1, precision="fp32"),
    _cell("1b-zero1-pp2-sgd", _1B, zero=1, pipeline=2, optimizer="sgd"),
    _cell("1b-zero1-pp1-frozen-blocks", _1B, zero=1, freeze=["model.layers.[0-7].*"]),
    _cell("1b-zero1-pp2-pretrained", _1B, zero=1, pipeline=2, init="pretrained", effort="heavy"),
    _cell("1b-zero3-pp1-pretrained", _1B, zero=3, init="pretrained"),
    _cell("1b-zero1-pp1-offload", _1B, zero=1, offload="cpu", waits=30),
    _cell("1b-zero2-pp2-offload", _1B, zero=2, pipeline=2, offload="cpu", waits=42),
    _cell("1b-zero3-pp1-offload", _1B, zero=3, offload="cpu", waits=8, effort="heavy"),
    _cell("1b-zero3-pp1-nvme", _1B, zero=3, offload="nvme", nvme_path=".", waits=125),
    _cell("1b-zero1-pp2-lora", _1B, _LORA, zero=1, pipeline=2, stages=(0, 1)),
    _cell("1b-zero1-pp1-lora", _1B, _LORA, zero=1),
    _cell("1b-zero3-pp1-lora", _1B, _LORA, zero=3),
    _cell("1b-zero2-pp1-lora-recomputing", _1B_4K, _LORA, _RECOMPUTE, zero=2),
    _cell("1b-zero1-pp2-dora", _1B, _DORA, zero=1, pipeline=2),
    _cell("8b-zero1-pp2-lora-recomputing", _8B, _LORA, _RECOMPUTE, zero=1, pipeline=2, stages=(0, 1)),
    _cell("8b-zero1-pp4", _8B, zero=1, pipeline=4, stages=(0, 3), effort="heavy"),
    _cell("8b-zero1-pp4-packed", _8B, _PACKED, zero=1, pipeline=4, stages=(1,)),
    _cell("8b-zero2-pp1-recomputing", _8B, _RECOMPUTE, zero=2),
    _cell("8b-zero3-pp1-recomputing", _8B, _RECOMPUTE, zero=3),
    _cell("8b-zero3-pp2-recomputing", _8B, _RECOMPUTE, zero=3, pipeline=2, stages=(0, 1)),
    _cell("8b-zero1-pp8", _8B, zero=1, pipeline=8, stages=(0, 7)),
    _cell("8b-zero1-pp4-dualpipev", _8B, _DUAL, zero=1, pipeline=4, stages=(0, 3)),
    _cell("8b-zero1-pp4-32k", _8B, _32K, _RECOMPUTE, zero=1, pipeline=4, stages=(0, 3), effort="heavy"),
    _cell("8b-zero3-pp1-32k", _8B, _32K, _RECOMPUTE, zero=3),
    _cell("8b-zero1-pp2-pretrained", _8B, _RECOMPUTE, zero=1, pipeline=2, init="pretrained"),
    _cell("70b-zero1-pp8-recomputing", _70B, _RECOMPUTE, zero=1, pipeline=8, stages=(0, 7), effort="heavy"),
    _cell(
        "70b-zero3-pp8-recomputing",
        _70B,
        _RECOMPUTE,
        zero=3,
        pipeline=8,
        known="gathered weights",  # 6 % fewer are gathered than is planned
    ),
    _cell("70b-zero3-pp1-recomputing", _70B, _RECOMPUTE, zero=3),
    _cell("70b-zero1-pp8-dualpipev", _70B, _DUAL, _RECOMPUTE, zero=1, pipeline=8),
    _cell("70b-zero1-pp8-32k", _70B, _RECOMPUTE, seq_len=32768, zero=1, pipeline=8),
    _cell("mixtral-8x7b-zero1-pp8", _MIXTRAL, _RECOMPUTE, zero=1, pipeline=8, stages=(0, 7), effort="heavy"),
    _cell("mixtral-8x7b-zero3-pp1", _MIXTRAL, _RECOMPUTE, zero=3),
    _cell("qwen3-30b-a3b-zero1-pp8", _QWEN, _RECOMPUTE, zero=1, pipeline=8),
    _cell("qwen3-30b-a3b-zero2-pp4", _QWEN, _RECOMPUTE, zero=2, pipeline=4),
    _cell("gemma2-2b-zero1-pp2", _1B_4K, model="gemma2-2b", zero=1, pipeline=2, stages=(0, 1)),
    _cell("gemma3n-e2b-zero2-unsplit", _1B, model="gemma3n-e2b", zero=2),
    _cell(
        "gemma3n-e2b-zero3-unsplit-recomputing",
        _1B,
        _RECOMPUTE,
        model="gemma3n-e2b",
        zero=3,
        known="memory",  # 7 % less is planned: its tied embedding is gathered for both ends at once
    ),
    _cell("roformer-zero1-unsplit", _1B, model="roformer", zero=1, pack=False, waits=7, effort="heavy"),
    _cell("gpt2-1.5b-zero2-pp1", _1B, model="gpt2-1.5b", seq_len=1024, zero=2),
    _cell("gpt2-1.5b-zero1-pp4", _1B, model="gpt2-1.5b", seq_len=1024, zero=1, pipeline=4, stages=(0, 3)),
]
