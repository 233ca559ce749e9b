"""What the measurement says of activations, against the paper's formula and against what a real block takes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GPT2Config

from dstrain.model.measuring.activations import block_activations, outer_activations
from dstrain.model.pipeline_split.probe import find_structure

HIDDEN, HEADS, LENGTH = 128, 8, 512


def gpt2(**options: Any) -> Any:
    choices = {"activation_function": "gelu", "resid_pdrop": 0.1, "attn_pdrop": 0.1, "embd_pdrop": 0.1}
    return GPT2Config(
        vocab_size=1000, n_embd=HIDDEN, n_layer=2, n_head=HEADS, n_positions=2 * LENGTH, **(choices | options)
    )


def test_saved_bytes_are_those_of_korthikanti() -> None:
    """s b h (34 + 5 a s / h) in 16 bits: Korthikanti et al. 2022, equation 1, where attention keeps its square.

    34 are 32 and the two dropout masks behind attention and MLP; 5 are the softmax in 16 bits and, with dropout, its
    mask and the result. Each norm keeps two numbers a token in fp32 beside.
    """
    without = block_activations(
        find_structure(gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0), "eager"), 0
    )
    assert without.saved_of_position[0] == pytest.approx(2 * HEADS, rel=0.01)
    assert without.saved[0] == pytest.approx(32 * HIDDEN, rel=0.02)
    # On meta, as on CPUs, a mask is held in 16 bits: on a GPU it is a byte.
    found = block_activations(find_structure(gpt2(), "eager"), 0)
    assert found.saved_of_position[0] == pytest.approx((5 + 1) * HEADS, rel=0.01)
    assert found.saved[0] == pytest.approx((34 + 2) * HIDDEN, rel=0.02)


def test_fused_attention_keeps_no_square() -> None:
    found = block_activations(find_structure(gpt2(), "sdpa"), 0)
    assert found.saved_of_position == (0, 0) and found.working_of_position == (0, 0)


def test_fp32_takes_twice_as_much() -> None:
    found = block_activations(
        find_structure(gpt2(resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0), "sdpa"), 0
    )
    assert found.saved[1] == pytest.approx(2 * found.saved[0], rel=0.01)
    assert found.working[1] == pytest.approx(2 * found.working[0], rel=0.01)


def test_the_head_s_norm_is_measured() -> None:
    before, after = outer_activations(find_structure(gpt2(), "sdpa"))
    # What the norm takes, what the matrix multiplication takes, and two numbers a token.
    assert after.saved[1] == 2 * 4 * HIDDEN + 8
    assert after.working[1] >= 4 * HIDDEN and before.saved == (0, 0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_working_bytes_are_what_a_backward_pass_takes_beside_what_it_frees(attention: str) -> None:
    """Not less than the gradient of the widest matrix multiplication, and not more than the block keeps."""
    found = block_activations(find_structure(gpt2(), attention), 0)
    working = found.working[1] + LENGTH * found.working_of_position[1]
    assert 4 * 4 * HIDDEN <= working <= found.saved[1] + LENGTH * found.saved_of_position[1]
