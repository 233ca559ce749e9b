"""`dstrain export` and `dstrain generate` as a user types them, on one short, launched run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.plan.run_folder import RunFolder, read_metrics
from tests.e2e.conftest import LLAMA, Said

pytestmark = pytest.mark.timeout(300)

MODEL = LLAMA | {"a_note": {"of": "the user's"}, "eos_token_id": None}
GENERATION = {"max_new_tokens": 7, "eos_token_id": 256}
ARGUMENTS = [
    *("--model", "own", "--data", "text.jsonl", "--tokenizer", "bytes", "--zero", "1", "--pipeline", "2"),
    *("--steps", "6", "--seq-len", "32", "--global-batch", "8", "--micro-batch", "2", "--lr", "1e-2"),
    *("--set", "save_every=2", "--set", "keep=3", "--set", "eval_every=2", "--set", "eval_samples=6"),
    *("--set", "sample_tokens=0", "--set", "held_out=0.2", "--set", "save_weights=true", "--name", "small"),
]


class Bench:
    """A folder with a finished run, ``runs/small``."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place, self.environment = place, environment
        self.run = RunFolder(place / "runs" / "small")

    def __call__(self, *arguments: str) -> Said:
        done = subprocess.run(
            [sys.executable, "-m", "dstrain.cli.main", *arguments],
            cwd=self.place,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        return Said(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def bench(
    tmp_path_factory: pytest.TempPathFactory, materials: Path, cache: Path, repository_root: Path
) -> Bench:
    place = tmp_path_factory.mktemp("export-here")
    (place / "own").mkdir()
    (place / "own" / "config.json").write_text(json.dumps(MODEL))
    (place / "own" / "generation_config.json").write_text(json.dumps(GENERATION))
    (place / "text.jsonl").symlink_to(materials / "text.jsonl")
    path = os.pathsep.join(filter(None, [str(repository_root), os.environ.get("PYTHONPATH")]))
    own = {"DSTRAIN_CACHE": str(cache), "DS_ACCELERATOR": "cpu", "COLUMNS": "200", "PYTHONPATH": path}
    bench = Bench(place, {**os.environ, **own})
    said = bench("run", *ARGUMENTS)
    assert said.code == 0, said.out + said.err
    return bench


@pytest.fixture(scope="module")
def newest(bench: Bench) -> Said:
    said = bench("export", "small", "out")
    assert said.code == 0, said.out + said.err
    return said


def losses(bench: Bench) -> dict[int, float]:
    return {r["step"]: r["held_out_loss"] for r in read_metrics(bench.run.metrics) if "held_out_loss" in r}


def told_losses(said: Said) -> list[float]:
    """The exported model's and the run's, as they were printed."""
    lines = [line.removeprefix("held-out").split() for line in said.out.splitlines()]
    return [float(words[0]) for words in lines if words and words[0].replace(".", "").isdigit()]


def test_from_pretrained_gives_what_the_ranks_had(bench: Bench, newest: Said) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(bench.place / "out", output_loading_info=True)
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    trained = [load_file(path) for path in sorted(bench.run.weights.glob("*.safetensors"))]
    assert len(trained) == 2
    found = model.state_dict()
    assert set(found) == set().union(*trained)
    for stage in trained:
        for name, value in stage.items():
            assert torch.equal(found[name], value), name


def test_the_losses_stand_side_by_side(bench: Bench, newest: Said) -> None:
    exported, run = told_losses(newest)
    assert run == pytest.approx(losses(bench)[6], abs=1e-6)
    assert exported == pytest.approx(run, abs=1e-5)
    assert abs(losses(bench)[6] - losses(bench)[2]) > 1e-2, "a loss of another step would not be noticed"
    assert "checked" in newest.out
    assert all(line.startswith("dstrain: ") for line in newest.err.splitlines()), (
        "progress, on a slow machine"
    )


def test_configuration_tokenizer_and_generation_come_along(bench: Bench, newest: Said) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    config = json.loads((bench.place / "out" / "config.json").read_text())
    assert config["a_note"] == MODEL["a_note"] and config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float32" and config["tie_word_embeddings"] is True
    generation = GenerationConfig.from_pretrained(bench.place / "out")
    assert (generation.max_new_tokens, generation.eos_token_id) == (7, 256)
    tokenizer = AutoTokenizer.from_pretrained(bench.place / "out")
    text = "naïve\n\t — 中 🙂"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text and tokenizer.eos_token_id == 256
    readable = [path.stat().st_mode & 0o044 for path in (bench.place / "out").iterdir()]
    assert all(readable), "others may read all of it"


def test_an_earlier_step_in_another_precision(bench: Bench) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    said = bench("export", str(bench.run.path), "deep/er/early", "--step", "2", "--dtype", "bf16")
    assert said.code == 0, said.err
    exported, run = told_losses(said)
    assert run == pytest.approx(losses(bench)[2], abs=1e-6) and exported == pytest.approx(run, abs=0.02)
    model = AutoModelForCausalLM.from_pretrained(bench.place / "deep" / "er" / "early")
    assert model.dtype == torch.bfloat16
    assert [path.name for path in (bench.place / "deep" / "er").iterdir()] == ["early"], (
        "nothing left beside it"
    )


def test_generate_continues_the_prompt(
    bench: Bench, newest: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    from dstrain.export.generate import generate

    said = bench("generate", "out", "the quick", "--tokens", "9", "--seed", "1")
    assert said.code == 0 and not said.err
    assert said.out.startswith("the quick") and len(said.out.strip()) > len("the quick")

    def spoken(temperature: float, seed: int) -> str:
        generate(bench.place / "out", "the quick", tokens=9, temperature=temperature, seed=seed)
        return capsys.readouterr().out

    assert spoken(0.7, 1) == said.out != spoken(0.7, 2)
    assert spoken(0.0, 1) == spoken(0.0, 2) != said.out


def test_a_failed_export_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from dstrain.errors import DstrainError
    from dstrain.export import convert

    monkeypatch.chdir(bench.place)
    before = set(bench.place.iterdir())
    checkpoint = bench.run.checkpoints / "step-000006"

    def differ(*args: Any) -> None:
        raise DstrainError("it differs", exit_code=1)

    monkeypatch.setattr(convert, "check_files", differ)
    with pytest.raises(DstrainError, match="it differs"):
        convert.export(bench.run, checkpoint, bench.place / "never", with_loss=False)
    assert set(bench.place.iterdir()) == before


def test_a_changed_model_file_is_refused(bench: Bench) -> None:
    path = bench.place / "own" / "config.json"
    before = path.read_text()
    path.write_text(json.dumps(MODEL | {"hidden_size": 64}))
    try:
        said = bench("export", "small", "other")
    finally:
        path.write_text(before)
    check(said, "config.json: the model's configuration has changed", "hint:")
    assert not (bench.place / "other").exists()


def test_a_damaged_checkpoint_is_refused(bench: Bench) -> None:
    """One whose files are not those of its manifest is no checkpoint; same size, other bytes: it can't be read."""
    copy = bench.place / "runs" / "damaged"
    shutil.copytree(bench.run.path, copy)
    newest = copy / "checkpoints" / "step-000006" / "state" / "layer_01-model_states.pt"
    newest.unlink()
    older = copy / "checkpoints" / "step-000004" / "state" / "layer_01-model_states.pt"
    older.write_bytes(bytes(older.stat().st_size))
    check(bench("export", "damaged", "other", "--step", "6"), "no checkpoint of step 6", "there are: 2, 4")
    check(bench("export", "damaged", "other"), "layer_01-model_states.pt", "can't be read")
    assert not (bench.place / "other").exists()


def check(said: Said, *words: str) -> None:
    assert said.code == 2, said
    assert "Traceback" not in said.err + said.out and not said.out
    assert said.err.lower().count("error:") == 1 and all(word in said.err for word in words), said.err
    assert len(said.err) < 1200, "one message"


# Arguments, and what the message must hold.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no such run": (["export", "none", "out"], ["RUN", "'none' is no run folder", "hint"]),
    "no OUT": (["export", "run"], ["OUT", "Missing argument"]),
    "no checkpoint": (["export", "run", "out"], ["run has no complete checkpoint", "dstrain resume run"]),
    "OUT is full": (["export", "saved", "full"], ["OUT: full is not empty", "hint"]),
    "OUT is a file": (["export", "saved", "file"], ["OUT: file is a file", "hint"]),
    "step that is none": (["export", "saved", "out", "--step", "7"], ["--step", "step 7", "there are: 3, 12"]),
    "step in words": (["export", "saved", "out", "--step", "last"], ["--step", "'last'"]),
    "dtype that is none": (["export", "saved", "out", "--dtype", "int8"], ["--dtype", "'bf16'"]),
    "generate from nothing": (["generate", "none", "x"], ["FOLDER", "none is no model folder", "dstrain export"]),
    "generate without prompt": (["generate", "full"], ["PROMPT", "Missing argument"]),
    "generate no tokens": (["generate", "full", "x", "--tokens", "0"], ["--tokens", "x>=1"]),
    "generate with a cold wind": (["generate", "full", "x", "--temperature", "-1"], ["--temperature", "x>=0"]),
    "generate from an unknown model": (["generate", "odd", "x"], ["odd/config.json", "'lama'", "llama"]),
    "generate without weights": (["generate", "bare", "x"], ["bare", "can't be loaded"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistake(
    arguments: list[str], words: list[str], place: Path, dstrain_here: Callable[..., Said]
) -> None:
    for name in ("run", "saved"):
        (place / "runs" / name).mkdir(parents=True)
        (place / "runs" / name / "config.yaml").write_text("steps: 1\n")
    for step in (3, 12):
        folder = place / "runs" / "saved" / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "file").write_text("x")
        (folder / "manifest.json").write_text(json.dumps({"step": step, "files": {"file": 1}}))
    for name, content in {"full": {}, "odd": {"model_type": "lama"}, "bare": LLAMA}.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(content))
    (place / "file").write_text("x")
    before = sorted(place.rglob("*"))
    check(dstrain_here(*arguments), *words)
    assert sorted(place.rglob("*")) == before
