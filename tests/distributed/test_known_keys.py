"""The table of DeepSpeed's keys against the DeepSpeed that is installed."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstrain.config import deepspeed_keys
from dstrain.config.deepspeed_keys import GONE, all_keys, find, what_is_wrong
from dstrain.planning.plan import Plan
from tests.support.distributed import training
from tests.support.distributed.workers import WorkerError, run

TABLE = Path(deepspeed_keys.__file__).with_suffix(".json")
# Beside a sample of each kind: the ends of ranges, numbers and switches in other spellings.
VALUES = (
    True, False, None, 0, 1, 2, 3, 4, -1, 16, 10**12, 0.0, 1.0, 4.0, -1.0, 5e8, 0.5, 0.25, 1.5,
    "0", "1", "2", "4", "-1", "+2", "0.5", "1.5", "yes", "No", "t", "on", "maybe", "", "cpu", "nvme", "z1",
    "torch", "symmetric", [], {},
)  # fmt: skip


def _text(rank: int) -> str:
    from tools.deepspeed_keys.table import text

    return text()


def test_the_table_is_that_of_the_installed_deepspeed() -> None:
    """`make docs` writes it anew. Read the difference: a key that is gone was refused to users until now, or served."""
    (found,) = run(1, _text)
    expected = TABLE.read_text(encoding="utf-8")
    assert json.loads(expected)["deepspeed"] == importlib.metadata.version("deepspeed")
    assert json.loads(found) == json.loads(expected)
    assert found == expected


def _disagreements(rank: int) -> tuple[int, list[str]]:
    """How many values were tried, and those that our table and DeepSpeed's models judge differently."""
    from tools.deepspeed_keys.models import model_of, takes

    tried, found = 0, []
    for path, node in all_keys():
        if GONE & set(node) or "keys" in node:
            continue
        model = model_of(path[:-1]) if len(path) > 1 and (find(path[:-1]) or {}).get("model") else None
        if model is None:
            continue
        for value in VALUES:
            tried += 1
            ours, theirs = what_is_wrong(path, value) is None, takes(model, path[-1], value)
            if ours != theirs:
                found.append(f"{'.'.join(path)} = {value!r}: {'taken' if theirs else 'refused'} by DeepSpeed")
    return tried, found


def test_values_are_judged_as_deepspeeds_models_judge_them() -> None:
    ((tried, found),) = run(1, _disagreements)
    assert tried > 100 * len(VALUES)
    assert not found


def _refused_by_deepspeed(rank: int, keys: list[tuple[str, ...]]) -> dict[str, str]:
    """What DeepSpeed says of a config with each of these keys."""
    from tools.deepspeed_keys.looked_up import looked_up, nested

    logging.getLogger("DeepSpeed").setLevel(logging.CRITICAL)
    said = {}
    for path in keys:
        seen, error = looked_up(nested(path, 1))
        said[".".join(path)] = (
            f"{type(error).__name__}" if error else "read" if path in seen else "passed over"
        )
    return said


def test_what_the_table_calls_removed_is_refused_or_passed_over() -> None:
    from tools.deepspeed_keys.notes import REMOVED

    removed = [path for path, node in all_keys() if "removed" in node]
    (said,) = run(1, _refused_by_deepspeed, removed)
    assert len(said) > 15
    # These are read, and then nothing comes of them, or only a warning.
    read = {"disable_allgather", "vocabulary_size"}
    ours = {key for key in REMOVED if find(tuple(key.split("."))) is not None}
    assert {key for key, answer in said.items() if answer == "read"} == read <= ours
    refused = {key for key, answer in said.items() if answer == "DeepSpeedConfigError"}
    assert {"amp", "nebula", "elasticity", "zero_optimization.mics_shard_size"} <= refused
    assert set(said) == read | refused | ours


def test_a_misspelt_key_is_passed_over_by_deepspeed() -> None:
    """Why dstrain checks them: DeepSpeed 0.19.8 takes these without a word."""
    typos = [
        ("gradient_cliping",), ("optimizer", "parms"), ("activation_checkpointing", "partition_activation"),
        ("checkpoint", "tag_validaton"), ("aio", "blok_size"), ("flops_profiler", "enable"),
        ("data_types", "grad_dtype"),
    ]  # fmt: skip
    (said,) = run(1, _refused_by_deepspeed, typos)
    assert set(said.values()) == {"passed over"}
    assert all(what_is_wrong(path, 1) for path in typos)


def _examples(rank: int) -> dict[str, Any]:
    """DeepSpeed's own examples: the JSON templates that it ships, and the texts *_FORMAT beside its constants."""
    import deepspeed
    from deepspeed.comm import constants as comm
    from deepspeed.profiling import constants as profiling
    from deepspeed.runtime import constants, precision_config
    from deepspeed.runtime.activation_checkpointing import config as activations
    from deepspeed.runtime.model_checkpointing import constants as checkpointing
    from deepspeed.runtime.swap_tensor import constants as aio
    from deepspeed.runtime.zero import config as zero

    templates = Path(deepspeed.__file__).parent / "autotuning" / "config_templates"
    found: dict[str, Any] = {path.name: json.loads(path.read_text()) for path in templates.glob("*.json")}
    for module in (comm, profiling, constants, precision_config, activations, checkpointing, aio, zero):
        for name, value in vars(module).items():
            if name.endswith("_FORMAT"):
                found[f"{module.__name__}.{name}"] = value
    return found


def test_deepspeeds_own_examples_are_known() -> None:
    (examples,) = run(1, _examples)
    templates = {name: example for name, example in examples.items() if name.endswith(".json")}
    formats = {name: example for name, example in examples.items() if isinstance(example, str)}
    assert len(templates) == 4 and len(formats) > 15
    wrong = [
        f"{name}: {what}"
        for name, template in templates.items()
        for path, value in _leaves(template)
        if (what := what_is_wrong(path, value))
    ]
    assert not wrong
    names = {path[-1] for path, _ in all_keys()}
    unknown = {name for text in formats.values() for name in re.findall(r'"(\w+)"\s*:', text)} - names
    assert unknown == {"session_params"}, "a frame around the examples, no key"


def _leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    found = []
    for key, value in values.items():
        found += _leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]
    return found


def _train_with(rank: int, case: training.Case, key: str, value: Any) -> list[float]:
    """The losses with one more key in DeepSpeed's JSON. The process is this job's own: nothing is put back."""
    made = training.make_case_plan

    def plan_with(case: training.Case) -> Plan:
        plan = made(case)
        return replace(plan, deepspeed=plan.deepspeed | {key: value})

    training.make_case_plan = plan_with
    return training.train_in_layout(rank, case).losses


@pytest.mark.parametrize(
    ("key", "value"), [("wall_clock_breakdown", True), ("flops_profiler", {"enabled": True})]
)
def test_deepspeeds_timers_fail_with_stages_and_not_without(key: str, value: Any) -> None:
    """Why `dstrain.planning.deepspeed.user_keys` refuses them with stages. If this fails, DeepSpeed has mended it."""
    case = training.Case(zero=1, pipeline=2, steps=2)
    with pytest.raises(WorkerError, match="timer has already been started"):
        run(2, _train_with, case, key, value)
    alone = replace(case, pipeline=1)
    assert run(1, _train_with, alone, key, value) == run(1, _train_with, alone, "steps_per_print", None)


@pytest.mark.parametrize("key", ["stage3_prefetch_bucket_size", "prefetch_bucket_size"])
def test_an_alias_and_its_field_are_one_key(key: str) -> None:
    assert find(("zero_optimization", key)) is find(("zero_optimization", "stage3_prefetch_bucket_size"))
