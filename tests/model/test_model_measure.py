"""The measurement agrees with the models themselves."""

from __future__ import annotations

import json

import pytest
from families import FAMILIES, tiny
from test_model_probe import _gemma3n
from transformers import AutoModelForCausalLM

from dstrain.model.measure import FORMAT, main, measure


@pytest.mark.parametrize("name", FAMILIES)
def test_totals_are_hugging_face_s(name):
    config = tiny(name)
    found = measure(config)
    model = AutoModelForCausalLM.from_config(config)
    assert found["total_parameters"] == model.num_parameters()
    repeated = sum(tied["parameters"] * (len(tied["layers"]) - 1) for tied in found["tied"])
    assert sum(layer["parameters"] for layer in found["layers"]) == model.num_parameters() + repeated
    assert [layer["kind"] for layer in found["layers"]] == ["embed", *["block"] * 4, "head"]
    assert found["pipeline_refusal"] is None
    assert all(layer["forward_flops_per_token"] > 0 for layer in found["layers"][1:])


def test_flops_of_llama():
    layers = measure(tiny("llama"))["layers"]
    matrices = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    attention = 4 * 128 * 32  # scores and values, over the full square of 128 tokens
    assert layers[0]["forward_flops_per_token"] == 0
    assert layers[1]["forward_flops_per_token"] == 2 * matrices + attention
    assert layers[-1]["forward_flops_per_token"] == 2 * 32 * 99


def test_experts_count_as_often_as_they_are_met():
    few, many = (measure(tiny("mixtral", num_experts_per_tok=k))["layers"][1] for k in (1, 2))
    assert many["forward_flops_per_token"] - few["forward_flops_per_token"] == 2 * 3 * 32 * 64
    assert few["parameters"] == many["parameters"]


def test_a_model_that_cannot_be_split_is_measured_too():
    config = _gemma3n()
    found = measure(config)
    assert found["pipeline_refusal"]
    assert found["total_parameters"] == AutoModelForCausalLM.from_config(config).num_parameters()
    assert len(found["layers"]) == 6


def test_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny("llama-tied").to_dict()))
    assert main([str(tmp_path), str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    key = "model.embed_tokens.weight"
    names = [key, "lm_head.weight"]
    assert found["tied"] == [{"key": key, "parameters": 99 * 32, "layers": [0, 5], "names": names}]
    assert (found["format"], found["max_positions"]) == (FORMAT, 64)
    assert main([str(tmp_path / "nowhere"), str(tmp_path / "out.json")]) == 2
    assert "no such model configuration" in capsys.readouterr().err
    assert main([str(tmp_path), str(tmp_path / "no" / "folder.json")]) == 2
    assert main([]) == 2
