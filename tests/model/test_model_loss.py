"""The chunked loss is the plain one, and one of the user's own is summed as it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from dstrain.errors import DstrainError
from dstrain.model import loss
from dstrain.model.layers import HeadLayer
from dstrain.model.loss import OwnLoss, TokenLoss, token_losses
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.distributed.workers import run
from tests.support.own_code import own_losses


def case(dtype=torch.float32, rows=3, length=7, vocabulary=11):
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, length, vocabulary, generator=random).mul(4).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (rows, length), generator=random)
    labels[torch.rand(rows, length, generator=random) < 0.3] = -100
    return logits, labels, torch.tensor([0.125])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 44, 1 << 24])
def test_equals_cross_entropy(dtype, piece, monkeypatch):
    monkeypatch.setattr(loss, "PIECE", piece)
    logits, labels, weight = case(dtype)
    ours = TokenLoss()(logits, (labels, weight))
    (gradient,) = torch.autograd.grad(ours, logits)
    plain = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") * 0.125
    (wanted,) = torch.autograd.grad(plain, logits)
    assert ours.dtype == torch.float32 and ours.shape == ()
    torch.testing.assert_close(ours, plain)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted)


def test_no_labels_give_zero_and_a_graph():
    logits, labels, weight = case()
    value = TokenLoss()(logits, (torch.full_like(labels, -100), weight))
    value.backward()
    assert value.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_ignored_rows_may_overflow():
    logits, labels, weight = case()
    with torch.no_grad():
        logits[labels == -100] = float("inf")
    value = TokenLoss()(logits, (labels, weight))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


def test_gradient_check():
    logits, labels, weight = case(rows=1, length=4, vocabulary=5)
    step, direction = 1e-2, torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    TokenLoss()(logits, (labels, weight)).backward()
    with torch.no_grad():
        ends = [TokenLoss()(logits + s * step * direction, (labels, weight)) for s in (1, -1)]
    slope = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close(slope, (logits.grad * direction).sum(), rtol=1e-3, atol=1e-4)


def test_losses_of_single_tokens():
    logits, labels, weight = case()
    losses = token_losses(logits, labels)
    assert losses.shape == labels.shape and not losses.requires_grad
    assert torch.equal(losses[labels == -100], torch.zeros(int((labels == -100).sum())))
    torch.testing.assert_close(losses.sum() * weight[0], TokenLoss()(logits, (labels, weight)).detach())


def memory_of_a_large_vocabulary(rank: int) -> float:
    """MiB that the loss of 131,072 words at 1,024 tokens takes beside what is there before it, 128 tokens at a time."""
    import resource

    from transformers import LlamaConfig

    from dstrain.model.pipeline_model import PipelineModel

    words, tokens = 131_072, 512
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    head = PipelineModel(config, seed=0).build(2)
    head.loss_chunk = 128
    hidden = torch.randn(2, tokens, 64, requires_grad=True)
    positions = torch.arange(tokens).expand(2, -1)
    labels = torch.randint(0, words, (2, tokens))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with head.asked(target=(labels, torch.tensor([1 / (2 * tokens)]))):
        loss = head((hidden, positions))
    loss.backward()
    assert abs(loss.item() - 11.8) < 0.3, loss
    assert hidden.grad.isfinite().all()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def test_a_large_vocabulary_takes_little_memory() -> None:
    """All logits in fp32 would take 512 MiB, and their gradients as much again; those of a chunk take 64, and the
    gradient of the head's weights 32."""
    [found] = run(1, memory_of_a_large_vocabulary)
    print(found)
    assert 64 < found < 340  # a few copies of a chunk's are needed


# --- of the user's own


def own(name: str, **options) -> TokenLoss:
    return TokenLoss(OwnLoss(f"own_losses:{name}", getattr(own_losses, name), options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_users_own_is_summed_over_the_tokens_that_count(dtype):
    """Those that do not count have infinite logits, and nan for a loss and a gradient."""
    logits, labels, weight = case(dtype)
    wanted = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") * 0.125
    (slope,) = torch.autograd.grad(wanted, logits)
    with torch.no_grad():
        logits[labels == -100] = float("inf")
    seen = own_losses.plain(logits.float().flatten(0, 1), labels.flatten())
    assert seen[labels.flatten() == -100].isnan().all()
    found = own("plain")(logits, (labels, weight))
    (gradient,) = torch.autograd.grad(found, logits)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found, wanted)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, slope)
    assert torch.equal(gradient[labels == -100], torch.zeros(int((labels == -100).sum()), 11, dtype=dtype))


def test_the_users_own_is_zero_where_no_label_counts():
    logits, labels, weight = case()
    value = own("plain")(logits, (torch.full_like(labels, -100), weight))
    value.backward()
    assert value.item() == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_parts_of_the_users_own_add_up():
    logits, labels, weight = case()
    whole = own("focal", gamma=1.5)(logits, (labels, weight))
    parts = [
        own("focal", gamma=1.5)(logits[:, part], (labels[:, part], weight))
        for part in (slice(3), slice(3, 7))
    ]
    torch.testing.assert_close(sum(parts), whole)
    assert whole < TokenLoss()(logits, (labels, weight))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("mean", {}, r"returned a tensor float32 \[\]"),
        ("column", {}, r"returned a tensor float32 \[21, 1\]"),
        ("right", {}, r"returned a tensor bool \[21\]"),
        ("numbers", {}, "returned a list, not a tensor"),
        ("detached", {}, "returned losses without a gradient"),
        ("elsewhere", {}, "returned losses without a gradient"),
        ("ends", {}, "failed: SystemExit: 3"),
        ("broken", {}, "failed: RuntimeError: "),
        ("focal", {"beta": 1}, "failed: TypeError: .*'beta'"),
    ],
)
def test_what_is_no_loss_of_tokens_is_refused(name, options, words):
    logits, labels, weight = case()
    with pytest.raises(DstrainError, match=f"^loss own_losses:{name} {words}") as caught:
        own(name, **options)(logits, (labels, weight))
    assert caught.value.exit_code == 1 and caught.value.hint


@pytest.mark.parametrize("name", ["plain", "penalised", "masked"])
def test_in_chunks_it_is_the_same(name):
    """A chunk's logits are computed a second time in the backward pass, and the function is called again."""
    _, labels, weight = case()
    random = torch.Generator().manual_seed(1)
    head = torch.randn(4, 11, generator=random)
    hidden = torch.randn(*labels.shape, 4, generator=random).requires_grad_()
    found = []
    for chunk in (0, 4):
        layer = HeadLayer(
            {}, SimpleNamespace(epilogue=lambda hidden, positions, training: hidden @ head), None
        )
        layer.set_loss(own(name), chunk)
        with layer.asked(target=(labels, weight)):
            value = layer((hidden, torch.arange(7).expand(3, -1)))
        found.append((value, *torch.autograd.grad(value, hidden)))
    torch.testing.assert_close(found[0], found[1])
    assert int((labels == -100).sum()), "and the labels are as they were"


def test_memory_that_is_not_there_is_no_fault_of_the_loss():
    def full(logits, labels):
        raise torch.OutOfMemoryError("CUDA out of memory")

    logits, labels, weight = case()
    with pytest.raises(torch.OutOfMemoryError):
        TokenLoss(OwnLoss("mine:full", full, {}))(logits, (labels, weight))


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("kind", [PipelineModel, UnsplitModel])
def test_a_model_trains_with_it_and_validates_with_cross_entropy(kind, chunk):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = kind(config, seed=0)
    layers = [model.build(index) for index in range(3)] if kind is PipelineModel else [model]
    layers[-1].set_loss(own("smoothed", z=0.1), chunk)
    ids = torch.randint(32, (2, 8), generator=torch.Generator().manual_seed(0))
    target = (ids.roll(-1, 1), torch.tensor([1 / 16]))

    def run(asked=None):
        state = (ids, torch.arange(8).expand(2, -1))
        for layer in layers[:-1]:
            state = layer(state)
        with layers[-1].asked(target=asked):
            return layers[-1](state)

    logits = run()
    training, validation = run(target), [layer.eval() for layer in layers] and run(target)
    wanted = own_losses.smoothed(logits.flatten(0, 1), target[0].flatten(), z=0.1).mean()
    torch.testing.assert_close(training, wanted)
    torch.testing.assert_close(validation, cross_entropy(logits.flatten(0, 1), target[0].flatten()))
    assert training > 1.05 * validation
