"""A tiny model and a tiny text, for whatever runs the command line."""

from __future__ import annotations

import json
from pathlib import Path

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 256,
}


def write_sums(path: Path) -> Path:
    """Two megabytes of text for models whose numbers do not matter: enough for long rows, held-out ones with them."""
    lines = (f"{number} times {number} is {number * number}.\n" for number in range(60_000))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_materials(folder: Path) -> None:
    """``model/`` (a Llama of 4 layers) and ``text.jsonl`` (40 documents of 200 bytes)."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(LLAMA))
    lines = [json.dumps({"text": f"{n:03d} " + "the quick brown fox. " * 9 + str(n * n)}) for n in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
