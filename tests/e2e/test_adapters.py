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


def test_a_run_starts_from_an_adapter(base: Path, place: Path, dstrain: Callable[..., Said]) -> None:
    """One that dstrain wrote, and one that PEFT wrote; in each layout with the same loss as the run before it had."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    first = dstrain(
        "run", *GOOD, *CALM, "--adapter", "dora", "--adapter-r", "4", "--steps", "4", "--name", "x"
    )
    assert first.code == 0, first
    exported = dstrain("export", "x", "mine")
    assert exported.code == 0, exported
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=["q_proj"], r=2, lora_alpha=6, modules_to_save=["lm_head"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(place / "pefts")
    for folder, words in (("mine", "dora, r 4, alpha 8"), ("pefts", "lora, r 2, alpha 6")):
        start = ["--recipe", "sft-lora", f"--set=adapter.from={folder}", "--set=precision=fp32"]
        found = []
        for name, layout in (("a", []), ("b", ["--pipeline", "2", "--zero", "1"])):
            options = ["--steps", "2", "--name", f"{folder}-{name}", "--set=micro_batch=null", *layout]
            said = dstrain("run", *start, *GOOD, *CALM, *options)
            assert said.code == 0, said
            assert words in said.out
            found.append(losses(place, f"{folder}-{name}"))
        assert found[0] == pytest.approx(found[1], rel=1e-5)
        if folder == "mine":  # it goes on where the run before it ended
            assert found[0][1] < losses(place, "x")[1]
    resumed = dstrain("resume", "pefts-b", "--pipeline", "1", "--steps", "4")
    assert resumed.code == 0, resumed
    one_message(
        dstrain("run", *start, *GOOD, *CALM, "--adapter-r", "16"),
        ["adapter.r is 16, but 2 in the adapter to start from"],
    )


def test_an_adapter_to_start_from_is_refused_where_it_does_not_belong(
    base: Path, place: Path, dstrain: Callable[..., Said]
) -> None:
    from peft import IA3Config, LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    def write(name: str, config: object) -> Path:
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)  # type: ignore[arg-type]
        model.save_pretrained(place / name)
        return place / name

    def refused(name: str, *options: str) -> Said:
        return dstrain("run", *GOOD, *CALM, "--adapter", "lora", f"--set=adapter.from={name}", *options)

    good = write("good", LoraConfig(target_modules=["q_proj"], r=2))
    config = json.loads((good / "adapter_config.json").read_text())
    write("ia3", IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    write("bias", LoraConfig(target_modules=["q_proj"], bias="all"))
    for name, change in (
        ("pissa", {"init_lora_weights": "pissa_niter_4"}),
        ("some", {"layers_to_transform": [0]}),
        ("both", {"use_dora": True, "use_rslora": True}),
        ("more", {"target_modules": ["q_proj", "v_proj"]}),
        ("other", {"target_modules": ["query_key_value"]}),
        ("rank", {"r": 3}),
    ):
        shutil.copytree(good, place / name)
        (place / name / "adapter_config.json").write_text(json.dumps({**config, **change}))
    shutil.copytree(good, place / "empty")
    (place / "empty" / "adapter_model.safetensors").unlink()
    shutil.copytree(good, place / "cut")
    weights = (place / "cut" / "adapter_model.safetensors").read_bytes()
    (place / "cut" / "adapter_model.safetensors").write_bytes(weights[:40])
    shutil.copytree(good, place / "wider")
    tensors = load_file(good / "adapter_model.safetensors")
    tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = next(
        iter(tensors.values())
    ).clone()
    save_file(tensors, place / "wider" / "adapter_model.safetensors")
    for name, words in (
        ("nowhere", "is not an adapter folder"),
        ("base", "is not an adapter folder"),
        ("ia3", "PEFT's type IA3"),
        ("bias", 'its bias is "all"'),
        ("pissa", "its initial values (pissa_niter_4) have changed the model's own weights"),
        ("some", "its layers_to_transform is [0]"),
        ("both", "an adapter of DoRA that is scaled as rsLoRA's"),
        ("more", "is missing, and the model needs"),
        ("other", "PEFT can't adapt this llama model"),
        ("rank", "and the model needs"),
        ("empty", "has no adapter_model.safetensors"),
        ("cut", "the adapter's weights can't be read"),
        ("wider", "the model has no place for the adapter's"),
    ):
        one_message(refused(name), [words])
    one_message(refused("good", "--set=adapter.targets=[v_proj]"), ["adapter.targets is"])
