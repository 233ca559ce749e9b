"""Pretrained weights, names on the hub and ``tokenizer: auto``, as a user types them. No network is asked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.e2e import Said, one_message
from tests.support.materials import LLAMA

GOOD = ["--data", "text.jsonl", "--seq-len", "32", "--name", "x", "--global-batch", "4"]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as Hugging Face writes it, bf16 in shards, with a tokenizer of its own."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from dstrain.data.tokenizing.tokenizers import ByteTokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def trained(place: Path, checkpoint: Path) -> Path:
    """The same in the folder that the user stands in, to be damaged."""
    return Path(shutil.copytree(checkpoint, place / "trained"))


@pytest.fixture
def hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> Path:
    """A cache of the hub that holds tiny/llama at its branch ``main``; no network."""
    home = tmp_path_factory.mktemp("hub")
    repository, commit = home / "hub" / "models--tiny--llama", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(checkpoint, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return repository / "snapshots" / commit


def plan_of(said: Said) -> dict:
    assert said.code == 0, said
    return json.loads(said.out)


def test_training_starts_from_the_weights(
    trained: Path, place: Path, dstrain: Callable[..., Said], checkpoint: Path
) -> None:
    """Through the launcher. A learning rate that changes nothing leaves the weights as they were."""
    import torch
    from safetensors.torch import load_file

    settings = [
        f"--set={s}"
        for s in ("weight_decay=0", "save_weights=true", "sample_tokens=0", "lr_schedule=constant")
    ]
    said = dstrain(
        "run", *GOOD, "--model", "trained", "--init", "pretrained",
        "--steps", "2", "--pipeline", "2", "--lr", "1e-30", *settings
    )  # fmt: skip
    assert said.code == 0, said
    wanted = {k: v for file in checkpoint.glob("*.safetensors") for k, v in load_file(file).items()}
    wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    found = {
        k: v for file in (place / "runs/x/weights").glob("*.safetensors") for k, v in load_file(file).items()
    }
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name].float()) for name in wanted)
    plan = json.loads((place / "runs/x/plan.json").read_text())
    assert plan["model"]["init"] == "pretrained" and plan["model"]["folder"] == str(trained)
    assert plan["data"]["tokenizer"] == str(trained)


@pytest.mark.parametrize("init", ["random", "pretrained"])
def test_a_name_on_the_hub_is_its_folder_in_the_cache(
    init: str, hub: Path, dstrain_here: Callable[..., Said]
) -> None:
    plan = plan_of(dstrain_here("plan", *GOOD, "--model", "tiny/llama", "--init", init, "--json"))
    assert plan["model"]["folder"] == str(hub) and plan["data"]["tokenizer"] == str(hub)
    at_commit = dstrain_here("plan", *GOOD, "--model", f"tiny/llama@{hub.name}", "--init", init, "--json")
    assert plan_of(at_commit)["model"] == plan["model"]


def test_a_tokenizer_of_the_hub_and_a_name_without_an_organisation(
    hub: Path, dstrain_here: Callable[..., Said]
) -> None:
    shutil.copytree(hub.parents[1], hub.parents[2] / "models--gpt2")
    for name, folder in (("tiny/llama", hub), ("gpt2", hub.parents[2] / "models--gpt2/snapshots" / hub.name)):
        plan = plan_of(dstrain_here("plan", *GOOD, "--model", "quickstart", "--tokenizer", name, "--json"))
        assert plan["data"]["tokenizer"] == str(folder)
    assert plan_of(dstrain_here("plan", *GOOD, "--model", "gpt2", "--json"))["model"]["folder"] == str(folder)
    missing = dstrain_here("plan", *GOOD, "--tokenizer", "tiny/other")
    one_message(missing, ["--tokenizer", "'tiny/other' is not a local folder", "HF_HUB_OFFLINE", "hint"])


def test_a_name_that_the_cache_lacks(hub: Path, dstrain_here: Callable[..., Said]) -> None:
    words = ["--model", "'tiny/other' is not a local folder", "HF_HUB_OFFLINE", "hint"]
    one_message(dstrain_here("plan", *GOOD, "--model", "tiny/other"), words)
    one_message(
        dstrain_here("plan", *GOOD, "--model", "tiny/llama@v9"), ["'tiny/llama@v9'", "HF_HUB_OFFLINE"]
    )


def test_a_hub_that_can_not_be_reached(
    hub: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens at the discard port
    said = dstrain_here("plan", *GOOD, "--model", "tiny/other")
    one_message(said, ["--model", "'tiny/other' is not a local folder", "can't be reached", "127.0.0.1:9"])
    # What the cache holds is used all the same.
    assert dstrain_here("plan", *GOOD, "--model", "tiny/llama").code == 0


def test_weights_of_the_hub_that_were_not_fetched(hub: Path, dstrain_here: Callable[..., Said]) -> None:
    for path in hub.glob("*.safetensors*"):
        path.unlink()
    assert dstrain_here("plan", *GOOD, "--model", "tiny/llama").code == 0
    said = dstrain_here("plan", *GOOD, "--model", "tiny/llama", "--init", "pretrained")
    one_message(said, ["no weights in this folder", str(hub)])


def test_damaged_weights_start_nothing(
    trained: Path, place: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr("dstrain.api.launch_attempt.supervise", lambda *a, **k: started.append(a))
    arguments = ["run", *GOOD, "--model", "trained", "--init", "pretrained"]
    assert dstrain_here("plan", *arguments[1:]).code == 0  # and the good result is kept
    shard = sorted(trained.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    one_message(dstrain_here(*arguments), ["truncated", shard.name, "hint"])
    shard.unlink()
    one_message(dstrain_here(*arguments), ["is missing", shard.name])
    assert not started and not (place / "runs").exists()


def test_a_built_in_shape_has_no_weights(dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("plan", *GOOD, "--model", "quickstart", "--init", "pretrained")
    one_message(said, ["--init", "quickstart is a built-in shape, which has no weights", "--init random"])


def test_superfluous_tensors_are_named_in_one_line(trained: Path, dstrain_here: Callable[..., Said]) -> None:
    import torch
    from safetensors.torch import save_file

    index = trained / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= {f"extra.{n}": "extra.safetensors" for n in range(5)}
    index.write_text(json.dumps(content))
    save_file({f"extra.{n}": torch.zeros(2) for n in range(5)}, trained / "extra.safetensors")
    for _ in range(2):  # checked, and from the cache
        said = dstrain_here("plan", *GOOD, "--model", "trained", "--init", "pretrained")
        assert said.code == 0
        assert (
            said.err
            == "dstrain: 5 tensors are not part of the model, and are ignored: extra.0, extra.1, extra.2, ...\n"
        )


def test_tokenizer_auto(trained: Path, dstrain_here: Callable[..., Said]) -> None:
    def tokenizer(*arguments: str) -> str:
        return plan_of(dstrain_here("plan", *GOOD, *arguments, "--json"))["data"]["tokenizer"]

    assert tokenizer("--model", "trained") == str(trained)
    assert tokenizer("--model", "trained", "--tokenizer", "bytes") == "bytes"
    assert tokenizer("--model", "model") == "bytes"  # a folder without one
    assert tokenizer("--model", "quickstart") == "bytes"
