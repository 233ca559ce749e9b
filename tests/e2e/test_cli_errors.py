"""What a new user gets wrong: each mistake gets one message with a place and a way out, and starts nothing."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import LLAMA, Said

GOOD = ["--model", "model", "--data", "text.jsonl", "--seq-len", "32", "--name", "x"]


@dataclass(frozen=True)
class Mistake:
    """``arguments`` behind ``dstrain``, and words that stderr must hold: what, where, and a hint or reason.

    ``files``: by name, text, bytes, or JSON values to write before; None makes a folder.
    """

    arguments: list[str]
    words: list[str]
    files: dict[str, object]


def run(*arguments: str, words: list[str], files: dict[str, object] | None = None) -> Mistake:
    return Mistake(["run", *GOOD, *arguments], words, files or {})


def bare(*arguments: str, words: list[str], files: dict[str, object] | None = None) -> Mistake:
    return Mistake(list(arguments), words, files or {})


MISTAKES = {
    # --- how it is said
    "unknown command": bare("rnu", words=["'rnu'", "did you mean 'run'"]),
    "unknown command, nothing near": bare("xyzzy", words=["xyzzy", "--help"]),
    "unknown flag": run("--zerp", "2", words=["dstrain run --help", "--zerp", "--zero"]),
    "flag without its value": run("--zero", words=["--zero", "argument"]),
    "zero 4": run("--zero", "4", words=["--zero", "0<=x<=3"]),
    "zero in words": run("--zero", "two", words=["--zero", "'two'"]),
    "steps 0": run("--steps", "0", words=["--steps", "x>=1"]),
    "negative steps": run("--steps", "-5", words=["--steps", "x>=1"]),
    "precision that is none": run("--precision", "fp8", words=["--precision", "'bf16'"]),
    "lr 0": run("--lr", "0", words=["--lr", "lr = 0", "greater than 0"]),
    "lr infinite": run("--lr", "inf", words=["--lr", "finite"]),
    "a stray word": run("train", words=["train"]),
    "set without =": run("--set", "lr", words=["--set", "KEY=VALUE", "hint: for example"]),
    "set an unknown key": run("--set", "stpes=3", words=["--set stpes", "'stpes'", "did you mean steps?"]),
    "set DeepSpeed's key at top": run(
        "--set", "zero_optimization.stage=2", words=["zero_optimization", "deepspeed.zero_optimization"]
    ),
    # --- the config file
    "unknown key in YAML": run(
        "--config", "c.yaml", files={"c.yaml": "lr: 1\nlearning_rte: 2\n"},
        words=["c.yaml:2", "'learning_rte'", "hint"],
    ),
    "wrong type in YAML": run(
        "--config", "c.yaml", files={"c.yaml": "lr: 1\nsteps: many\n"},
        words=["c.yaml:2", "steps = 'many'", "an integer", "hint: optimizer steps; for example steps: 100"],
    ),
    "quoted number in YAML": run(
        "--config", "c.yaml", files={"c.yaml": "lr: '3e-4'\n"}, words=["c.yaml:1", "without quotes"]
    ),
    "key twice in YAML": run(
        "--config", "c.yaml", files={"c.yaml": "lr: 1\nlr: 2\n"}, words=["c.yaml:2", "lr stands twice", "line 1"]
    ),
    "broken YAML": run(
        "--config", "c.yaml", files={"c.yaml": "lr: [1\nx: 2\n"}, words=["c.yaml:2", "not valid YAML"]
    ),
    "empty YAML": run("--config", "c.yaml", files={"c.yaml": ""}, words=["c.yaml", "empty", "KEY: VALUE"]),
    "YAML that is binary": run(
        "--config", "c.yaml", files={"c.yaml": b"\xff\xfe\x00"}, words=["c.yaml", "UTF-8"]
    ),
    "no YAML file": run("--config", "none.yaml", words=["--config", "none.yaml", "check the path"]),
    "no recipe": run("--recipe", "nothing", words=["--recipe", "'nothing'", "quickstart"]),
    # --- how it is split
    "3 stages on 4 slots": run(
        "--hostfile", "h", "--pipeline", "3", files={"h": "localhost slots=4\n"},
        words=["--pipeline", "3 stages can't share 4 devices", "1 or 2 or 4", "--data-parallel 1"],
    ),
    "too many replicas": run(
        "--hostfile", "h", "--pipeline", "2", "--data-parallel", "3", files={"h": "localhost slots=4\n"},
        words=["--pipeline", "6 devices", "there are 4", "--data-parallel 2"],
    ),
    "uneven hosts": run(
        "--hostfile", "h", "--global-batch", "12", files={"h": "a slots=4\nb slots=2\n"},
        words=["--hostfile", "unevenly (a 4, b 2)", "hint"],
    ),
    "more stages than layers": run(
        "--pipeline", "5", words=["--pipeline", "4 layers", "2 blocks", "--pipeline 4 or less"]
    ),
    "batch not divisible": run(
        "--data-parallel", "3", "--micro-batch", "2",
        words=["global batch of 16", "3 replicas", "--global-batch 12 or 18"],
    ),
    "micro-batch not divisible": run(
        "--micro-batch", "5", words=["--micro-batch", "16 samples", "1, 2, 4, 8, 16"]
    ),
    "bf16 with zero 0": run(
        "--precision", "bf16", "--zero", "0", words=["--zero", "bf16 with ZeRO-0", "--zero 1"]
    ),
    "fp16 with zero 0": run(
        "--precision", "fp16", "--zero", "0", words=["--zero", "fp16 with ZeRO-0", "--zero 1"]
    ),
    "no hostfile": run("--hostfile", "none", words=["none", "no such hostfile", "name slots=N"]),
    "empty name of a hostfile": run("--hostfile", "", words=["hostfile"]),
    "bare host": run("--hostfile", "h", files={"h": "# ours\nnode1\n"}, words=["h:2", "node1", "slots=N"]),
    "host twice": run(
        "--hostfile", "h", files={"h": "a slots=1\na slots=1\n"}, words=["h:2", "line 1", "one line"]
    ),
    # --- data and tokenizer
    "no data file": run("--data", "none.txt", words=["none.txt", "no such file", "nothing is downloaded"]),
    "empty data file": run("--data", "d.txt", files={"d.txt": ""}, words=["d.txt", "empty"]),
    "binary data": run(
        "--data", "d.bin", files={"d.bin": bytes(range(256)) * 8}, words=["d.bin", "binary", "UTF-8"]
    ),
    "Latin-1 data": run(
        "--data", "d.txt", files={"d.txt": "a\n\xe9t\xe9".encode("latin-1")}, words=["d.txt:2", "iconv"]
    ),
    "JSON lines without text": run(
        "--data", "d.jsonl", files={"d.jsonl": '{"text": "a"}\n{"body": "b"}\n'},
        words=["d.jsonl:2", "no field 'text'", "'body'"],
    ),
    "broken JSON lines": run(
        "--data", "d.jsonl", files={"d.jsonl": '{"text": "a"}\n{"text"\n'}, words=["d.jsonl:2", "not JSON"]
    ),
    "folder without text": run("--data", "d", files={"d": None}, words=["d: no text in this folder"]),
    "too little text": run(
        "--data", "d.txt", files={"d.txt": "few"}, words=["d.txt", "4 tokens", "takes 32", "seq_len"]
    ),
    "no tokenizer folder": run(
        "--tokenizer", "none", words=["none", "no tokenizer folder", "bytes", "hint"]
    ),
    "tokenizer folder without one": run(
        "--tokenizer", "t", files={"t": None}, words=["t: there is no tokenizer", "tokenizer.json"]
    ),
    # --- the model
    "no model folder": run("--model", "none", words=["--model", "'none'", "config.json", "quickstart"]),
    "model folder without config.json": run(
        "--model", "m", files={"m": None}, words=["--model", "m has no config.json", "hint"]
    ),
    "unknown model_type": run(
        "--model", "m", files={"m/config.json": LLAMA | {"model_type": "lama"}},
        words=["m/config.json", "'lama'", "did you mean 'llama'?"],
    ),
    "broken config.json": run(
        "--model", "m", files={"m/config.json": '{\n"model_type": llama}'}, words=["m/config.json:2", "JSON"]
    ),
    "model that speaks no language": run(
        "--model", "m", files={"m/config.json": {"model_type": "vit"}},
        words=["m/config.json", "no causal language model", "llama"],
    ),
    "seq_len over the model's positions": run(
        "--seq-len", "129", words=["--seq-len", "128 positions", "--seq-len 128 or less"]
    ),
    "tokenizer larger than the embedding": run(
        "--model", "m", files={"m/config.json": LLAMA | {"vocab_size": 200, "eos_token_id": 1}},
        words=["257 tokens", "embedding 200", "vocab_size"],
    ),
    # --- DeepSpeed's own JSON
    "ds-config conflict": run(
        "--zero", "2", "--ds-config", "d.json", files={"d.json": {"zero_optimization": {"stage": 1}}},
        words=["d.json", "zero_optimization.stage = 1 contradicts 2", "zero = 2 (--zero)", "--set zero="],
    ),
    "ds-config block replaced": run(
        "--ds-config", "d.json", files={"d.json": {"zero_optimization": None}},
        words=["d.json", "zero_optimization", "stage"],
    ),
    "broken ds-config": run(
        "--ds-config", "d.json", files={"d.json": '{\n"a": 1,\n}'}, words=["d.json:3", "not valid JSON"]
    ),
    "no ds-config": run("--ds-config", "none.json", words=["--ds-config", "none.json", "No such file"]),
    # --- the run folder
    "run folder exists": run(
        files={"runs/x": None}, words=["--name", "runs/x exists", "--resume", "another --name"]
    ),
    "resume without a name": bare("run", "--resume", words=["--resume", "--name NAME", "dstrain resume"]),
    "resume what is not there": bare("resume", "none", words=["'none'", "no run folder", "hint"]),
    "resume without a run": bare("resume", words=["RUN", "Missing argument"]),
    "name that is a path": run("--name", "a/b", words=["--name", "'a/b'", "runs_dir"]),
    "name that is too long": run("--name", "n" * 300, words=["--name", "100"]),
    "empty name": run("--name", "", words=["--name", "no name"]),
    "runs_dir that is a file": run(
        "--set", "runs_dir=f", files={"f": "x"}, words=["--set runs_dir", "f is a file"]
    ),
}  # fmt: skip


def prepare(place: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_text(json.dumps(content))


def entries(place: Path) -> set[str]:
    return {str(path.relative_to(place)) for path in place.rglob("*")}


def check(said: Said, words: list[str]) -> None:
    assert said.code == 2, said
    assert "Traceback" not in said.err + said.out
    assert said.err.lower().count("error:") == 1, said.err
    missing = [word for word in words if word not in said.err]
    assert not missing, said.err
    assert len(said.err) < 1200, "one message"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_mistake(
    mistake: Mistake, place: Path, dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(place, mistake.files)
    before = entries(place)
    started: list[object] = []
    monkeypatch.setattr("dstrain.cli.running.attempt.supervise", lambda *a, **k: started.append(a))
    said = dstrain_here(*mistake.arguments)
    check(said, mistake.words)
    assert not started
    assert entries(place) == before, "nothing was made"


def test_what_is_right_is_planned(place: Path, dstrain_here: Callable[..., Said]) -> None:
    """The arguments that each mistake adds to are themselves no mistake."""
    said = dstrain_here("plan", *GOOD)
    assert said.code == 0 and "4 layers" in said.out and not said.err
    assert not (place / "runs").exists()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "name", ["unknown flag", "wrong type in YAML", "3 stages on 4 slots", "binary data", "ds-config conflict"]
)
def test_in_a_process_of_its_own(name: str, place: Path, dstrain: Callable[..., Said]) -> None:
    mistake = MISTAKES[name]
    prepare(place, mistake.files)
    before = entries(place)
    said = dstrain(*mistake.arguments)
    check(said, mistake.words)
    assert not said.out
    assert entries(place) == before


@pytest.mark.parametrize("arguments", [["--debug", "run"], ["run", "--debug"]], ids=["first", "last"])
def test_debug_shows_the_traceback(arguments: list[str], place: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain(*arguments, "--set", "stpes=1")
    assert said.code != 0 and "Traceback" in said.err and "stpes" in said.err


def test_the_devices_variable_is_checked(
    dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "tpu")
    check(dstrain_here("plan", *GOOD), ["DS_ACCELERATOR", "'tpu'", "cuda and cpu"])


def test_a_reader_that_goes_away_is_no_error(place: Path, dstrain: Callable[..., Said]) -> None:
    """``dstrain config show | head -1``"""
    import sys

    command = f"set -o pipefail; {sys.executable} -m dstrain.cli.main plan {' '.join(GOOD)} --json | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr
