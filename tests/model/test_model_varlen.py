"""Varlen attention: its CPU form computes what masked sdpa does, and the kernel is called as torch wants it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen
from transformers import CONFIG_MAPPING, AttentionInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from dstrain.model.capability.attention_support import attention_refusals
from dstrain.model.capability.small_model import small_family
from dstrain.model.document_lengths import document_lengths
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from dstrain.model.varlen_attention import VARLEN, varlen_attention
from tests.support.model_families import tiny

LENGTHS = 9, 7, 6
IDS = torch.randint(3, 99, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
PACKED = torch.stack([torch.cat([torch.arange(n) for n in LENGTHS]), torch.arange(sum(LENGTHS))])
FAMILIES = ["llama", "llama-tied", "qwen2-sliding", "qwen3", "gemma3_text", "granite", "deepseek_v3"]


def test_transformers_knows_it_and_makes_no_mask_for_it() -> None:
    assert AttentionInterface._global_mapping[VARLEN] is varlen_attention
    assert VARLEN not in ALL_MASK_ATTENTION_FUNCTIONS._global_mapping


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    cuts = [draw(st.lists(st.integers(1, length), max_size=3, unique=True)) for _ in range(rows)]
    edges = [[0, *sorted(cut for cut in row if cut < length), length] for row in cuts]
    return {
        "positions": torch.stack(
            [torch.cat([torch.arange(b - a) for a, b in pairwise(row)]) for row in edges]
        ),
        "groups": draw(st.sampled_from([1, 2, 4])),
        "width": draw(st.sampled_from([3, 8, 16])),
        "of_values": draw(st.sampled_from([5, 8])),
        "window": draw(st.sampled_from([None, 1, 2, 5, 64])),
        "scaling": draw(st.sampled_from([None, 0.5])),
    }


@settings(deadline=None, max_examples=60)
@given(calls())
def test_it_computes_what_sdpa_does_with_a_mask(call: dict[str, Any]) -> None:
    positions, groups = call["positions"], call["groups"]
    (rows, length), heads = positions.shape, 4
    random = torch.Generator().manual_seed(0)

    def states(count: int, width: int) -> Tensor:
        return torch.randn(rows, count, length, width, generator=random, dtype=torch.float64).requires_grad_()

    inputs = (
        states(heads, call["width"]),
        states(heads // groups, call["width"]),
        states(heads // groups, call["of_values"]),
    )
    lengths = document_lengths(positions)
    place = torch.arange(length)
    document = (positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1).cumsum(1)
    behind = place[:, None] - place
    seen = (behind >= 0) & (document[:, :, None] == document[:, None, :])
    if call["window"] is not None:
        seen &= behind < call["window"]
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = groups, True
    expected, _ = sdpa_attention_forward(module, *inputs, seen[:, None], scaling=call["scaling"])
    found, _ = varlen_attention(
        module,
        *inputs,
        None,
        scaling=call["scaling"],
        sliding_window=call["window"],
        cu_seq_lens_q=lengths.edges,
        max_length_q=lengths.longest,
    )
    torch.testing.assert_close(found, expected)
    weights = torch.randn(expected.shape, generator=random, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_the_same_with_it(name: str) -> None:
    results = []
    for attention in ("auto", VARLEN):
        model = PipelineModel(tiny(name), seed=0, attention=attention)
        layers = [model.build(index).train() for index in range(model.num_layers)]
        head: Any = layers[-1]
        state: Any = (IDS, PACKED)
        with head.asked(target=(IDS, torch.full((1,), 1 / IDS.numel()))):
            for layer in layers:
                state = layer(state)
        state.backward()
        gradients = {
            f"{index}.{key}": value.grad
            for index, layer in enumerate(layers)
            for key, value in layer.named_parameters()
            if value.grad is not None
        }
        results.append((state.detach(), gradients))
    (loss, gradients), (same, alike) = results
    torch.testing.assert_close(same, loss, rtol=1e-6, atol=0)
    assert gradients.keys() == alike.keys()
    for key, value in gradients.items():
        torch.testing.assert_close(alike[key], value, rtol=0, atol=2e-5 * float(value.abs().max()))


def test_each_block_gets_the_documents_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    got = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        got.append((args[4], kwargs["cu_seq_lens_q"].tolist(), kwargs["max_length_q"], args[2].shape[1]))
        return varlen_attention(*args, **kwargs)

    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, watched)
    UnsplitModel(tiny("llama"), seed=0, attention=VARLEN)((IDS, PACKED))
    assert got == [(None, [0, 9, 16, 22, 44], 22, 2)] * 4, "no mask, and keys of their own two heads"


def test_what_the_kernel_does_not_have_is_no_silent_difference() -> None:
    states = [torch.zeros(1, 2, 4, 8)] * 3
    module = torch.nn.Module()
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    for wrong in ({"dropout": 0.1}, {"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}):
        with pytest.raises(ValueError, match="varlen attention has no"):
            varlen_attention(module, *states, None, **wrong)
    with pytest.raises(ValueError, match="varlen attention has no a mask"):
        varlen_attention(module, *states, mask)


@pytest.mark.parametrize(("width", "of_values"), [(64, 64), (192, 128), (80, 80), (20, 20)])
def test_the_kernel_takes_the_shapes_that_it_is_given(
    width: int, of_values: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's own operator on a fake device: forward and backward, with 8 heads of queries and 2 of keys."""
    got: list[Any] = []
    kernel = varlen.varlen_attn

    def watched(*args: Any, **kwargs: Any) -> Any:
        got.append(([tuple(state.shape) for state in args[:3]], args[3] is args[4], args[5:], kwargs))
        return kernel(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", watched)
    with FakeTensorMode(), torch.device("meta"):
        inputs = [
            torch.empty(2, heads, 32, size, dtype=torch.bfloat16, requires_grad=True)
            for heads, size in ((8, width), (2, width), (2, of_values))
        ]
        edges = torch.empty(5, dtype=torch.int32)
        output, _ = varlen_attention(
            torch.nn.Module(), *inputs, None, sliding_window=16, cu_seq_lens_q=edges, max_length_q=20
        )
        assert output.shape == (2, 32, 8, of_values) and output.dtype == torch.bfloat16
        output.sum().backward()
        assert [state.grad.shape for state in inputs] == [state.shape for state in inputs]
    wide = max(width, of_values) + -max(width, of_values) % 8
    [(shapes, same, lengths, options)] = got
    assert shapes == [(64, 8, wide), (64, 2, wide), (64, 2, wide)] and same and lengths == (20, 20)
    assert options == {"scale": width**-0.5, "window_size": (15, 0), "enable_gqa": True}


def refusal(config: PretrainedConfig) -> str | None:
    return attention_refusals(config).get(VARLEN)


def test_a_family_that_attends_in_fp32_keeps_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the kernel would refuse it in the first step."""
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def in_fp32(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        return rotate(q.float(), k.float(), *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", in_fp32)
    said = refusal(tiny("llama"))
    assert said == "a model in bf16 has its attention in float32, which the kernel does not take"
    assert AttentionInterface._global_mapping[VARLEN] is varlen_attention


def test_families_are_tried_with_it() -> None:
    assert [refusal(tiny(name)) for name in ("llama", "qwen2-sliding", "gemma3_text")] == [None] * 3
    assert refusal(tiny("llama", head_dim=288)) == "its heads have 288 elements, and the kernel takes 256"
    assert refusal(tiny("falcon-alibi")) == "transformers has none for this family"
    assert refusal(small_family(CONFIG_MAPPING["gemma2"])) == (
        "it does not run (ValueError: varlen attention has no softcap)"
    )
    assert refusal(small_family(CONFIG_MAPPING["afmoe"])) is None
    assert str(refusal(tiny("bloom"))).startswith("it computes another result")
