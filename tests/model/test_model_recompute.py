"""Models in one piece recompute their blocks where transformers can, and say so where it can't."""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from dstrain.errors import DstrainError
from dstrain.model.capability.small_model import small_family
from dstrain.model.unsplit_model import UnsplitModel


def step(name: str, recompute: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """The loss of packed rows, the gradients, and how many elements autograd kept for them."""
    ids = torch.randint(0, 99, (2, 16), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(16).repeat(2, 1)
    positions[0, 7:] -= 7
    model = UnsplitModel(small_family(CONFIG_MAPPING[name]), seed=1, attention="auto").train()
    if recompute:
        model.recompute_blocks()
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with hooks, model.asked(target=(torch.roll(ids, -1, 1), torch.tensor([1.0]))):
        loss = model((ids, positions))
    loss.backward()
    return loss, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, kept


@pytest.mark.parametrize("name", ["zamba2", "gemma4_text"])
def test_gradients_are_the_same_with_less_kept(name: str) -> None:
    loss, gradients, kept = step(name, recompute=False)
    again, recomputed, kept_less = step(name, recompute=True)
    assert torch.equal(loss, again) and kept_less < 0.8 * kept
    assert set(recomputed) == set(gradients)
    for path, gradient in gradients.items():
        torch.testing.assert_close(recomputed[path], gradient, rtol=1e-5, atol=1e-6, msg=path)


def test_a_family_that_can_not_recompute_is_refused() -> None:
    model = UnsplitModel(small_family(CONFIG_MAPPING["xlnet"]), seed=1, attention="auto")
    with pytest.raises(DstrainError) as caught:
        model.recompute_blocks()
    assert "xlnet" in caught.value.message and caught.value.hint == "--no-activation-checkpointing"
