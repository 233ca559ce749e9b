"""A quantized base model as its ranks read it: memory, values, and what shall not change them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from dstrain.lora import Adapter
from dstrain.model.adapters import Adapters
from dstrain.model.measuring.measure import measure
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.quantization import quantized_bytes
from tests.support.materials import LLAMA
from tests.support.sampling import full, heavy

SHARE = """
import json, sys
from pathlib import Path
import torch
from dstrain.lora import Adapter
from dstrain.model.adapters import Adapters
from dstrain.model.architecture import load_config
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.quantization import quantized_bytes
from dstrain.model.weights.pretrained import PretrainedWeights

folder, bits = sys.argv[1:]
torch.set_num_threads(1)

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

config = load_config(Path(folder) / "config.json")
model = PipelineModel(
    config, seed=0, dtype=torch.bfloat16, weights=PretrainedWeights(folder),
    adapters=Adapters(config, Adapter(r=8, base=bits)),
)
import bitsandbytes.functional
bitsandbytes.functional.quantize_4bit(torch.ones(64, 64))  # its tables and libraries
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
layers = [model.build(index) for index in range(model.num_layers // 2)]
peak = resident("VmHWM") - before
held = [quantized_bytes(p) or p.nbytes for layer in layers for p in layer.parameters()]
print(json.dumps({"peak": peak, "share": sum(held)}))
"""


@pytest.mark.parametrize("bits", [*heavy("4bit"), *full("8bit")])
def test_a_rank_holds_its_share_and_a_layer_while_it_reads(bits: str, tmp_path: Path) -> None:
    """A model of 500 million parameters in bf16, in two stages."""
    config = LlamaConfig(
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=24,
        num_attention_heads=20,
        vocab_size=32000,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) > 5e8
    model.save_pretrained(tmp_path)
    layer = 2 * sum(p.numel() for p in model.model.layers[0].parameters())
    del model
    said = subprocess.run(
        [sys.executable, "-c", SHARE, str(tmp_path), bits], check=True, capture_output=True, text=True
    )
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["peak"] <= 1.15 * (found["share"] + layer), found


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_shape_tells_what_is_held(family: str, bits: str) -> None:
    """As many bytes as the layers take, and all else as without quantization."""
    config = (
        LlamaConfig(**LLAMA)
        if family == "llama"
        else GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64, resid_pdrop=0)
    )
    plain, found = measure(config, Adapter()), measure(config, Adapter.model_validate({"base": bits}))
    model = PipelineModel(config, seed=1, adapters=Adapters(config, Adapter.model_validate({"base": bits})))
    for index, (before, layer) in enumerate(zip(plain["layers"], found["layers"], strict=True)):
        held = {
            name.replace(".base_layer", ""): size
            for name, parameter in model.build(index).named_parameters()
            if (size := quantized_bytes(parameter)) is not None
        }
        assert layer["quantized"] == held
        assert bool(held) == (layer["kind"] == "block")
        for key in ("parameters", "tensors", "forward_flops_per_token"):
            assert layer[key] == before[key], (layer["name"], key)
        # In 8 bits all that is alive behind the forward pass is counted, not what autograd's hooks are told of.
        bound = 0 if bits == "4bit" else 0.1
        assert layer["saved_bytes_per_token"] == pytest.approx(before["saved_bytes_per_token"], rel=bound)
    assert found["total_parameters"] == plain["total_parameters"]
    assert (plain["bits"], found["bits"]) == (None, bits)


def test_a_validation_changes_no_weights() -> None:
    """On CPUs with bfloat16, bitsandbytes would pack them anew for good, and round their scales."""
    config = LlamaConfig(**LLAMA)
    model = PipelineModel(config, seed=1, adapters=Adapters(config, Adapter(base="4bit")))
    layers = [model.build(index) for index in range(model.num_layers)]

    def loss(*, training: bool) -> torch.Tensor:
        ids = torch.arange(32).view(2, 16)
        state = (ids, torch.arange(16).expand(2, 16))
        for layer in layers:
            state = layer.train(training)(state)
        return state.float().square().mean()

    first = loss(training=True)
    with torch.no_grad():
        validation = loss(training=False)
    assert torch.equal(first, loss(training=True)) and torch.equal(first, validation)
    first.backward()
