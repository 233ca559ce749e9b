"""What an adapter's dropout drops of a row depends on the row's seed and the module, and on nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from dstrain.errors import DstrainError
from dstrain.lora import Adapter
from dstrain.model.adapter_dropout import DropoutByRows, DropoutOfParts, dropping_by_rows
from dstrain.model.adapters import Adapters
from dstrain.model.capability import randomness
from dstrain.model.capability.randomness import adapter_drops_by_layout
from dstrain.model.capability.small_model import small_family
from dstrain.model.document_lengths import document_lengths, note_lengths
from dstrain.model.unsplit_model import UnsplitModel
from dstrain.train.batches import row_seeds
from tools.models_page import families

TOKENS_FIRST = ("xlnet",)
"""Families whose modules are given tokens x rows. (This one sees what comes behind, and is not trained.)"""

FLOOR = 140
"""Families that can be tried: never fewer than this."""

P, LENGTH, WIDTH = 0.3, 50, 40
SEEDS = row_seeds(7, 3, range(4))


def positions(seeds: Sequence[int]) -> Tensor:
    """Of rows with these seeds, which are noted; of four without any."""
    found = torch.arange(LENGTH).repeat(len(seeds) or 4, 1)
    note_lengths(found, document_lengths(found, seeds))
    return found


def dropped(x: Tensor, seeds: Sequence[int], module: int = 5) -> Tensor:
    with dropping_by_rows(positions(seeds)):
        return DropoutByRows(P, module)(x)


def test_it_is_dropout() -> None:
    x = torch.rand(4, LENGTH, WIDTH) + 1
    found = dropped(x, SEEDS)
    kept = found != 0
    assert torch.allclose(found[kept], x[kept] / (1 - P))
    assert abs(float(kept.double().mean()) - (1 - P)) < 0.02
    dropped(x.requires_grad_(), SEEDS).sum().backward()
    assert x.grad is not None and torch.equal(x.grad != 0, kept)
    assert DropoutByRows(P, 5).eval()(x) is x


def test_a_row_is_treated_alike_in_any_company_and_any_shape() -> None:
    x = torch.rand(4, LENGTH, WIDTH) + 1
    whole = dropped(x, SEEDS)
    torch.manual_seed(1)
    assert torch.equal(dropped(x[2:], SEEDS[2:]), whole[2:])
    assert torch.equal(dropped(x.flip(0), SEEDS[::-1]).flip(0), whole)
    assert torch.equal(dropped(x.flatten(0, 1), SEEDS).view_as(x), whole)
    assert torch.equal(dropped(x.view(1, -1, WIDTH), SEEDS).view_as(x), whole)
    assert torch.equal(dropped(x.bfloat16(), SEEDS) != 0, whole != 0)
    parts = DropoutOfParts(positions(SEEDS))
    found = []
    for part in x.view(-1, WIDTH).split(30):  # some end in the midst of a row
        with parts.given(30 * len(found), len(part)):
            found.append(DropoutByRows(P, 5)(part[None])[0])
    assert torch.equal(torch.cat(found).view_as(x), whole)


def test_rows_steps_seeds_and_modules_drop_apart() -> None:
    x = torch.ones(4, LENGTH, WIDTH)
    masks = [*(dropped(x, SEEDS) != 0), *(dropped(x, SEEDS, 6) != 0)]
    for seed, step in ((7, 4), (8, 3)):
        masks += list(dropped(x, row_seeds(seed, step, range(4))) != 0)
    for number, one in enumerate(masks):
        for other in masks[:number]:
            assert abs(float((one == other).double().mean()) - (P**2 + (1 - P) ** 2)) < 0.05


def test_without_seeds_it_draws_from_torchs_generator() -> None:
    x = torch.ones(4, LENGTH, WIDTH)
    for known, given in ((SEEDS, x[:3]), ((), x)):  # other rows than are known, and none known
        torch.manual_seed(1)
        found = dropped(given, known)
        torch.manual_seed(1)
        assert torch.equal(found, torch.nn.functional.dropout(given, P))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_recomputed_block_drops_the_same(kind: Any) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=99, initializer_range=0.2,
    )  # fmt: skip
    adapter = Adapter(type=kind, r=4, dropout=P, init="orthogonal")
    ids = torch.randint(0, 99, (4, LENGTH), generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in (False, True):
        model = UnsplitModel(config, seed=5, adapters=Adapters(config, adapter, seed=5)).train()
        if recompute:
            model.recompute_blocks()
        torch.manual_seed(int(recompute))
        model((ids, positions(SEEDS))).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert gradient is not None and torch.equal(gradient, found[1][name]), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2_moe"])
def test_families_drop_by_rows(family: str) -> None:
    config = small_family(CONFIG_MAPPING[family])
    assert not adapter_drops_by_layout(config, Adapter())
    assert not adapter_drops_by_layout(config, Adapter(dropout=P, rank_pattern={"layers.77.q_proj": 4}))


@pytest.mark.full
def test_all_families_drop_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "suppress", lambda error: nullcontext())
    count = 0
    for family in families():
        try:
            config = small_family(CONFIG_MAPPING[family])
            found = adapter_drops_by_layout(config, Adapter(dropout=P))
        except DstrainError:  # there is no small one, or it does not run with PEFT's modules or their dropout
            continue
        assert found == (family in TOKENS_FIRST), family
        count += 1
    assert count >= FLOOR


def test_a_model_in_which_tokens_of_unknown_rows_are_dropped_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where each expert is a module, and is given its tokens alone."""
    config = small_family(CONFIG_MAPPING["llama"])
    whole = LlamaMLP.forward

    def one_by_one(module: Any, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return torch.cat([whole(module, tokens[:3]), whole(module, tokens[3:])]).view_as(x)

    monkeypatch.setattr(LlamaMLP, "forward", one_by_one)
    assert adapter_drops_by_layout(config, Adapter(dropout=P))
    assert not adapter_drops_by_layout(config, Adapter(dropout=P, targets=["q_proj"]))
