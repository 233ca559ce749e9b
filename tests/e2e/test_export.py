"""`dstrain export` and `dstrain generate` as a user types them, on one short, launched run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.data.tokenizing.tokenizers import ByteTokenizer
from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.e2e import Said, start
from tests.support.materials import LLAMA

pytestmark = pytest.mark.timeout(300)

# As a folder of quantized weights has it; the run starts at random, and with weights of its own.
QUANTIZED = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
# Of the tokenizer that the model came with, which the run does not take, and of code that lay beside it.
OTHERS = {
    "bos_token_id": 5,
    "eos_token_id": [6, 7],
    "pad_token_id": 8,
    "auto_map": {"AutoModel": "own.Model"},
}
MODEL = LLAMA | {"a_note": {"of": "the user's"}} | OTHERS | QUANTIZED
GENERATION = {"max_new_tokens": 7, "bos_token_id": 5, "eos_token_id": 6, "custom_generate": "own"}
ARGUMENTS = [
    *("--model", "own", "--data", "text.jsonl", "--tokenizer", "bytes", "--zero", "1", "--pipeline", "2"),
    *("--steps", "6", "--seq-len", "32", "--global-batch", "8", "--micro-batch", "2", "--lr", "1e-2"),
    *("--set", "save_every=2", "--set", "keep=3", "--set", "eval_every=2", "--set", "eval_samples=6"),
    *("--set", "sample_tokens=0", "--set", "validation=0.2", "--set", "save_weights=true", "--name", "small"),
]


class Bench:
    """A folder with a finished run, ``runs/small``."""

    def __init__(self, place: Path, environment: dict[str, str]) -> None:
        self.place, self.environment = place, environment
        self.run = RunFolder(place / "runs" / "small")

    def __call__(self, *arguments: str) -> Said:
        return start(self.place, self.environment, *arguments).said()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, materials: Path, cache: Path, repository: Path) -> Bench:
    place = tmp_path_factory.mktemp("export-here")
    (place / "own").mkdir()
    (place / "own" / "config.json").write_text(json.dumps(MODEL))
    (place / "own" / "generation_config.json").write_text(json.dumps(GENERATION))
    (place / "text.jsonl").symlink_to(materials / "text.jsonl")
    path = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
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
    return {
        r["step"]: r["validation_loss"] for r in read_metrics(bench.run.metrics) if "validation_loss" in r
    }


def told_losses(said: Said) -> list[float]:
    """The exported model's and the run's, as they were printed."""
    lines = [line.removeprefix("validation").split() for line in said.out.splitlines()]
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
    assert "quantization_config" not in config, "from_pretrained would look for quantized weights"
    assert "auto_map" not in config, "from_pretrained would look for code"
    tokens = [config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")]
    assert tokens == [None, 256, None], "those of the tokenizer that was trained with"
    written = json.loads((bench.place / "out" / "generation_config.json").read_text())
    assert written == {"max_new_tokens": 7, "eos_token_id": 256}
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


def test_generate_continues_the_prompt(bench: Bench, newest: Said) -> None:
    from dstrain.exporting.generate import generate

    said = bench("generate", "out", "the quick", "--tokens", "9", "--seed", "1")
    assert said.code == 0 and not said.err
    assert said.out.startswith("the quick") and len(said.out.strip()) > len("the quick")

    def written(temperature: float, seed: int) -> str:
        return generate(bench.place / "out", "the quick", tokens=9, temperature=temperature, seed=seed)

    assert f"{written(0.7, 1)}\n" == said.out != f"{written(0.7, 2)}\n"
    assert written(0.0, 1) == written(0.0, 2) != said.out.removesuffix("\n")


def test_a_failed_export_leaves_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from dstrain.errors import DstrainError
    from dstrain.exporting import convert

    monkeypatch.chdir(bench.place)
    before = set(bench.place.iterdir())
    checkpoint = bench.run.checkpoints / "step-000006"

    def differ(*args: Any) -> None:
        raise DstrainError("it differs", exit_code=1)

    monkeypatch.setattr(convert, "check_files", differ)
    with pytest.raises(DstrainError, match="it differs"):
        convert.export(bench.run, checkpoint, bench.place / "never", with_loss=False)
    assert set(bench.place.iterdir()) == before


def test_quantized_weights_are_not_announced(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What --no-loss checks is the folder's own config.json."""
    from dstrain.errors import DstrainError
    from dstrain.exporting import convert

    write = convert._write_descriptions

    def announce(folder: Path, *args: Any) -> None:
        write(folder, *args)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | QUANTIZED))

    monkeypatch.setattr(convert, "_write_descriptions", announce)
    checkpoint = bench.run.checkpoints / "step-000006"
    with pytest.raises(DstrainError, match="quantization_config"):
        convert.export(bench.run, checkpoint, bench.place / "announced", with_loss=False)
    assert not (bench.place / "announced").exists()


def test_what_the_disk_refuses_is_one_message(bench: Bench) -> None:
    from dstrain.errors import DstrainError
    from dstrain.exporting import convert

    checkpoint = bench.run.checkpoints / "step-000006"
    below_a_file = bench.place / "text.jsonl" / "out"
    with pytest.raises(DstrainError, match=r"can't be written: File exists .*text.jsonl") as caught:
        convert.export(bench.run, checkpoint, below_a_file, with_loss=False)
    assert caught.value.exit_code == 2 and caught.value.where == str(below_a_file)


def test_without_its_data_a_run_is_exported_all_the_same(
    bench: Bench, newest: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dstrain.exporting import convert

    data, aside = bench.place / "text.jsonl", bench.place / "text.aside"
    data.rename(aside)
    try:
        said = bench("export", "small", "dataless")
        data.write_text(aside.read_text() * 2)
        monkeypatch.chdir(bench.place)
        monkeypatch.setenv("DSTRAIN_CACHE", bench.environment["DSTRAIN_CACHE"])
        checkpoint = bench.run.checkpoints / "step-000006"
        changed = convert.export(bench.run, checkpoint, bench.place / "changed")
    finally:
        data.unlink(missing_ok=True)
        aside.rename(data)
    assert said.code == 0, said.err
    [line] = [line for line in said.out.splitlines() if line.startswith("validation loss: not computed: ")]
    assert "text.jsonl" in line
    assert told_losses(said) == pytest.approx([losses(bench)[6]], abs=1e-6), "the run's own stands there"
    assert changed["loss"] is None and "the data is not what" in changed["no_loss_because"]
    weights = (bench.place / "out" / "model.safetensors").read_bytes()
    for name in ("dataless", "changed"):
        assert (bench.place / name / "model.safetensors").read_bytes() == weights


def test_the_weights_of_the_start_may_be_gone(bench: Bench, newest: Said, tmp_path: Path) -> None:
    from dstrain.exporting.convert import _files_at_the_start
    from dstrain.planning.plan import Plan

    record = json.loads(bench.run.plan.read_text())
    record["config"]["init"], record["model"]["folder"] = "pretrained", str(tmp_path / "start")
    shutil.copytree(bench.place / "out", tmp_path / "start")
    plan = Plan.from_record(record)
    found = _files_at_the_start(plan)
    assert found is not None and "model.embed_tokens.weight" in found
    (tmp_path / "start" / "model.safetensors").unlink()
    assert _files_at_the_start(plan) is None
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "start" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert _files_at_the_start(plan) is None, "the index alone was left"


def test_generate_ends_with_the_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from dstrain.errors import DstrainError
    from dstrain.exporting.generate import generate

    config = GPT2Config(vocab_size=257, n_positions=64, n_embd=16, n_layer=1, n_head=2)
    config.bos_token_id = config.eos_token_id = None
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    capsys.readouterr()
    generate(tmp_path, "x" * 60, tokens=4, temperature=0, seed=0)
    four = capsys.readouterr()
    assert "dstrain: " not in four.err
    generate(tmp_path, "x" * 60, tokens=200, temperature=0, seed=0)
    many = capsys.readouterr()
    assert many.out == four.out
    assert many.err.endswith(
        "dstrain: --tokens 200 is reduced to 4: the model has 64 positions, and the prompt takes 60\n"
    )
    with pytest.raises(
        DstrainError,
        match="64 tokens, which leaves no room for a continuation within the model's 64 positions",
    ):
        generate(tmp_path, "x" * 64, tokens=1, temperature=0, seed=0)
    assert not capsys.readouterr().out


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
    said = bench("export", "damaged", "other", "--step", "6")
    check(said, "no complete checkpoint of step 6", "layer_01-model_states.pt is missing", "steps: 2, 4")
    check(bench("export", "damaged", "other"), "layer_01-model_states.pt", "can't be read")
    assert not (bench.place / "other").exists()


def check(said: Said, *words: str) -> None:
    assert said.code == 2, said
    assert "Traceback" not in said.err + said.out and not said.out
    assert said.err.lower().count("error:") == 1 and all(word in said.err for word in words), said.err
    assert len(said.err) < 1200, "one message"


# Arguments, and what the message must hold.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no such run": (["export", "none", "out"], ["RUN", "'none' is not a run folder", "hint"]),
    "no OUT": (["export", "run"], ["OUT", "Missing argument"]),
    "no checkpoint": (["export", "run", "out"], ["run has no complete checkpoint", "dstrain resume run"]),
    "OUT is full": (["export", "saved", "full"], ["OUT: full is not empty", "hint"]),
    "OUT is a file": (["export", "saved", "file"], ["OUT: file is a file", "hint"]),
    "OUT below a file": (["export", "saved", "file/er/out"], ["OUT: file/er/out can't be created", "file is a file"]),
    "step that is none": (["export", "saved", "out", "--step", "7"], ["--step", "step 7", "available steps: 3, 12"]),
    "step in words": (["export", "saved", "out", "--step", "last"], ["--step", "'last'"]),
    "dtype that is none": (["export", "saved", "out", "--dtype", "int8"], ["--dtype", "'bf16'"]),
    "generate from nothing": (["generate", "none", "x"], ["FOLDER", "none is not a model folder", "dstrain export"]),
    "generate without prompt": (["generate", "full"], ["PROMPT", "Missing argument"]),
    "generate no tokens": (["generate", "full", "x", "--tokens", "0"], ["--tokens", "x>=1"]),
    "generate with a cold wind": (["generate", "full", "x", "--temperature", "-1"], ["--temperature", "x>=0"]),
    "generate from an unknown model": (["generate", "odd", "x"], ["odd/config.json", "'lama'", "llama"]),
    "generate without tokenizer": (["generate", "bare", "x"], ["bare: the folder has no tokenizer", "put its"]),
    "generate with a broken tokenizer": (["generate", "torn", "x"], ["torn: transformers can't load this tokenizer"]),
    "generate without weights": (["generate", "light", "x"], ["light: this model can't be loaded"]),
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
    configs = {"full": {}, "odd": {"model_type": "lama"}, "bare": LLAMA, "torn": LLAMA, "light": LLAMA}
    for name, content in configs.items():
        (place / name).mkdir()
        (place / name / "config.json").write_text(json.dumps(content))
    (place / "torn" / "tokenizer.json").write_text("{")
    ByteTokenizer().save_pretrained(place / "light")
    (place / "file").write_text("x")
    before = sorted(place.rglob("*"))
    check(dstrain_here(*arguments), *words)
    assert sorted(place.rglob("*")) == before
