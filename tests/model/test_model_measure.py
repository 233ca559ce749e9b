"""The measurement agrees with the models themselves."""

from __future__ import annotations

import json

import pytest
import torch
from test_model_probe import _gemma3n
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_flatten
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from dstrain.model.architecture import load_config
from dstrain.model.capability.small_model import small_family
from dstrain.model.measuring.measure import FORMAT, main, measure
from dstrain.model.pipeline_split.probe import find_structure
from tests.support.model_families import FAMILIES, tiny


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
    assert layers[0]["forward_flops_per_token"] == 0
    assert layers[1]["forward_flops_per_token"] == 2 * matrices
    # scores and values, over the full square of positions
    assert layers[1]["forward_flops_per_token_and_position"] == 4 * 32
    assert layers[-1]["forward_flops_per_token"] == 2 * 32 * 99
    assert layers[-1]["forward_flops_per_token_and_position"] == 0


def test_built_in_llama_1b():
    """The numbers that tests/unit/test_stage_time.py cuts by."""
    embed, *blocks, head = measure(load_config("ds_configs/models/llama-1b.json"))["layers"]
    vocabulary, hidden, inner = 128_256, 2048, 8192
    matrices = 2 * hidden * hidden + 2 * hidden * 512 + 3 * hidden * inner
    assert [embed["forward_flops_per_token"], head["forward_flops_per_token"]] == [0, 2 * hidden * vocabulary]
    for block in blocks:
        assert block["parameters"] == matrices + 2 * hidden == 60_821_504
        assert block["forward_flops_per_token"] == 2 * matrices == 121_634_816
        assert block["forward_flops_per_token_and_position"] == 4 * hidden
        assert block["saved_bytes_per_token"] == [108_680, 200_840]
        assert block["saved_bytes_per_token_and_position"] == [0, 0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "qwen3", "opt", "olmo2", "mixtral"])
def test_saved_bytes_are_those_of_a_real_forward(name):
    """On CPU with weights, in fp32: what autograd keeps of a block, beside weights and what all blocks share."""
    config = tiny(name)
    length = 64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    block = find_structure(config).blocks[1][0]
    kept, shared, inside = {}, set(), False

    def note(tensor):
        if inside:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    def enter(_, args, kwargs):
        nonlocal inside
        given = [x for x in tree_flatten(kwargs)[0] if isinstance(x, torch.Tensor)]
        shared.update(x.untyped_storage()._cdata for x in given)
        inside = True

    def leave(*_):
        nonlocal inside
        inside = False

    module = model.get_submodule(block)
    shared.update(x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers()))
    module.register_forward_pre_hook(enter, with_kwargs=True)
    module.register_forward_hook(leave)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        model(input_ids=torch.zeros(2, length, dtype=torch.long), use_cache=False)
    real = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in shared) / (2 * length)
    layer = measure(config)["layers"][2]
    found = layer["saved_bytes_per_token"][1] + length * layer["saved_bytes_per_token_and_position"][1]
    assert found == pytest.approx(real, rel=0.1)


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


def test_a_model_in_one_piece_names_its_parameters():
    """So that a pattern for parameters to freeze can be checked. A second name of a tied weight has no elements."""
    config = tiny("opt", layerdrop=0.1)
    found = measure(config)
    model = AutoModelForCausalLM.from_config(config)
    [whole] = found["layers"]
    assert "layerdrop" in found["pipeline_refusal"]
    assert set(whole["tensors"]) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert sum(whole["tensors"].values()) == whole["parameters"] == model.num_parameters()
    names = ["model.decoder.embed_tokens.weight", "lm_head.weight"]
    [tied] = found["tied"]
    assert sorted(tied["names"]) == sorted(names) and tied["layers"] == [0]


def test_no_parameter_is_left_out_of_a_model_that_cannot_be_split():
    config = _gemma3n()
    named = {name for layer in measure(config)["layers"] for name in layer["tensors"]}
    model = AutoModelForCausalLM.from_config(config)
    assert named >= {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(("values", "expected"), [({}, 0.0), ({"layerdrop": 0.1}, 0.1)])
def test_layers_dropped_at_random(values, expected):
    assert measure(tiny("opt", **values))["layerdrop"] == expected


def test_the_router_loss_is_told_where_it_is_asked_for():
    def told(config):
        return measure(config)["router_loss"]

    assert told(tiny("mixtral", output_router_logits=True))
    assert not told(tiny("mixtral", output_router_logits=True, router_aux_loss_coef=0.0))
    assert not told(tiny("mixtral")) and not told(tiny("llama", output_router_logits=True))
    doge = small_family(CONFIG_MAPPING["doge"], is_moe=True, output_router_logits=True)
    found = measure(doge)  # of another kind: the model stays in one piece, and its family adds the loss
    assert found["pipeline_refusal"] and found["router_loss"]


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


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_the_attention_that_a_config_names_does_not_override_the_run_s(key, tmp_path):
    """As people and older versions of transformers write it; of a part of the model too."""
    values = json.loads(CONFIG_MAPPING["llama"](num_hidden_layers=1).to_json_string(False))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values | {key: "flash_attention_2", "rope_scaling": None}))
    config = load_config(path)
    assert config._attn_implementation != "flash_attention_2"
    assert "flash_attention_2" not in config.to_json_string(use_diff=False)
