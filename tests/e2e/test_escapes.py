"""What models, data and configs are called and hold is shown in every message, and carried out by no terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.e2e import Said

pytestmark = pytest.mark.timeout(300)

HOSTILE = "\x1b]0;owned\x07\x1b[31m\x9b2K\u202e\r"
LINE = {"text": "the quick brown fox jumps over the lazy dog. " * 9}


def model_with(place: Path, **changes: object) -> str:
    folder = place / "other"
    folder.mkdir()
    config = json.loads((place / "model" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return "other"


def data_with(place: Path, *records: object, name: str = "data.jsonl") -> str:
    (place / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return name


def tokenizer_with(place: Path, **changes: object) -> str:
    from dstrain.data.tokenizing.tokenizers import ByteTokenizer

    ByteTokenizer().save_pretrained(place / "tokenizer")
    file = place / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return "tokenizer"


def file_with(place: Path, text: str, name: str = "c.yaml") -> str:
    (place / name).write_text(text)
    return name


CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
YAML = json.dumps(HOSTILE)
PLACES: dict[str, Callable[[Path], tuple[str, ...]]] = {
    "a key": lambda place: ("plan", "--config", file_with(place, f"{YAML}: 1\n")),
    "a value": lambda place: ("plan", "--config", file_with(place, f"optimizer: {YAML}\n")),
    "a DeepSpeed key": lambda place: ("plan", "--config", file_with(place, f"deepspeed: {{{YAML}: 1}}\n")),
    "a flag": lambda place: ("plan", "--model", HOSTILE),
    "an unknown option": lambda place: ("plan", f"--{HOSTILE}"),
    "a command": lambda place: (HOSTILE,),
    "the type of a model": lambda place: ("plan", "--model", model_with(place, model_type=HOSTILE)),
    "an activation": lambda place: ("plan", "--model", model_with(place, hidden_act=HOSTILE)),
    "a rope type": lambda place: (
        "plan",
        *("--model", model_with(place, rope_parameters={"rope_type": HOSTILE, "rope_theta": 1e4})),
    ),
    "a field": lambda place: ("plan", "--model", "model", "--data", data_with(place, {HOSTILE: 1, "b": 2})),
    "a role": lambda place: (
        *("plan", "--model", "model", "--data"),
        data_with(place, {"messages": [{"role": HOSTILE, "content": "a"}]}),
    ),
    "a field of texts": lambda place: (
        *("plan", "--model", "model", "--seq-len", "32", "--data"),
        data_with(place, *[{HOSTILE: LINE["text"]}] * 40),
    ),
    "the name of a file": lambda place: (
        *("plan", "--model", "model", "--data"),
        data_with(place, {"b": 1}, name=f"a{HOSTILE}.jsonl"),
    ),
    "a chat template": lambda place: (
        *("plan", "--model", "model", "--data", data_with(place, CHAT), "--chat-template"),
        file_with(place, f"{{{{ raise_exception({YAML}) }}}}", "t.jinja"),
    ),
    "an end token": lambda place: (
        *("plan", "--model", "model", "--tokenizer", tokenizer_with(place, eos_token=HOSTILE)),
        *("--data", "text.jsonl", "--seq-len", "32"),
    ),
    "a tokenizer's class": lambda place: (
        *("plan", "--model", "model", "--data", "text.jsonl"),
        *("--tokenizer", tokenizer_with(place, auto_map={"AutoTokenizer": [f"{HOSTILE}.T", None]})),
    ),
    "a host": lambda place: ("plan", "--hostfile", file_with(place, f"n1{HOSTILE} slots=x\n", "hosts")),
    "a run": lambda place: ("resume", f"runs/{HOSTILE}"),
    "samples": lambda place: (
        *("data", "show", "--model", "model", "--seq-len", "64", "--tokenizer", "bytes", "--data"),
        data_with(place, *[{"text": HOSTILE * 9}] * 40),
    ),
    "a prompt's folder": lambda place: ("generate", HOSTILE, "a"),
}


@pytest.mark.parametrize("where", PLACES)
def test_no_terminal_carries_it_out(where: str, dstrain_here: Callable[..., Said], place: Path) -> None:
    said = dstrain_here(*PLACES[where](place))
    text = said.out + said.err
    assert text and "Traceback" not in text
    assert not {sign for sign in text if not sign.isprintable() and sign not in "\n\t"}, ascii(text)
    assert said.code in (0, 2), said
