"""The plan as a whole: complete, pure, and the same after a way through JSON."""

from __future__ import annotations

import builtins
import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.config.loader import load_config
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.estimate.device import find_device
from dstrain.estimate.memory import StageMemory
from dstrain.planning.batch import Batch
from dstrain.planning.layout import Host, Layout
from dstrain.planning.make_plan import make_plan
from dstrain.planning.model_shape import FORMAT, ModelShape
from dstrain.planning.plan import Machines, Plan
from dstrain.planning.warnings import warnings_about_memory
from tests.support.plans import DATA, LAPTOP, MINIMAL, plan, shape


def through_json(made: Plan) -> Plan:
    return Plan.from_record(json.loads(json.dumps(made.to_record())))


@settings(deadline=None)
@given(
    pipeline=st.integers(1, 4),
    data_parallel=st.integers(1, 4),
    zero=st.sampled_from([1, 2]),
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    micro_batch=st.sampled_from([None, 1, 2]),
    name=st.none() | st.text(max_size=8),
    prompt=st.text(max_size=8),
)
def test_json_round_trip(**choices: Any) -> None:
    made = plan(global_batch=48, **choices)
    again = through_json(made)
    assert again == made
    assert again.run_config == RunConfig(global_batch=48, **choices)
    assert again.identity == made.identity


@pytest.mark.parametrize(
    "flags",
    [
        {"zero": 3},
        {"zero": 0},
        {"pipeline": 2, "schedule": "dualpipev"},
        {"zero": 1, "offload": "cpu"},
        {"settings": ("deepspeed.comms_logger.prof_ops=[1, {a: null}]", "deepspeed.steps_per_print=10")},
    ],
)
def test_json_round_trip_of_rarer_plans(flags: dict[str, Any]) -> None:
    made = plan(**flags)
    assert through_json(made) == made


def test_the_record_spells_out_every_rank() -> None:
    ranks = plan(pipeline=2, data_parallel=2).to_record()["layout"]["ranks"]
    assert [(r["rank"], r["stage"], r["replica"]) for r in ranks] == [
        (0, 0, 0), (1, 1, 0), (2, 0, 1), (3, 1, 1),
    ]  # fmt: skip


def test_a_plan_is_a_pure_function() -> None:
    assert plan(pipeline=2) == plan(pipeline=2)


def test_a_plan_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the user's DeepSpeed JSON, which was read with the config, nor a fragment a second time."""
    own = tmp_path / "own.json"
    own.write_text('{"comms_logger": {"enabled": true},\n "zero_optimization": {"sub_group_size": 7}}')
    flags = {"zero": 3, "data_parallel": 2, "ds_config": str(own)}
    resolved = load_config(config_file=str(MINIMAL), flags=flags)
    expected = plan(**flags)  # the fragments are read here, if they were not before
    own.unlink()

    def refuse_to_open(path: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{path} was opened")

    with monkeypatch.context() as patch:
        for module in (builtins, io, os):
            patch.setattr(module, "open", refuse_to_open)
        made = make_plan(resolved, LAPTOP, shape(), DATA, "/models/tiny/config.json")
    assert made == expected
    assert made.deepspeed_origins["zero_optimization.sub_group_size"] == f"{own}:2"


def test_a_plan_of_0_1_and_of_a_newer_cache_is_read() -> None:
    made = plan()
    record = json.loads(json.dumps(made.to_record()))
    record["data"]["languages"] = ["en"]
    assert Plan.from_record(record) == made
    for name in ("rows", "documents"):
        record["data"][f"held_out_{name}"] = record["data"].pop(f"validation_{name}")
    for part in ("config", "origins"):
        record[part]["held_out"] = record[part].pop("validation")
        del record[part]["optimizer_options"]
    del record["not_covered"]
    old = Plan.from_record(record | {"format": 5})
    assert (old.data, old.model, old.identity) == (made.data, made.model, made.identity)
    assert old.run_config == made.run_config


def test_another_format_is_refused() -> None:
    record = plan().to_record() | {"format": 999}
    with pytest.raises(DstrainError, match="999"):
        Plan.from_record(record)


def test_every_key_has_an_origin() -> None:
    made = plan(zero=2, settings=("lr=0.5",))
    assert set(made.origins) == set(RunConfig.model_fields)
    assert (made.origins["zero"], made.origins["lr"], made.origins["keep"]) == (
        "--zero",
        "--set lr",
        "default",
    )


def test_stages_hold_all_parameters_a_tied_weight_on_both_ends() -> None:
    model = shape(blocks=6)
    assert plan(model=model).stage_parameters == (model.total_parameters,)
    assert sum(plan(model=model, pipeline=4).stage_parameters) == model.total_parameters + 51_200
    untied = shape(blocks=6, tied=False)
    assert sum(plan(model=untied, pipeline=4).stage_parameters) == untied.total_parameters
    # both ends of the fold meet on the first rank of DualPipeV: the tied weight is held once
    folded = plan(model=model, pipeline=2, schedule="dualpipev")
    assert sum(folded.stage_parameters) == model.total_parameters


def test_imbalance_is_that_of_the_slowest_stage() -> None:
    assert plan().imbalance == 1.0
    assert 1.0 <= plan(pipeline=4).imbalance < 1.5


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"pipeline": 4, "global_batch": 4, "micro_batch": 1}, "idle for 43%"),
        ({"pipeline": 2, "zero": 2, "data_parallel": 2}, "--zero 1"),
        ({"steps": 10, "warmup_steps": 10}, "the learning rate never decays"),
        ({"zero": 1}, "there is only one"),
        ({"steps": 100, "global_batch": 39}, "10.0 times"),
    ],
)
def test_warnings(flags: dict[str, Any], words: str) -> None:
    found = plan(**flags).warnings
    assert any(words in warning for warning in found), found


def on(device: str, nodes: int, slots: int) -> Machines:
    found = find_device(device, "test")
    hosts = tuple(Host(f"node-{number}", slots) for number in range(nodes))
    return Machines(hosts, "cuda", memory_bytes=found.memory_bytes, device=found)


@pytest.mark.parametrize(
    ("device", "nodes", "slots", "flags", "words"),
    [
        # 6 blocks in 2 stages: 2 replicas all-reduce 351,200 parameters, 7 micro-batches more than once
        ("h100-80g", 1, 4, {"pipeline": 2, "zero": 2, "micro_batch": 2}, "11.2 MB per step and rank, where --zero 1"),
        ("h100-80g", 1, 4, {"pipeline": 2, "zero": 3, "micro_batch": 2}, "forward and backward: 11.2 MB per step"),
        ("h100-80g", 2, 2, {"pipeline": 4}, "pipelines span several hosts (2 ranks on each, 4 stages): 6.6 MB"),
        ("t4", 4, 1, {"zero": 3, "micro_batch": 1}, "of the time; --zero 1 and stages inside each host"),
        ("t4", 8, 1, {"zero": 2, "micro_batch": 1}, "--zero 1 reduces gradients once per step"),
        ("t4", 8, 1, {"zero": 1}, "a larger --global-batch means more computation per reduction"),
        ("h100-80g", 1, 1, {"zero": 1, "offload": "cpu", "global_batch": 1}, "the offloaded update is expected"),
    ],
)  # fmt: skip
def test_warnings_with_numbers(
    device: str, nodes: int, slots: int, flags: dict[str, Any], words: str
) -> None:
    model = shape(blocks=6)
    if "offload" in flags or device == "t4":  # large layers of little work
        model = replace(
            model,
            layers=tuple(replace(x, parameters=10**8, forward_flops_per_token=10) for x in model.layers),
        )
    found = plan(machines=on(device, nodes, slots), model=model, **flags).warnings
    assert any(words in warning for warning in found), found


@pytest.mark.parametrize(
    ("flags", "largest", "helps"),
    [
        ({"micro_batch": 8}, "activations", "--activation-checkpointing or a smaller --micro-batch"),
        ({"micro_batch": 8, "activation_checkpointing": True}, "activations", "a smaller --micro-batch"),
        ({"micro_batch": 1, "zero": 0}, "optimizer", "--zero 1 or --offload cpu or --pipeline 2 helps"),
        ({"micro_batch": 1, "activation_checkpointing": True}, "activations", "more or larger devices"),
    ],
)
def test_what_helps_where_it_does_not_fit(flags: dict[str, Any], largest: str, helps: str) -> None:
    classes = ("parameters", "gradients", "optimizer", "activations", "loss", "buffers")
    need = dict.fromkeys(classes, 10**9)
    needs = [StageMemory(**need | {largest: 9 * 10**9}, host=0)]
    layout = Layout((Host("a", 2),), 1, 2, (0, 8))
    size = flags["micro_batch"]
    batch = Batch(32, micro_batch=size, accumulation=16 // size, data_parallel=2, seq_len=256)
    [found] = warnings_about_memory(RunConfig(**flags), layout, batch, shape(), needs, 10**10, "cuda")
    verb = "takes" if largest == "optimizer" else "take"
    assert found.startswith(f"{largest} {verb} most of the memory: {helps}")


def test_nothing_to_warn_of() -> None:
    assert plan(zero=0, steps=5).warnings == ()


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_a_pipeline_across_hosts_is_told(accelerator: str) -> None:
    machines = Machines((Host("a", 3), Host("b", 3)), accelerator)
    found = plan(machines=machines, pipeline=2, global_batch=48).warnings
    assert sum("pipelines span several hosts" in warning for warning in found) == 1


# --- what the model or the data can't do


@pytest.mark.parametrize(
    ("flags", "model", "where", "words"),
    [
        ({"seq_len": 513}, {}, "--seq-len", "512 positions"),
        (
            {"tokenizer": "bytes"},
            {"vocab_size": 256},
            "--tokenizer",
            "257 tokens, but the model's embedding only 256",
        ),
        ({"pipeline": 2}, {"pipeline_refusal": "it shares a cache"}, "--pipeline", "it shares a cache"),
    ],
)
def test_the_model_says_no(flags: dict[str, Any], model: dict[str, Any], where: str, words: str) -> None:
    with pytest.raises(DstrainError) as caught:
        plan(model=shape(**model), **flags)
    assert caught.value.where == where and words in caught.value.message and caught.value.hint


def test_edges_that_are_allowed() -> None:
    plan(seq_len=512)
    plan(seq_len=100_000, model=shape(max_positions=None))
    plan(pipeline=1, model=shape(pipeline_refusal="no"))
    plan(data=replace(DATA, vocab_size=257))


def test_precision_that_the_devices_lack() -> None:
    machines = Machines((Host("localhost", 1),), "cuda", precisions=("fp32", "fp16"))
    with pytest.raises(DstrainError, match="bf16") as caught:
        plan(machines=machines, precision="bf16")
    assert caught.value.hint == "--precision fp32 or fp16"


# --- the measured shape


def test_shape_of_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format"):
        ModelShape.from_record({"format": FORMAT + 1})
