"""Randomness in training is found by trying, whatever it is called."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING

from dstrain.model.capability.randomness import is_random, largest_dropout, randomness_beside_dropout
from dstrain.model.capability.small_model import small_family
from dstrain.model.capability.trial_model import trial_model
from dstrain.model.measuring.measure import measure
from dstrain.model.unsplit_model import UnsplitModel
from tests.support.model_families import tiny


def family(name: str, **choices):
    return small_family(CONFIG_MAPPING[name], **choices)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "phimoe"])
def test_nothing_is_random_without_noise(name):
    assert randomness_beside_dropout(family(name)) is None


def test_dropout_is_not_told_twice():
    config = tiny("llama", attention_dropout=0.2)
    assert is_random(trial_model(config).train())
    assert not is_random(trial_model(config).eval())
    assert randomness_beside_dropout(config) is None
    assert largest_dropout(config) == 0.2


def test_noise_on_routers_is_found_with_its_key():
    config = family("mixtral", router_jitter_noise=0.01)
    assert randomness_beside_dropout(config) == "router_jitter_noise 0.01"
    assert measure(config)["randomness"] == "router_jitter_noise 0.01"
    config.attention_dropout = 0.1
    assert randomness_beside_dropout(config) == "router_jitter_noise 0.01"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: float(torch.rand(())),
        lambda: random.random(),
        lambda: float(np.random.rand()),
    ],
    ids=["torch", "random", "numpy"],
)
def test_randomness_without_a_key_is_found_from_each_generator(draw, monkeypatch):
    original = UnsplitModel.forward

    def noisy(model, inputs):
        logits = original(model, inputs)
        return logits + draw() if model.training else logits

    monkeypatch.setattr(UnsplitModel, "forward", noisy)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert randomness_beside_dropout(tiny("llama")) == ""
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_dropout_inside_a_part_of_the_configuration_counts():
    config = CONFIG_MAPPING["dbrx"](attn_config={"attn_pdrop": 0.3, "rope_theta": 10000.0})
    assert largest_dropout(config) == 0.3
