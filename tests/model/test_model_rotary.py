"""Rotary tables that depend on the length: each document gets those that Hugging Face gives it alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dstrain.model.capability.independence import judge_packing
from dstrain.model.capability.trial_model import trial_model
from dstrain.model.document_masks import Documents
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.model_families import tiny

FACTORS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "short_mscale": 1.0,
        "long_mscale": 1.2,
    },
    "llama3": {
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8,
    },
    "proportional": {"factor": 4.0},
}
DEPENDING = "dynamic", "longrope"
LENGTHS = 12, 5, 9, 3
IDS = torch.randint(3, 99, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
POSITIONS = torch.stack([torch.cat([torch.arange(length) for length in LENGTHS]), torch.arange(sum(LENGTHS))])
"""A row of four documents, and one of a longer one."""


def config_of(family: str, kind: str) -> PretrainedConfig:
    config = tiny(family)
    values = {"rope_theta": 10000.0, "rope_type": kind, **FACTORS[kind]}
    for name in ("short_factor", "long_factor"):
        if name in values and hasattr(config, "qk_rope_head_dim"):
            values[name] = values[name][: config.qk_rope_head_dim // 2]
    if any(isinstance(value, dict) for value in config.rope_parameters.values()):
        config.rope_parameters = {name: dict(values) for name in config.rope_parameters}
    else:
        config.rope_parameters = values
    if kind == "dynamic":
        config.max_position_embeddings = 8
    return config


def test_all_types_are_tried():
    assert {*FACTORS} == {"default", *ROPE_INIT_FUNCTIONS}


def alone(model: UnsplitModel, config: PretrainedConfig) -> Tensor:
    """What Hugging Face's own model computes for each document in a batch of its own, made anew for each."""

    def logits(ids: Tensor) -> Tensor:
        own = AutoModelForCausalLM.from_config(config).eval()
        own.load_state_dict(model.state_dict(), strict=False)
        result: Tensor = own(input_ids=ids, use_cache=False).logits
        return result

    first = torch.cat([logits(part) for part in IDS[:1].split(LENGTHS, dim=1)], dim=1)
    return torch.cat([first, logits(IDS[1:])])


@torch.no_grad()
@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "deepseek_v3"])
def test_a_document_gets_the_tables_that_it_gets_alone(family, kind):
    config = config_of(family, kind)
    model = trial_model(config)
    wanted = alone(model, config)
    for _ in range(2):  # not those of what the module has met before either
        torch.testing.assert_close(model((IDS, POSITIONS)), wanted, rtol=0, atol=2e-5)
    rows = [model((IDS[row : row + 1], POSITIONS[row : row + 1])) for row in range(2)]
    torch.testing.assert_close(torch.cat(rows), wanted, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", DEPENDING)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_in_stages_too(family, kind):
    config = config_of(family, kind)
    whole = UnsplitModel(config, seed=0).eval()((IDS, POSITIONS))
    stages = [PipelineModel(config, seed=0) for _ in range(2)]
    count = stages[0].num_layers
    state: Any = (IDS, POSITIONS)
    for index in range(count):
        state = stages[index >= count // 2].build(index).eval()(state)
    torch.testing.assert_close(state, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", FACTORS)
def test_the_check_finds_what_looks_at_the_longest_document(kind, monkeypatch):
    config = tiny("llama")
    config.rope_parameters = config_of("llama", kind).rope_parameters
    found = judge_packing(config)
    assert (found.leak, found.row_leak) == (None, None)
    monkeypatch.setattr("dstrain.model.document_masks.rotary_tables_by_document", lambda model: None)
    found = judge_packing(config)
    if kind in DEPENDING:
        assert found.leak and "the same document alone" in found.leak
        assert found.row_leak and "beside another one in a micro-batch" in found.row_leak
    else:
        assert (found.leak, found.row_leak) == (None, None)


class TestOtherLeaks:
    """Faults of other kinds that a family may have, put into llama."""

    def judged(self, monkeypatch: pytest.MonkeyPatch, change: Any) -> Any:
        original = UnsplitModel.forward
        monkeypatch.setattr(
            UnsplitModel, "forward", lambda model, inputs: change(model, original(model, inputs), inputs)
        )
        return judge_packing(tiny("llama"))

    def test_a_mean_over_the_micro_batch(self, monkeypatch):
        found = self.judged(monkeypatch, lambda model, logits, _: logits - 0.01 * logits.mean())
        assert found.row_leak and "beside another one" in found.row_leak

    def test_normalising_over_the_batch_in_training_alone(self, monkeypatch):
        def normalise(model: UnsplitModel, logits: Tensor, _: Any) -> Tensor:
            return logits / logits.std() if model.training else logits

        assert self.judged(monkeypatch, normalise).row_leak

    def test_what_is_kept_from_micro_batches_before(self, monkeypatch):
        def remember(model: UnsplitModel, logits: Tensor, inputs: tuple[Tensor, Tensor]) -> Tensor:
            longest = max(model.__dict__.get("longest", 0), int(inputs[1].max()))
            model.__dict__["longest"] = longest
            return logits * (1 + longest / 100)

        found = self.judged(monkeypatch, remember)
        assert found.row_leak and "after other ones than at first" in found.row_leak

    def test_the_largest_position_of_the_micro_batch(self, monkeypatch):
        found = self.judged(
            monkeypatch, lambda model, logits, inputs: logits * (2 if inputs[1].max() >= 16 else 1)
        )
        assert found.row_leak and found.leak


def test_modules_of_other_types_are_left_alone():
    model = UnsplitModel(config_of("llama", "llama3"), seed=0)
    assert not any(module._forward_hooks for module in model.modules())
    hooked = UnsplitModel(config_of("llama", "longrope"), seed=0)
    assert sum(bool(module._forward_hooks) for module in hooked.modules()) == 1
    Documents(hooked._model)
