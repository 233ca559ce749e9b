"""A model whose documents can't share a sample: refused, and planned with one document a sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from tests.support.e2e import Said

JAMBA = {
    "model_type": "jamba",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "num_experts": 2,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 256,
}


def test_a_recurrent_model(place: Path, dstrain_here: Callable[..., Said]) -> None:
    (place / "jamba").mkdir()
    (place / "jamba" / "config.json").write_text(json.dumps(JAMBA))
    arguments = ["plan", "--model", "jamba", "--data", "text.jsonl", "--seq-len", "128"]
    refused = dstrain_here(*arguments)
    assert refused.code == 2 and refused.err.count("error:") == 1
    for words in ("--model", "jamba lets a document see the ones before it", "--no-pack"):
        assert words in refused.err
    planned = dstrain_here(*arguments, "--no-pack")
    assert planned.code == 0 and not planned.err
    assert "of the tokens are padding" in planned.out
    (shown,) = [line for line in planned.out.splitlines() if line.startswith("pack ")]
    assert "False" in shown
