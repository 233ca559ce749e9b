"""The layers compute what the Hugging Face model computes, however they are spread."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dstrain.model.loss import TokenLoss
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.model_families import FAMILIES, batch, reference, tiny


def build(config, indices=None, seed=3, **options):
    model = PipelineModel(config, seed=seed, **{"attention": "auto", **options})
    return [model.build(i) for i in (range(model.num_layers) if indices is None else indices)]


def run(layers, inputs):
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def gradients(layers):
    """The sum of the gradients of each weight's copies, by Hugging Face name."""
    found, seen = {}, set()
    for layer in layers:
        for name, param in layer.named_parameters():
            if id(param) not in seen and param.grad is not None:
                seen.add(id(param))
                found[name] = param.grad
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_and_one_equal_the_family_itself(name):
    config = tiny(name)
    ids, positions, labels, weight = batch()
    one = build(config)
    probe = PipelineModel(config, seed=3, attention="auto")
    cut = probe.num_layers // 2
    first, second = build(config, range(cut)), build(config, range(cut, probe.num_layers))
    model = reference(config, one)

    arguments = {} if name == "bloom" else {"position_ids": positions}
    wanted = model(input_ids=ids, use_cache=False, **arguments).logits
    loss = TokenLoss()(wanted, (labels, weight))
    loss.backward()

    logits = run(one, (ids, positions))
    TokenLoss()(logits, (labels, weight)).backward()
    sent, sent_positions = run(first, (ids, positions))
    received = sent.detach().clone().requires_grad_()
    split_logits = run(second, (received, sent_positions.clone()))
    TokenLoss()(split_logits, (labels, weight)).backward()
    sent.backward(received.grad)

    assert torch.equal(logits, wanted)
    assert torch.equal(split_logits, wanted)
    whole, early, late = gradients(one), gradients(first), gradients(second)
    tied = {path: weight.key for weight in probe.tied for _, path in weight.owners}
    for path, param in model.named_parameters():
        torch.testing.assert_close(whole[path], param.grad, rtol=1e-5, atol=1e-7, msg=path)
        parts = [g[p] for g in (early, late) for p in g if tied.get(p, p) == path]
        torch.testing.assert_close(sum(parts), param.grad, rtol=1e-5, atol=1e-6, msg=path)


@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text", "bloom", "deepseek_v3", "gpt2"])
def test_engines_may_cast_in_place(name):
    config = tiny(name)
    ids, positions, labels, weight = batch()
    layers = [layer.to(torch.bfloat16) for layer in build(config)]
    born = build(config, dtype=torch.bfloat16)
    model = reference(config, layers).to(torch.bfloat16)
    # Hugging Face keeps these buffers in fp32 when it loads in bf16; Module.to rounds them.
    fp32 = dict(reference(config, build(config)).named_buffers())
    for path, buffer in fp32.items():
        parent, _, last = path.rpartition(".")
        model.get_submodule(parent)._buffers[last] = buffer
    arguments = {} if name == "bloom" else {"position_ids": positions}
    wanted = model(input_ids=ids, use_cache=False, **arguments).logits
    logits = run(layers, (ids, positions))
    assert logits.dtype == torch.bfloat16
    assert torch.equal(logits, wanted)
    assert torch.equal(run(born, (ids, positions)), wanted)
    TokenLoss()(logits, (labels, weight)).backward()
    assert all(p.grad is not None for p in layers[0].parameters())


def test_a_cast_keeps_the_buffers():
    layer = build(tiny("gemma3_text"), [0])[0].to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in layer.parameters())
    assert all(b.dtype == torch.float32 for b in layer.buffers())
    assert list(layer.buffers())


def test_names_are_hugging_face_names():
    model = PipelineModel(tiny("llama"), seed=0)
    assert model.names == ("embed", "block 0", "block 1", "block 2", "block 3", "head")
    assert [n for n, _ in model.build(0).named_parameters()] == ["model.embed_tokens.weight"]
    assert "model.layers.2.self_attn.q_proj.weight" in dict(model.build(3).named_parameters())
    assert [n for n, _ in model.build(5).named_parameters()] == ["model.norm.weight", "lm_head.weight"]


def test_recomputed_blocks_give_the_same_gradients():
    config = tiny("qwen2-sliding", attention_dropout=0.1)
    ids, positions, labels, weight = batch()
    results = []
    for recompute in (False, True):
        layers = build(config)
        torch.manual_seed(0)
        # Two micro-batches forward before either goes backward, as in 1F1B: the cached arguments are
        # another's.
        losses = []
        for shift in (0, 1):
            value = (ids.roll(shift, 1), positions + shift)
            for i, layer in enumerate(layers):
                inner = recompute and 0 < i < len(layers) - 1
                value = checkpoint(layer, value, use_reentrant=False) if inner else layer(value)
            losses.append(TokenLoss()(value, (labels, weight)))
        for loss in losses:
            loss.backward()
        results.append(gradients(layers))
    for path in results[0]:
        assert torch.equal(results[0][path], results[1][path]), path


def test_reused_memory_of_positions_is_not_mistaken():
    config = tiny("llama")
    layers = build(config)
    ids, positions, _, _ = batch()
    other = torch.arange(6).repeat(2).expand(2, 12)
    buffer = positions.clone()
    run(layers, (ids, buffer))
    buffer.copy_(other)
    assert torch.equal(run(layers, (ids, buffer)), run(build(config), (ids, other.contiguous())))


def test_dropout_follows_the_layers_mode():
    config = tiny("gpt2", embd_pdrop=0.5)
    ids, positions, _, _ = batch()
    layers = build(config)
    torch.manual_seed(0)
    one, two = run(layers, (ids, positions)), run(layers, (ids, positions))
    assert not torch.equal(one, two)
    for layer in layers:
        layer.eval()
    assert torch.equal(run(layers, (ids, positions)), run(layers, (ids, positions)))


def test_only_the_embedding_draws_its_dropout():
    """The stages behind it run the family's prologue too, with stand-ins: no random numbers used."""
    config = tiny("gpt2", embd_pdrop=0.5)
    ids, positions, _, _ = batch()
    layers = build(config)
    hidden = layers[0]((ids, positions))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(layers[1:], hidden)
    assert torch.equal(before, torch.get_rng_state())


def test_gradients_off_and_inference_mode():
    config = tiny("llama")
    layers = build(config)
    ids, positions, labels, weight = batch()
    wanted = run(layers, (ids, positions)).detach()
    with torch.inference_mode():
        assert torch.equal(run(layers, (ids, positions)), wanted)
    with torch.no_grad():
        assert torch.equal(run(layers, (ids, positions)), wanted)
    TokenLoss()(run(layers, (ids, positions)), (labels, weight)).backward()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral"])
def test_whole_model_equals_the_layers(name):
    config = tiny(name)
    ids, positions, _, _ = batch()
    layers, whole = build(config), UnsplitModel(config, seed=3)
    for layer in layers:
        for path, param in layer.named_parameters():
            assert torch.equal(whole.get_parameter(path), param), path
    assert torch.equal(whole((ids, positions)), run(layers, (ids, positions)))
    cast = copy.deepcopy(UnsplitModel(config, seed=3).to(torch.bfloat16))
    assert cast((ids, positions)).dtype == torch.bfloat16
    assert not whole.eval()._model.training


def test_misuse_is_refused():
    model = PipelineModel(tiny("llama"), seed=0)
    model.build(1)
    with pytest.raises(ValueError, match="built already"):
        model.build(1)
    with pytest.raises(IndexError):
        model.build(6)
