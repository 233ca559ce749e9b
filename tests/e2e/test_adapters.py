"""Adapters, as a user types them: trained, resumed in another layout, exported, merged, and loaded by PEFT."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.e2e import Said, one_message
from tests.support.materials import LLAMA

GOOD = [
    "--data",
    "text.jsonl",
    "--seq-len",
    "32",
    "--global-batch",
    "4",
    "--model",
    "base",
    "--init",
    "pretrained",
]
CALM = [
    f"--set={s}" for s in ("sample_tokens=0", "lr_schedule=constant", "lr=1e-2", "eval_every=2", "keep=9")
]


@pytest.fixture
def base(place: Path) -> Path:
    """A model folder with tied weights and a tokenizer, whose frozen head can be learned through."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dstrain.data.tokenizing.tokenizers import ByteTokenizer

    torch.manual_seed(0)
    config = LlamaConfig(**{**LLAMA, "tie_word_embeddings": True, "initializer_range": 0.2})
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "base")
    ByteTokenizer().save_pretrained(place / "base")
    return place / "base"


def losses(place: Path, name: str) -> dict[int, float]:
    return {
        r["step"]: r["loss"] for r in read_metrics(RunFolder(place / "runs" / name).metrics) if "loss" in r
    }


def test_it_goes_on_in_another_layout_and_is_exported_and_merged(
    base: Path, place: Path, dstrain: Callable[..., Said]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    adapter = ["--adapter", "dora", "--adapter-r", "4", "--adapter-alpha", "16", "--set=adapter.dropout=0.1"]
    whole = dstrain("run", *GOOD, *CALM, *adapter, "--steps", "6", "--name", "whole")
    assert whole.code == 0, whole
    assert "dora, r 4, alpha 16" in whole.out
    cut = dstrain(
        *("run", *GOOD, *CALM, *adapter, "--steps", "6", "--name", "cut", "--pipeline", "2", "--zero", "2"),
        *("--save-every", "3"),
    )
    assert cut.code == 0, cut
    shutil.rmtree(place / "runs" / "cut" / "checkpoints" / "step-000006")
    resumed = dstrain("resume", "cut", "--pipeline", "1", "--zero", "3", "--data-parallel", "2")
    assert resumed.code == 0, resumed
    wanted = losses(place, "whole")
    assert losses(place, "cut") == pytest.approx(wanted, rel=1e-5) and wanted[6] < wanted[1]

    plan = json.loads((place / "runs" / "cut" / "plan.json").read_text())
    assert plan["model"]["adapter_parameters"] < plan["model"]["parameters"] / 2

    for arguments in (
        ("export", "cut", "adapter"),
        ("export", "cut", "merged", "--merge"),
        ("merge", "adapter", "m"),
    ):
        said = dstrain(*arguments)
        assert said.code == 0, said
    assert (place / "m" / "model.safetensors").read_bytes() == (
        place / "merged" / "model.safetensors"
    ).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        before = model(ids).logits
        with_peft = PeftModel.from_pretrained(model, str(place / "adapter"))(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(place / "merged")(ids).logits
    assert not torch.allclose(with_peft, before, atol=1e-2)
    assert torch.allclose(with_peft, merged, atol=1e-4)
    answer = dstrain("generate", "adapter", "def ", "--tokens", "3", "--temperature", "0")
    assert (
        answer.code == 0
        and answer.out == dstrain("generate", "m", "def ", "--tokens", "3", "--temperature", "0").out
    )


def test_a_tied_weight_that_an_adapter_changes_once_is_two_weights_when_merged(
    base: Path, place: Path, dstrain: Callable[..., Said]
) -> None:
    from transformers import AutoModelForCausalLM

    section = "--set=adapter={targets: [q_proj], modules_to_save: [lm_head]}"
    said = dstrain("run", *GOOD, *CALM, section, "--steps", "2", "--name", "x", "--pipeline", "2")
    assert said.code == 0, said
    exported = dstrain("export", "x", "merged", "--merge")
    assert exported.code == 0, exported
    numbers = [
        float(word)
        for word in exported.out.split()
        if word.count(".") == 1 and word[-1].isdigit() and len(word) > 6
    ]
    assert math.isclose(numbers[0], numbers[1], rel_tol=1e-5), exported.out
    model = AutoModelForCausalLM.from_pretrained(place / "merged")
    assert not model.config.tie_word_embeddings
    assert not (model.lm_head.weight == model.model.embed_tokens.weight).all()


def test_an_adapter_is_refused_where_it_does_not_belong(
    base: Path, place: Path, dstrain: Callable[..., Said]
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], r=2)
    )
    adapted.save_pretrained(place / "good")
    assert dstrain("merge", "good", "out").code == 0

    def refused(name: str) -> Said:
        said = dstrain("merge", name, f"out-{name}")
        assert said.code != 0 and not (place / f"out-{name}").exists()
        return said

    config = json.loads((place / "good" / "adapter_config.json").read_text())
    for name, change, reason in (
        ("rank", {"r": 4}, "the model needs [4, "),
        ("targets", {"target_modules": ["q_proj", "v_proj"]}, "is missing, and the model needs"),
        ("fewer", {"target_modules": ["v_proj"]}, "the model has no place for"),
        ("nothing", {"target_modules": ["query"]}, "PEFT can't adapt this llama model"),
        ("type", {"peft_type": "IA3"}, "adapter_config.json"),
    ):
        shutil.copytree(place / "good", place / name)
        (place / name / "adapter_config.json").write_text(json.dumps({**config, **change}))
        one_message(refused(name), [reason])
    shutil.copytree(place / "good", place / "short")
    weights = place / "short" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    one_message(refused("short"), ["can't be read"])
    shutil.copytree(place / "good", place / "none")
    (place / "none" / "adapter_model.safetensors").unlink()
    one_message(refused("none"), ["has no adapter_model.safetensors"])
    other = dstrain("merge", "good", "out2", "--base", str(place / "model"))
    assert other.code != 0


def test_a_merged_folder_speaks_of_its_own_files_alone_and_appears_whole(base: Path, place: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from dstrain.errors import DstrainError
    from dstrain.exporting import merge_adapter

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], r=2)
    )
    adapted.save_pretrained(place / "good")
    for name in ("config.json", "generation_config.json"):
        known = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**known, "auto_map": {"x": "own.X"}, "assistant_model": "x"}))
    good, out, aside = place / "good", place / "out", place / "aside"
    assert merge_adapter.merge(good, base, out, aside=aside, dtype="bf16")["dtype"] == "bf16"
    config = json.loads((out / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    for name in ("config.json", "generation_config.json"):
        assert not {"auto_map", "assistant_model"} & json.loads((out / name).read_text()).keys()
    before = set(place.iterdir())
    below_a_file = place / "text.jsonl" / "out"
    with pytest.raises(DstrainError, match=r"can't be written: File exists .*text.jsonl") as caught:
        merge_adapter.merge(good, base, below_a_file, aside=aside)
    assert caught.value.where == str(below_a_file)
    assert set(place.iterdir()) == before


def test_an_adapter_of_random_weights_can_only_be_merged(place: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain(
        *("run", "--data", "text.jsonl", "--seq-len", "32", "--global-batch", "4", "--model", "model", *CALM),
        *("--adapter", "lora", "--steps", "1", "--name", "x"),
    )
    assert said.code == 0, said
    one_message(dstrain("export", "x", "out"), ["random initial weights", "--merge"])
    merged = dstrain("export", "x", "out", "--merge")
    assert merged.code == 0, merged
    plain = dstrain("resume", "x", "--set", "adapter=none", "--steps", "2")
    one_message(plain, ["the checkpoint was made with adapter"])


def test_a_run_does_not_go_on_with_an_adapter_for_other_weights(
    base: Path, place: Path, dstrain: Callable[..., Said]
) -> None:
    from safetensors.torch import load_file, save_file

    run = dstrain("run", *GOOD, *CALM, "--adapter", "lora", "--steps", "2", "--name", "x")
    assert run.code == 0, run
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 0.1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    one_message(dstrain("resume", "x", "--steps", "4"), ["base = ", "which no checkpoint holds"])
