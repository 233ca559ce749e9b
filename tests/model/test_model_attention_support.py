"""Which attention implementations a family has is found by trying, before a rank does."""

from __future__ import annotations

import pytest
from transformers import CONFIG_MAPPING

from dstrain.errors import DstrainError
from dstrain.model.capability import attention_support
from dstrain.model.capability.attention_support import attention_refusals
from dstrain.model.capability.small_model import small_family
from dstrain.model.capability.trial_model import small_trial
from dstrain.model.pipeline_split.probe import find_structure
from dstrain.model.skeleton import empty_model
from dstrain.model.varlen_attention import VARLEN

FLASH = {"flash_attention_2", "flash_attention_3"}


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("llama", set()),
        ("qwen3", set()),
        ("gemma2", {"sdpa", VARLEN}),
        ("gpt_oss", {"sdpa", VARLEN}),
        ("gpt2", {"flex_attention"}),
        ("falcon", {"flex_attention", VARLEN}),
        ("gpt_neo", {"sdpa", "flex_attention", VARLEN}),
        ("bloom", {"sdpa", "flex_attention", VARLEN} | FLASH),
        ("mamba", {"sdpa", "flex_attention", VARLEN} | FLASH),
    ],
)
def test_what_is_refused_is_what_can_not_be_built(name: str, absent: set[str]) -> None:
    config = small_family(CONFIG_MAPPING[name])
    refused = attention_refusals(config)
    assert set(refused) == absent
    for attention in ("sdpa", "eager", "flex_attention"):
        if attention in refused:
            with pytest.raises(DstrainError):
                empty_model(small_trial(config), attention)
        else:
            assert empty_model(small_trial(config), attention).config._attn_implementation == attention


def test_one_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = attention_support._logits
    monkeypatch.setattr(
        attention_support,
        "_logits",
        lambda config, name, *more: real(config, name, *more) * (1.01 if name == "eager" else 1.0),
    )
    assert attention_refusals(small_family(CONFIG_MAPPING["llama"])) == {
        "eager": "it computes another result (logits differ by 1%)"
    }


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_a_model_is_split_with_flex_attention_too(name: str) -> None:
    """Its kernels do not run on meta, where the blocks are probed."""
    assert find_structure(small_family(CONFIG_MAPPING[name]), "flex_attention").refusal is None
