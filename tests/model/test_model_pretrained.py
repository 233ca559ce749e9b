"""Weights from a model folder: each split loads what Hugging Face loads, and damaged folders say what is wrong."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dstrain.config.files import model_config_file
from dstrain.errors import DstrainError
from dstrain.model.architecture import load_config
from dstrain.model.pipeline_model import PipelineModel
from dstrain.model.unsplit_model import UnsplitModel
from dstrain.model.weights.check_weights import check_weights, main
from dstrain.model.weights.pretrained import PretrainedWeights
from dstrain.model.weights.weight_files import StoredTensor, WeightFiles
from tests.support.model_families import tiny

LOADED = ["llama", "llama-tied", "mixtral", "qwen3_moe", "gpt2", "gemma3_text", "deepseek_v3", "falcon"]
SPLIT = (range(2), range(2, 4), range(4, 6))


def save(
    folder: Path, name: str, *, shard: str = "20KB", dtype: torch.dtype = torch.bfloat16, **changes
) -> Path:
    """A checkpoint as Hugging Face writes it, in small shards; every buffer that it holds is changed too."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(tiny(name, **changes))).to(dtype)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def theirs(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def assert_loaded(found: torch.nn.Module, wanted: dict[str, torch.Tensor], dtype: torch.dtype) -> set[str]:
    """Parameters are equal to the bit and of the training's type; buffers are equal and as precise or more."""
    names = set()
    for name, value in found.named_parameters(remove_duplicate=False):
        assert value.dtype == dtype and value.is_contiguous() and value.requires_grad, name
        assert torch.equal(value, wanted[name].to(dtype)), name
        names.add(name)
    for name, value in found.named_buffers():
        assert torch.equal(value.to(wanted[name].dtype), wanted[name]), name
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOADED)
def test_three_stages_load_what_hugging_face_loads(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tmp_path, name)
    assert len(list(folder.glob("*.safetensors"))) > 2
    wanted, seen = theirs(folder, dtype), set()
    for stage in SPLIT:
        model = PipelineModel(
            tiny(name), seed=0, dtype=dtype, attention="auto", weights=PretrainedWeights(folder)
        )
        for index in stage:
            seen |= assert_loaded(model.build(index), wanted, dtype)
    assert seen == {
        n
        for n in wanted
        if n in dict(UnsplitModel(tiny(name), seed=0).named_parameters(remove_duplicate=False))
    }


@pytest.mark.parametrize("name", LOADED)
def test_a_model_in_one_piece_loads_the_same_block_by_block(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, name)
    built: list[torch.nn.Module] = []
    whole = UnsplitModel(
        tiny(name), seed=0, dtype=torch.bfloat16, weights=PretrainedWeights(folder), after_build=built.append
    )
    assert_loaded(whole, theirs(folder, torch.bfloat16), torch.bfloat16)
    assert len(built) == 5  # four blocks, then the rest


def test_a_model_in_one_piece_is_drawn_block_by_block_as_at_once() -> None:
    seen: list[bool] = []
    apart = UnsplitModel(
        tiny("gpt2"), seed=3, after_build=lambda m: seen.append(any(p.is_meta for p in m.parameters()))
    )
    layers = PipelineModel(tiny("gpt2"), seed=3)
    for index in range(layers.num_layers):
        for name, value in layers.build(index).named_parameters():
            assert torch.equal(apart.get_parameter(name), value)
    assert seen == [False] * 5


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("as_a_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_pytorch_files(name: str, shards: int, as_a_zip: bool, tmp_path: Path) -> None:
    def write(content: dict[str, torch.Tensor], path: Path) -> None:
        torch.save(content, path, _use_new_zipfile_serialization=as_a_zip)

    folder = save(tmp_path / "safe", name, shard="5GB")
    old = tmp_path / "bin"
    old.mkdir()
    shutil.copy(folder / "config.json", old)
    tensors = load_file(folder / "model.safetensors")
    # As in files of that time: parts of one storage, in any order, and small ones.
    joined = torch.arange(4000, dtype=torch.float32)
    tensors |= {"extra.part": joined[100:200], "extra.one": joined[7], "extra.all": joined}
    if shards == 1:
        write(tensors, old / "pytorch_model.bin")
    else:
        index = {}
        for number in range(shards):
            file = f"pytorch_model-{number}.bin"
            part = {key: value for i, (key, value) in enumerate(tensors.items()) if i % shards == number}
            write(part, old / file)
            index |= dict.fromkeys(part, file)
        (old / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
    wanted = theirs(folder, torch.float32)
    model = PipelineModel(tiny(name), seed=0, attention="auto", weights=PretrainedWeights(old))
    for index in range(model.num_layers):
        assert_loaded(model.build(index), wanted, torch.float32)
    assert check_weights(old / "config.json", old)["absent"] == []
    for key, stored in WeightFiles(old).tensors.items():
        assert torch.equal(stored.read(stored.dtype), tensors[key]), key


def test_of_a_pytorch_file_without_a_zip_no_data_are_read(tmp_path: Path) -> None:
    """Every rank opens it, and it may be larger than the memory."""
    (tmp_path / "config.json").write_text("{}")
    content = {"a": torch.ones(25_000_000), "b": torch.full((25_000_000,), 2.0)}
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    program = (
        "import re, sys\n"
        "from dstrain.model.weights.weight_files import WeightFiles\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "before = peak()\n"
        "tensors = WeightFiles(sys.argv[1]).tensors\n"
        "after = peak()\n"
        "print(after - before, tensors['b'].read(tensors['b'].dtype)[-1].item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, value = done.stdout.split()
    assert int(grown) < 50_000 and value == "2.0", done.stdout


def test_tied_weights_are_one_parameter_in_a_process(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama-tied")
    assert "lm_head.weight" not in WeightFiles(folder).tensors
    model = PipelineModel(tiny("llama-tied"), seed=0, weights=PretrainedWeights(folder))
    head, embed = model.build(5), model.build(0)
    assert head.lm_head.weight is embed.model.embed_tokens.weight
    assert not head.lm_head.weight.is_meta


def test_a_tied_weight_is_found_by_any_of_its_names(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama-tied", shard="5GB")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_weights(folder / "config.json", folder)
    for first in (0, 5):
        layer = PipelineModel(tiny("llama-tied"), seed=0, weights=PretrainedWeights(folder)).build(first)
        [loaded] = [
            p for n, p in layer.named_parameters() if n.endswith(("embed_tokens.weight", "lm_head.weight"))
        ]
        assert torch.equal(loaded, tensors["lm_head.weight"].float())
    whole = UnsplitModel(tiny("llama-tied"), seed=0, weights=PretrainedWeights(folder))
    assert whole.get_parameter("lm_head.weight") is whole.get_parameter("model.embed_tokens.weight")


def test_weights_without_the_base_model_s_prefix(tmp_path: Path) -> None:
    """As GPT-2's first checkpoints are: ``h.0...`` for ``transformer.h.0...``."""
    folder = save(tmp_path, "gpt2", shard="5GB")
    wanted = theirs(folder, torch.float32)
    tensors = {n.removeprefix("transformer."): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = PipelineModel(tiny("gpt2"), seed=0, weights=PretrainedWeights(folder))
    for index in range(model.num_layers):
        assert_loaded(model.build(index), wanted, torch.float32)


def test_each_stage_reads_only_its_own_and_only_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, "mixtral")
    read: list[StoredTensor] = []
    original = StoredTensor.read
    monkeypatch.setattr(
        StoredTensor, "read", lambda self, dtype: (read.append(self), original(self, dtype))[1]
    )
    everything: set[StoredTensor] = set()
    for stage in SPLIT:
        read.clear()
        model = PipelineModel(
            tiny("mixtral"), seed=0, dtype=torch.bfloat16, weights=PretrainedWeights(folder)
        )
        held = sum(p.nbytes for index in stage for p in model.build(index).parameters())
        assert len(read) == len(set(read))
        assert sum(tensor.bytes for tensor in read) == held
        assert not everything & set(read)
        everything |= set(read)
    assert everything == set(WeightFiles(folder).tensors.values())


def test_nothing_is_drawn_and_no_random_state_is_touched(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    before = torch.get_rng_state()
    one, other = (
        PipelineModel(tiny("llama"), seed=seed, weights=PretrainedWeights(folder)).build(1) for seed in (1, 2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_values_are_cast_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.model.weights.weight_files.PIECE", 64)
    values = {
        "a": torch.randn(7, 11),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
    }
    save_file(values, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path).tensors
    for name, value in values.items():
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(files[name].read(dtype), value.to(dtype)), name
    assert files["a"].same_as(files["a"]) and not files["a"].same_as(files["scalar"])


# --- damaged folders


def edit(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def shard_of(folder: Path, key: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][key]


def edit_index(folder: Path, change: Callable[[dict[str, str]], None]) -> None:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


Q = "model.layers.1.self_attn.q_proj.weight"


def truncate(folder: Path) -> None:
    path = folder / shard_of(folder, Q)
    path.write_bytes(path.read_bytes()[:-100])


def overwrite_header(folder: Path) -> None:
    path = folder / shard_of(folder, Q)
    path.write_bytes(path.read_bytes()[:8] + b"\x00" * 200 + path.read_bytes()[208:])


def huge_header(folder: Path) -> None:
    path = folder / shard_of(folder, Q)
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def drop_tensor(folder: Path) -> None:
    edit(folder, shard_of(folder, Q), lambda tensors: tensors.pop(Q))


def drop_everywhere(folder: Path) -> None:
    drop_tensor(folder)
    edit_index(folder, lambda entries: entries.pop(Q))


def other_shape(folder: Path) -> None:
    edit(folder, shard_of(folder, Q), lambda tensors: tensors.update({Q: torch.zeros(8, 32)}))


def other_vocabulary(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 120}))


def quantized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "fp8"}
    }
    (folder / "config.json").write_text(json.dumps(config))


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def pickle_with_code(folder: Path) -> None:
    no_weights(folder)
    torch.save({"a": Path}, folder / "pytorch_model.bin")


def text_for_weights(folder: Path) -> None:
    no_weights(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def empty_file(folder: Path) -> None:
    (folder / shard_of(folder, Q)).write_bytes(b"")


def no_numbers(value: float, *, legacy: bool = False) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        edit(folder, shard_of(folder, Q), lambda tensors: tensors[Q][3, 5:7].fill_(value))
        if legacy:
            tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
            no_weights(folder)
            torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    return change


def legacy_file(change: Callable[[bytes], bytes], content: Any = None) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        no_weights(folder)
        path = folder / "pytorch_model.bin"
        torch.save(content or {Q: torch.ones(32, 32)}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(change(path.read_bytes()))

    return write


DAMAGED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "truncated shard": (truncate, ["truncated", "header describes", ".safetensors"]),
    "missing shard": (lambda f: (f / shard_of(f, Q)).unlink(), ["is missing", "model.safetensors.index.json"]),
    "tensor not where the index says": (drop_tensor, ["does not contain " + Q, "index.json", "do not belong together"]),
    "tensor nowhere": (drop_everywhere, ["do not contain " + Q, "the model needs"]),
    "missing index entry": (
        lambda f: edit_index(f, lambda e: e.pop(Q)), ["do not contain " + Q, "the index does not name it"]
    ),
    "wrong shape": (other_shape, [Q, "[8, 32]", "[32, 32]"]),
    "another vocabulary": (other_vocabulary, ["[99, 32]", "[120, 32]", "config.json"]),
    "unreadable header": (overwrite_header, ["not a safetensors file", "damaged"]),
    "header longer than the file": (huge_header, ["not a safetensors file", "header would take"]),
    "empty shard": (empty_file, ["not a safetensors file"]),
    "a pointer in place of the weights": (text_for_weights, ["a pointer of git LFS", "git lfs pull"]),
    "NaN": (no_numbers(float("nan")), [f"{Q} contains NaN (2 of 1,024 values)"]),
    "infinity": (no_numbers(float("-inf")), [f"{Q} contains infinity (2 of 1,024 values)"]),
    "NaN in an old file": (no_numbers(float("nan"), legacy=True), [Q, "NaN", "pytorch_model.bin"]),
    "an old file with code": (legacy_file(bytes, {"a": Path}), ["weights_only", "pathlib"]),
    "an old file cut off": (legacy_file(lambda content: content[:-100]), ["pytorch_model.bin"]),
    "a training checkpoint": (
        legacy_file(bytes, {"state_dict": {}, "epoch": 3}), ["other than named tensors: 'state_dict', 'epoch'"]
    ),
    "broken index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["index can't be read"]),
    "index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'), ["weight_map"]
    ),
    "no weights": (no_weights, ["no weights in this folder", "pytorch_model.bin", "--init random"]),
    "a .bin with code in it": (pickle_with_code, ["weights_only", "safetensors"]),
    "a .bin that is none": (
        lambda f: (no_weights(f), (f / "pytorch_model.bin").write_bytes(b"junk")), ["weights_only", "pytorch_model.bin"]
    ),
    "quantized": (quantized, ["quantized", "--init random"]),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED, ids=lambda name: name.replace(" ", "-"))
def test_damaged_folder(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, words = DAMAGED[case]
    folder = save(tmp_path / "model", "llama")
    arguments = [str(folder / "config.json"), str(folder), str(tmp_path / "out.json")]
    assert main(arguments) == 0
    capsys.readouterr()
    damage(folder)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    missing = [word for word in words if word not in said]
    assert not missing, said
    assert str(folder) in said and ("hint" in said or "index" in case)
    assert "Traceback" not in said and len(said) < 700


LYING_THERE: dict[str, tuple[list[str], list[str]]] = {
    "adapter": (
        ["adapter_model.safetensors", "adapter_config.json"], ["an adapter without its base", "org/base", "merge_and"]
    ),
    "shards": (
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ["2 of 2 shards", "without their index model.safetensors.index.json", "copy or download"],
    ),
    "a shard": (["pytorch_model-00001-of-00009.bin"], ["1 of 9 shards", "bin.index.json and the missing"]),
    "gguf": (["tiny-Q4.gguf"], ["llama.cpp", "gguf_file='tiny-Q4.gguf'"]),
    "flax": (["flax_model.msgpack"], ["Flax", "from_flax=True"]),
    "tensorflow": (["tf_model.h5"], ["TensorFlow", "from_tf=True"]),
    "authors": (["consolidated.00.pth", "params.json"], ["consolidated.00.pth", "convert_"]),
    "deepspeed": (["zero_to_fp32.py", "latest"], ["checkpoint of DeepSpeed", "python zero_to_fp32.py"]),
    "variant": (["model.fp16.safetensors"], ["other names: model.fp16.safetensors", "name it model.safetensors"]),
    "pth": (["llama.pth", "optimizer.pt"], ["other names: llama.pth", "name it pytorch_model.bin"]),
    "onnx": (["model.onnx"], ["another format: model.onnx"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LYING_THERE)
def test_what_lies_there_in_place_of_weights(case: str, tmp_path: Path) -> None:
    names, words = LYING_THERE[case]
    for name in names:
        (tmp_path / name).write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(DstrainError) as refused:
        model_config_file(str(tmp_path), where="--model")
    assert all(word in str(refused.value) for word in words[:1]), refused.value
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DstrainError, match="there are no weights in this folder, but ") as refused:
        WeightFiles(tmp_path)
    assert all(word in str(refused.value) for word in words), refused.value


def test_values_that_the_type_of_the_training_does_not_hold(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", dtype=torch.float32)
    edit(folder, shard_of(folder, Q), lambda tensors: tensors[Q].fill_(1e6))
    model = PipelineModel(tiny("llama"), seed=0, dtype=torch.float16, weights=PretrainedWeights(folder))
    with pytest.raises(DstrainError, match=f"{Q} contains values that are too large for float16"):
        model.build(2)


def test_byte_order_marks(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama")
    for name in ("config.json", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert check_weights(folder / "config.json", folder)["absent"] == []


def test_loading_fails_as_the_check_does(tmp_path: Path) -> None:
    """Whoever changes files between the plan and the run."""
    folder = save(tmp_path, "llama")
    model, other = (PipelineModel(tiny("llama"), seed=0, weights=PretrainedWeights(folder)) for _ in range(2))
    no_numbers(float("nan"))(folder)
    with pytest.raises(DstrainError, match=f"{Q} contains NaN"):
        other.build(2)
    path = folder / shard_of(folder, Q)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DstrainError, match="ends in the middle"):
        model.build(2)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_that_is_missing(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, name, shard="5GB")
    gone = [
        key for key in load_file(folder / "model.safetensors") if ".layers.1." in key and ".experts.2." in key
    ]
    assert len(gone) == 3
    edit(folder, "model.safetensors", lambda tensors: tensors.pop(gone[0]))
    with pytest.raises(DstrainError, match="experts"):
        check_weights(folder / "config.json", folder)
    edit(folder, "model.safetensors", lambda tensors: [tensors.pop(key) for key in gone[1:]])
    with pytest.raises(DstrainError, match=r"\[3, .*\[4, "):
        check_weights(folder / "config.json", folder)


def test_two_values_for_one_weight(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama-tied", shard="5GB")
    same = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit(folder, "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": same.clone()}))
    check_weights(folder / "config.json", folder)
    edit(folder, "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": same + 1}))
    with pytest.raises(DstrainError, match="tied by the config, but differ"):
        check_weights(folder / "config.json", folder)


def test_what_is_superfluous_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path, "deepseek_v3", shard="5GB")
    extra = {"mtp.proj.weight": torch.zeros(3)}
    edit(folder, "model.safetensors", lambda tensors: tensors.update(extra))
    found = check_weights(folder / "config.json", folder)
    assert found["unexpected"] == ["mtp.proj.weight"] and found["absent"] == []
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    edit(folder, "model.safetensors", lambda tensors: tensors.pop(name))
    assert check_weights(folder / "config.json", folder)["absent"] == [name]


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    whole = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=tiny("gemma3_text"), vision_config=vision, mm_tokens_per_image=1)
    )
    whole.save_pretrained(tmp_path)
    found = check_weights(tmp_path / "config.json", tmp_path)
    assert {name.partition(".")[0] for name in found["unexpected"]} == {
        "vision_tower",
        "multi_modal_projector",
    }
    model = PipelineModel(load_config(tmp_path), seed=0, weights=PretrainedWeights(tmp_path))
    wanted = whole.model.language_model.state_dict() | {"embed_tokens.weight": whole.lm_head.weight}
    for index in range(model.num_layers):
        for name, value in model.build(index).named_parameters():
            key = name.removeprefix("model.") if name != "lm_head.weight" else "embed_tokens.weight"
            assert torch.equal(value, wanted[key]), name
