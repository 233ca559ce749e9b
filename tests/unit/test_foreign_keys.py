"""Keys of other trainers: each is answered with what to write here, and what is answered is right."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from datetime import date
from pathlib import Path

import pytest

from dstrain.config.deepspeed_keys import find
from dstrain.config.foreign_keys import DEEPSPEED, FOREIGN_KEYS, HF, translate, translate_value
from dstrain.config.loader import ConfigError, load_config
from dstrain.config.schema import field_names

# Keys that transformers' TrainingArguments had in version 4, and those of trl's SFTConfig and of its examples.
_OLDER = {
    *("per_gpu_train_batch_size", "logging_dir", "overwrite_output_dir", "evaluation_strategy", "no_cuda"),
    *("warmup_ratio", "group_by_length", "max_seq_length", "max_length", "packing", "model_name_or_path"),
    *("attn_implementation", "torch_dtype", "trust_remote_code", "tokenizer_name"),
}


def _errors(path: Path, text: str) -> list[str]:
    path.write_text(text, encoding="utf-8")
    try:
        load_config(config_file=str(path))
    except ConfigError as error:
        return [str(each) for each in error.errors]
    return []


def test_there_are_enough_and_none_hides_a_key_of_dstrain() -> None:
    assert len(FOREIGN_KEYS) >= 120
    assert not set(FOREIGN_KEYS) & set(field_names())


@pytest.mark.parametrize("name", FOREIGN_KEYS)
def test_what_is_answered_names_keys_that_exist(name: str) -> None:
    answer = FOREIGN_KEYS[name].translate(FOREIGN_KEYS[name].example)
    named = re.findall(r"(?:^|; |, and |with )(\w+): ", answer)
    for key in named:
        assert key in field_names() or key == "deepspeed", f"{name}: {answer}"
    assert named or answer.split()[0].strip(":,") in (*field_names(), "remove", "dstrain", "a"), answer


# Answers that are `key: value` and nothing else.
_WHOLE = {
    answer
    for foreign in FOREIGN_KEYS.values()
    if re.fullmatch(r"\w+: ([\w./-]+|\[\w+\])", answer := foreign.translate(foreign.example))
}


def test_most_answers_are_whole() -> None:
    assert len(_WHOLE) >= 40


@pytest.mark.parametrize("answer", sorted(_WHOLE))
def test_a_whole_answer_can_be_written_into_a_config(answer: str, tmp_path: Path) -> None:
    key, value = answer.split(": ")
    path = tmp_path / "c.yaml"
    assert _errors(path, answer + "\n") == []
    got = getattr(load_config(config_file=str(path)).config, key)
    got = getattr(got, "type", got)  # of an adapter, which is named by it
    assert value in (str(got), json.dumps(got), f"[{', '.join(got)}]" if isinstance(got, list) else "")


@pytest.mark.parametrize("name", [name for name in FOREIGN_KEYS if "." not in name])
def test_the_error_of_an_unknown_key_says_it(name: str, tmp_path: Path) -> None:
    found = _errors(tmp_path / "c.yaml", f"lr: 0.1\n{name}: 3\n")
    assert len(found) == 1
    assert "c.yaml:2: unknown key" in found[0]
    assert FOREIGN_KEYS[name].translate(3) in found[0]


def test_the_keys_of_the_hf_trainer_are_its_own() -> None:
    from transformers import TrainingArguments

    own = {field.name for field in dataclasses.fields(TrainingArguments)}
    claimed = {name for name, foreign in FOREIGN_KEYS.items() if HF in foreign.trainers}
    assert claimed - own - _OLDER == set()


def test_most_of_the_hf_trainer_s_keys_are_known() -> None:
    """Those that a config is likely to hold: what is left over is for debugging and for devices of a kind."""
    from transformers import TrainingArguments

    own = {field.name for field in dataclasses.fields(TrainingArguments)}
    unknown = own - set(FOREIGN_KEYS) - set(field_names())
    assert len(own - unknown) / len(own) > 0.5, sorted(unknown)


def test_a_section_is_translated_key_by_key(tmp_path: Path) -> None:
    text = "training: {seq_len: 4096, steps: 7, unheard_of: 1}\noptimizer: {name: AdamW, lr: 8.0e-4}\n"
    wrong_type, unknown = sorted(_errors(tmp_path / "c.yaml", text), key=lambda line: "unknown key" in line)
    assert "seq_len: 4096; steps: 7" in unknown
    assert "optimizer: adamw; lr: 0.0008" in wrong_type


def test_a_block_of_deepspeed_s_json_is_said_to_be_one(tmp_path: Path) -> None:
    assert find(("fp16",)) is not None
    (found,) = _errors(tmp_path / "c.yaml", "fp16: {enabled: true}\n")
    assert "under `deepspeed:`" in found
    (found,) = _errors(tmp_path / "c.yaml", "fp16: true\n")
    assert "precision: fp16" in found


@pytest.mark.parametrize(
    ("key", "theirs", "ours"),
    [
        ("optimizer", "adamw_torch_fused", "optimizer: adamw"),
        ("precision", "bf16-mixed", "precision: bf16"),
        ("schedule", "ZBVZeroBubble", "schedule: dualpipev"),
        ("deepspeed", "ds/zero3.json", "ds_config: ds/zero3.json"),
    ],
)
def test_a_value_of_another_trainer_is_translated(key: str, theirs: str, ours: str, tmp_path: Path) -> None:
    assert translate_value(key, theirs) == ours
    (found,) = _errors(tmp_path / "c.yaml", f"{key}: {theirs}\n")
    assert ours in found


def test_no_hint_is_better_than_a_wrong_one(tmp_path: Path) -> None:
    for key in ("xyzzy", "moe_router_topk", "optical_gate", "beta_schedule"):
        (found,) = _errors(tmp_path / "c.yaml", f"{key}: 1\n")
        assert "the keys are: model" in found, found
    assert translate("xyzzy", {"a": 1}) is None
    assert translate_value("optimizer", "xyzzy") is None


def test_values_that_nobody_expects_have_an_answer_too() -> None:
    for foreign in FOREIGN_KEYS.values():
        for value in (
            None,
            "",
            [],
            {},
            0,
            -1,
            1.5,
            True,
            "x\ny",
            [{"path": 3}],
            {"a": [1]},
            "9" * 400,
            date(2026, 1, 1),
            math.nan,
        ):
            answer = foreign.translate(value)
            assert answer.isprintable()
            assert len(answer) < 700


def test_the_named_trainers_are_those_of_the_field() -> None:
    named = {trainer for foreign in FOREIGN_KEYS.values() for trainer in foreign.trainers}
    assert {HF, DEEPSPEED, "axolotl", "LLaMA-Factory", "torchtitan"} <= named


# What people write for want of a manual, or by memory of another trainer; and what they are told. "": no guess.
_WRITTEN = {
    "learning_rte": "lr: ",
    "num_epochs": "steps: ",
    "lr_": "did you mean lr?",
    "steos": "did you mean steps?",
    "pipline": "did you mean pipeline?",
    "momentun": "did you mean momentum?",
    "nnodes": "did you mean nodes?",
    "block_size": "seq_len: ",
    "wandb": "trackers: [wandb]",
    "compile": "remove it: dstrain does not compile",
    "tp": "dstrain",
    "pp": "pipeline: ",
    "dp": "data_parallel: ",
    "epochs": "steps: ",
    "grad_clip": "gradient_clipp",
    "loss_scale": "deepspeed.fp16.loss_scale=",
    "overlap_comm": "deepspeed.zero_optimization.overlap_comm=",
    **dict.fromkeys(("strategy", "debug", "verbose", "rank", "device", "gpus", "port", "host", "master"), ""),
    **dict.fromkeys(("x", "a", "bs", "ema", "dropout", "temperature", "resume", "shuffle", "project"), ""),
    **dict.fromkeys(
        ("num_bits", "top_k", "queue_depth", "passes", "group", "team", "fast", "metric", "detailed"), ""
    ),
}


@pytest.mark.parametrize(("key", "words"), _WRITTEN.items())
def test_a_hint_is_right_or_there_is_none(key: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(settings=[f"{key}=2"] if key not in ("wandb", "overlap_comm") else [f"{key}=true"])
    hint = caught.value.hint or ""
    assert words in hint if words else hint.startswith("the keys are: "), hint


def test_a_value_that_deepspeeds_key_does_not_take_is_not_sent_there() -> None:
    for setting, words in {
        "scheduler=cosine": "in dstrain: lr_schedule: cosine",
        "loss_scale=dynamic": "the keys are: ",
        "stage=2": "in dstrain: zero: 2",
        "stage=pt": "in dstrain: remove it",
        "fp16={enabled: true}": "under `deepspeed:`",
        "compile={deepcompile: true}": "under `deepspeed:`",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(settings=[setting])
        assert words in (caught.value.hint or ""), setting
