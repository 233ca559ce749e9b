"""A model that can't be split into stages is merged with an adapter part by part, as PEFT does it in one piece."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dstrain.exporting.merging import MergedState, model_maker
from dstrain.exporting.writing import ExportedTensors
from dstrain.lora import Adapter, is_adapter_parameter, saved_name
from dstrain.model.adapters import Adapters, lora_config
from dstrain.model.capability.small_model import small_family
from dstrain.model.model_parts import ModelParts
from dstrain.model.pipeline_split.probe import why_not_pipelined
from dstrain.model.unsplit_model import UnsplitModel
from dstrain.model.weights.pretrained import PretrainedWeights

SEED = 5
ADAPTER = Adapter(r=4, init="orthogonal")


def small(family: str, **choices: int) -> PretrainedConfig:
    config = small_family(CONFIG_MAPPING[family], **choices)
    assert why_not_pipelined(config) is not None
    return config


def adapters(config: PretrainedConfig) -> Adapters:
    return Adapters(config, ADAPTER, seed=SEED)


def trained(config: PretrainedConfig) -> dict[str, Tensor]:
    """An adapter's parameters, by their names in the model."""
    model = UnsplitModel(config, seed=SEED, attention="auto", adapters=adapters(config))
    return {name: p.detach() for name, p in model.named_parameters() if is_adapter_parameter(name)}


def written(config: PretrainedConfig, weights: PretrainedWeights | None, folder: Path) -> ExportedTensors:
    values = trained(config)
    make = model_maker(config, adapters(config), weights, seed=SEED, splits=False)
    return ExportedTensors(MergedState(make, values.__getitem__, folder), config, torch.float32)


def in_one_piece(model: PreTrainedModel, config: PretrainedConfig) -> dict[str, Tensor]:
    """The weights that PEFT's own merging leaves."""
    from peft import get_peft_model, set_peft_model_state_dict

    adapted = get_peft_model(model, lora_config(ADAPTER))
    set_peft_model_state_dict(adapted, {saved_name(name): v for name, v in trained(config).items()})
    merged: torch.nn.Module = adapted.merge_and_unload()
    return merged.state_dict()


@pytest.mark.parametrize("family", ["gemma4_text", "roformer", "big_bird"])
def test_pretrained_weights_are_merged_as_by_peft(family: str, tmp_path: Path) -> None:
    config = small(family)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = written(config, PretrainedWeights(tmp_path), tmp_path)
    whole = in_one_piece(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    for _ in range(2):  # it is read twice: written, and compared
        names = tensors.names()
        assert all(torch.equal(tensors.value(name), whole[name]) for name in names)
    changed = sum(
        not torch.equal(whole[name], value) for name, value in of_file(tmp_path).items() if name in whole
    )
    assert changed > 4


def of_file(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", ["gemma4_text", "hrm_text", "rwkv"])
def test_drawn_weights_are_those_of_the_model_in_one_piece(family: str) -> None:
    config = small(family)
    whole = dict(UnsplitModel(config, seed=SEED, attention="auto").named_parameters(remove_duplicate=False))
    parts = ModelParts(config, seed=SEED)
    shapes = [parts.shapes_of(index) for index in range(parts.num_layers)]
    found: dict[str, Tensor] = {}
    for index in reversed(range(parts.num_layers)):
        part = dict(parts.build(index).named_parameters(remove_duplicate=False))
        assert {name: tuple(p.shape) for name, p in part.items()} == shapes[index]
        assert not found.keys() & part.keys()
        found |= part
    assert found.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in found.items())


def alive() -> int:
    """Bytes of the tensors in memory."""
    storages = {
        storage.data_ptr(): storage.nbytes()
        for thing in gc.get_objects()
        if isinstance(thing, Tensor) and not thing.is_meta
        for storage in [thing.untyped_storage()]
    }
    return sum(storages.values())


def held(tensors: ExportedTensors) -> Iterator[int]:
    for part in tensors.parts():
        yield alive()
        part.clear()


def test_one_block_is_in_memory_at_a_time(tmp_path: Path) -> None:
    config = small("roformer", num_hidden_layers=8)
    model = AutoModelForCausalLM.from_config(config)
    sizes = {name: p.nbytes for name, p in model.named_parameters()}
    block = sum(size for name, size in sizes.items() if ".layer.3." in name)
    rest = sum(size for name, size in sizes.items() if ".layer." not in name)
    model.save_pretrained(tmp_path)
    del model
    tensors = written(config, PretrainedWeights(tmp_path), tmp_path)
    gc.collect()
    before = alive()
    most = max(held(tensors)) - before
    assert block < most < rest + 2.5 * block, (most / block, rest / block)
