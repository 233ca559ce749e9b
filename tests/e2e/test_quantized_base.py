"""Adapters for a quantized model, as a user types them: trained, resumed, exported, merged, loaded by transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.e2e import Said, one_message
from tests.support.materials import LLAMA

PLAIN = [
    *("run", "--data", "text.jsonl", "--seq-len", "32", "--global-batch", "4", "--init", "pretrained"),
    *(f"--set={s}" for s in ("sample_tokens=0", "lr_schedule=constant", "lr=1e-2", "eval_every=2", "keep=9")),
]
RUN = [*PLAIN, "--adapter", "lora", "--adapter-r", "4", "--adapter-alpha", "16"]


@pytest.fixture
def base(place: Path) -> Path:
    """A model folder with a tokenizer, whose frozen head can be learned through."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dstrain.data.tokenizing.tokenizers import ByteTokenizer

    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, "initializer_range": 0.2})
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "base")
    ByteTokenizer().save_pretrained(place / "base")
    return place / "base"


def quantized(base: Path, bits: str) -> Path:
    """The same model in a folder as transformers writes it when bitsandbytes has quantized it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from dstrain.data.tokenizing.tokenizers import ByteTokenizer

    options = {"4bit": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, "8bit": {}}[bits]
    config = BitsAndBytesConfig(**{f"load_in_{bits}": True}, **options)
    folder = base.with_name(f"base-{bits}")
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, device_map={"": "cpu"})
    model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


def losses_in(said: Said) -> tuple[float, float]:
    """The validation loss of what was exported, and the run's."""
    numbers = [
        float(word)
        for word in said.out.split()
        if word.count(".") == 1 and word[-1].isdigit() and len(word) > 6
    ]
    return numbers[0], numbers[1]


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_it_is_trained_resumed_exported_and_merged(
    bits: str, base: Path, place: Path, dstrain: Callable[..., Said]
) -> None:
    options = ["--model", "base", f"--set=adapter.base={bits}", "--name", "x"]
    said = dstrain(*RUN, *options, "--pipeline", "2", "--zero", "1", "--steps", "4")
    assert said.code == 0, said
    assert f"on {bits[0]}-bit weights" in said.out
    resumed = dstrain("resume", "x", "--pipeline", "1", "--zero", "2", "--data-parallel", "2", "--steps", "6")
    assert resumed.code == 0, resumed
    adapter = dstrain("export", "x", "adapter")
    assert adapter.code == 0, adapter
    exported, run = losses_in(adapter)
    # A validation computes with 8-bit activations, whose rounding depends on nothing but its own rows.
    assert exported == pytest.approx(run, rel=1e-5)
    merged = dstrain("export", "x", "merged", "--merge")
    assert merged.code == 0, merged
    of_merged, run = losses_in(merged)
    assert of_merged == pytest.approx(run, rel=1e-5 if bits == "4bit" else 2e-3)
    config = json.loads((place / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_model_that_is_quantized_on_disk_is_taken_as_it_is(
    bits: str, base: Path, place: Path, dstrain: Callable[..., Said]
) -> None:
    folder = quantized(base, bits)
    one_message(dstrain(*PLAIN, "--model", folder.name), ["only an adapter can be trained"])
    found = []
    for name, layout in (("one", []), ("two", ["--pipeline", "2", "--zero", "1"])):
        said = dstrain(*RUN, "--model", folder.name, *layout, "--steps", "4", "--name", name)
        assert said.code == 0, said
        exported = dstrain("export", name, f"adapter-{name}")
        assert exported.code == 0, exported
        found.append(losses_in(exported))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    if bits == "4bit":  # in 8 bits transformers' default keeps columns of activations apart
        assert found[0][0] == pytest.approx(found[0][1], rel=1e-5)
    merged = dstrain("merge", "adapter-one", "merged")
    assert merged.code == 0, merged
    other = "8bit" if bits == "4bit" else "4bit"
    one_message(
        dstrain(*RUN, "--model", folder.name, f"--set=adapter.base={other}"), [f"quantized to {bits}"]
    )
