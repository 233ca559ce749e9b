"""Every family that can be split: adapters in two stages are to the bit those of PEFT's own model.

``make test`` tries each eighth family, ``make verify-all`` all.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, LlamaConfig, MixtralConfig, PretrainedConfig

from dstrain.errors import DstrainError
from dstrain.lora import Adapter, is_adapter_parameter
from dstrain.model.adapters import Adapters
from dstrain.model.capability.small_model import small_family
from dstrain.model.initialise import module_seed
from dstrain.model.measuring.measure import measure
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.pipeline_split.probe import why_not_pipelined
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.adapted_families import difference_to_peft
from tools.models_page import CHOICES, families

FLOOR = 167
"""Families with adapters: never fewer than this."""

STATE_SPACE = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
EXCLUDE: dict[str, Any] = {
    **{
        family: ["out_proj", "conv1d"] for family in STATE_SPACE
    },  # their kernels take these weights for themselves
    **{
        family: ["router"] for family in ("llama4", "llama4_text", "phimoe")
    },  # a linear layer that returns a tuple
    "laguna": ".*shared_experts.*",  # PEFT looks for them under another name than it has saved them
}
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "bos_token_id": None,
    "eos_token_id": None,
}


def small(family: str) -> PretrainedConfig | None:
    """A small model of the family that can be split; None where none can."""
    try:
        config = small_family(CONFIG_MAPPING[family])
        if why_not_pipelined(config) and config.model_type in CHOICES:
            config = small_family(type(config), **CHOICES[config.model_type])
        return config if why_not_pipelined(config) is None else None
    except DstrainError:
        return None


COMPUTE_WITH_WEIGHTS = {
    "4bit": ("falcon_mamba", "jamba", "mamba", "longcat_flash", "dots3_note", "dots3_note_text"),
    "8bit": ("falcon_mamba", "jamba", "mamba", "dots3_note", "dots3_note_text"),
}
"""Families that take the weight of a linear layer for itself, which transformers can't quantize either."""


def tried(names: list[str], base: Any = None) -> int:
    count = 0
    for family in names:
        if (config := small(family)) is not None:
            left_out = EXCLUDE.get(family, [])
            if isinstance(left_out, list):
                left_out = [name for name in left_out if has(config, name)]
            adapter = Adapter(r=4, exclude=left_out, base=base)
            if base is not None and family in COMPUTE_WITH_WEIGHTS[base]:
                with pytest.raises(DstrainError, match=f"does not run with {base} weights"):
                    measure(config, adapter)
                continue
            assert difference_to_peft(config, adapter) == 0, family
            count += 1
    return count


def has(config: PretrainedConfig, name: str) -> bool:
    from dstrain.model.skeleton import empty_model

    return any(f".{known}".endswith(f".{name}") for known, _ in empty_model(config).named_modules())


def test_some_families_are_trained_as_by_peft() -> None:
    assert tried(families()[::8]) >= 15


@pytest.mark.full
def test_all_families_are_trained_as_by_peft() -> None:
    assert tried(families()) >= FLOOR


@pytest.mark.parametrize("base", ["4bit", "8bit"])
def test_some_families_are_trained_as_by_peft_on_quantized_weights(base: str) -> None:
    assert tried(families()[::32], base) >= 4


@pytest.mark.full
@pytest.mark.parametrize("base", ["4bit", "8bit"])
def test_all_families_are_trained_as_by_peft_on_quantized_weights(base: str) -> None:
    assert tried(families(), base) >= FLOOR - 6


@pytest.mark.parametrize(
    "config", [LlamaConfig(**SMALL), MixtralConfig(**SMALL, num_local_experts=4)], ids=["llama", "moe"]
)
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_first_values_depend_on_seed_and_name_alone(config: PretrainedConfig, kind: Any) -> None:
    if kind == "dora" and isinstance(config, MixtralConfig):
        with pytest.raises(DstrainError, match="ParamWrapper"):
            Adapters(config, Adapter(type=kind))
        return
    init: Any = "orthogonal" if isinstance(config, LlamaConfig) else "default"
    found = []
    for order in (1, -1):
        adapters = Adapters(config, Adapter(type=kind, init=init), seed=5)
        model = PipelineModel(config, seed=5, adapters=adapters)
        values: dict[str, torch.Tensor] = {}
        before = torch.get_rng_state()
        for index in range(model.num_layers)[::order]:
            values |= {n: p for n, p in model.build(index).named_parameters() if is_adapter_parameter(n)}
        assert torch.equal(torch.get_rng_state(), before)
        found.append(values)
    whole = UnsplitModel(config, seed=5, adapters=Adapters(config, Adapter(type=kind, init=init), seed=5))
    found.append({n: p for n, p in whole.named_parameters() if is_adapter_parameter(n)})
    other = Adapters(config, Adapter(type=kind, init=init), seed=6)
    again = UnsplitModel(config, seed=5, adapters=other)
    for values in found[1:]:
        assert values.keys() == found[0].keys() == other.trained.keys()
        assert all(torch.equal(value, found[0][name]) for name, value in values.items())
    name = next(name for name in other.trained if "lora_A" in name)
    assert not torch.equal(dict(again.named_parameters())[name], found[0][name])
    trained = {name for name, parameter in whole.named_parameters() if parameter.requires_grad}
    assert trained == set(found[0])


def test_four_parameters_of_one_module_are_adapted_and_drawn_by_their_own_names() -> None:
    """PEFT wraps the module once for each, so that their wrappers are called ``base_layer.base_layer``, and so on."""
    config = small_family(CONFIG_MAPPING["gpt_oss"])
    names = ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
    found = []
    for order in (1, -1):  # of the layers, and of the names in the config
        adapter = Adapter(
            r=4, targets=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in names[::order]]
        )
        assert difference_to_peft(config, adapter) == 0
        model = PipelineModel(config, seed=5, attention="auto", adapters=Adapters(config, adapter, seed=5))
        values: dict[str, torch.Tensor] = {}
        for index in range(model.num_layers)[::order]:
            values |= {n: p for n, p in model.build(index).named_parameters() if is_adapter_parameter(n)}
        found.append(values)
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())
    drawn = {
        name: value
        for name, value in found[0].items()
        if name.startswith("model.layers.0.mlp.experts.") and ".lora_A." in name
    }
    assert len(drawn) == len(names)
    for name, value in drawn.items():
        torch.manual_seed(module_seed(5, name.partition(".lora_A.")[0]))
        again = torch.empty_like(value)
        torch.nn.init.kaiming_uniform_(again, a=5**0.5)
        assert torch.equal(value, again), name


def test_a_model_in_which_pefts_modules_do_not_run_is_refused() -> None:
    config = small_family(CONFIG_MAPPING["phimoe"])
    with pytest.raises(DstrainError, match=r"do not run in block 0 of this phimoe model: .*dtype") as refused:
        measure(config, Adapter())
    assert "[router]" in str(refused.value.hint)
    shape = measure(config, Adapter(exclude=["router"]))
    assert any(is_adapter_parameter(name) for layer in shape["layers"] for name in layer["tensors"])


def test_a_state_space_model_says_what_to_leave_out() -> None:
    config = small_family(CONFIG_MAPPING["mamba"])
    with pytest.raises(DstrainError, match="incompatible") as refused:
        Adapters(config, Adapter())
    assert "out_proj" in str(refused.value.hint) and str(refused.value.hint).startswith("adapter.exclude: [")


def test_the_shape_counts_adapters_and_the_models_own_parameters_by_their_names() -> None:
    config = LlamaConfig(**SMALL, tie_word_embeddings=True)
    plain, adapted = measure(config), measure(config, Adapter(r=4, targets=["q_proj", "lm_head"]))
    of_plain = {name: n for layer in plain["layers"] for name, n in layer["tensors"].items()}
    of_adapted = {name: n for layer in adapted["layers"] for name, n in layer["tensors"].items()}
    own = {name: number for name, number in of_adapted.items() if not is_adapter_parameter(name)}
    assert own == of_plain
    added = sum(of_adapted.values()) - sum(of_plain.values())
    assert added == 2 * (4 * 32 + 32 * 4) + (4 * 32 + 99 * 4)
    assert adapted["total_parameters"] == plain["total_parameters"] + added
    assert adapted["tied"] == plain["tied"]
