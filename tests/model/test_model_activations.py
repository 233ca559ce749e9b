"""What the measurement says of activations, against the paper's formula and against what a real block takes."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, GPT2Config

from dstrain.model.measuring.activations import Activations, block_activations, outer_activations
from dstrain.model.measuring.flops import block_flops
from dstrain.model.measuring.measure import measure
from dstrain.model.measuring.whole_model import measure_whole_model
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
    found = block_activations(find_structure(gpt2(), "eager"), 0)
    assert found.saved_of_position[0] == pytest.approx(5 * HEADS, rel=0.01)
    assert found.saved[0] == pytest.approx(34 * HIDDEN, rel=0.02)


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


SMALL = {
    "vocab_size": 1000,
    "hidden_size": HIDDEN,
    "intermediate_size": 3 * HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def bytes_at(length: int, of: Activations, column: int) -> tuple[float, float]:
    """Saved and working bytes of a token in a sequence of this length."""
    return (
        of.saved[column] + length * of.saved_of_position[column],
        of.working[column] + length * of.working_of_position[column],
    )


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi", "olmo2", "gpt2"])
def test_a_model_that_runs_as_a_whole_takes_what_its_layers_take_by_themselves(family: str) -> None:
    config = gpt2() if family == "gpt2" else AutoConfig.for_model(family, **SMALL)
    structure = find_structure(config)
    assert structure.refusal is None
    whole = measure_whole_model(config)
    assert len(whole) == structure.num_blocks + 2
    for index in range(1, structure.num_blocks):  # the first one keeps what it shares with the others
        block, found = block_activations(structure, index), whole[index + 1].activations
        for column in (0, 1):
            by_itself, together = bytes_at(2048, block, column), bytes_at(2048, found, column)
            assert together[0] == pytest.approx(by_itself[0], rel=0.05)
            assert together[1] == pytest.approx(by_itself[1], rel=0.2)
        assert found.given == block.given
        assert (whole[index + 1].flops, whole[index + 1].flops_of_position) == block_flops(structure, index)
    head = outer_activations(structure)[1]
    capped = 2 if family == "gemma2" else 0  # bytes of a logit: what its cap keeps
    assert whole[-1].activations.saved[0] == pytest.approx(head.saved[0] + capped * 1000, rel=0.02)


def test_the_layers_of_a_model_that_cannot_be_split_are_measured() -> None:
    """Each had 34 bytes an element, by the formula for layers that do not run by themselves."""
    options = {"hidden_size_per_layer_input": 16, "laurel_rank": 8, "num_kv_shared_layers": 0}
    config = AutoConfig.for_model(
        "gemma3n_text", **SMALL, **options, vocab_size_per_layer_input=1000, activation_sparsity_pattern=None
    )
    found = measure(config)
    assert found["pipeline_refusal"] is not None
    blocks = [layer for layer in found["layers"] if layer["kind"] == "block"]
    assert len(blocks) == 3
    for block in blocks:
        assert block["saved_bytes_per_token"][0] > 2 * 34 * HIDDEN  # it carries four hidden states
        assert block["given_bytes_per_token"][0] >= 4 * 2 * HIDDEN
        assert block["forward_flops_per_token_and_position"] > 0
