"""DeepSpeed's own keys: typos, wrong places and wrong values are refused with the line and what was meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.config.deepspeed_keys import (
    GONE,
    all_keys,
    canonical,
    find,
    homes_of,
    top_level,
    what_is_wrong,
)
from dstrain.config.files import ds_configs
from dstrain.config.json_reader import _lines_of_keys
from dstrain.config.loader import load_config
from dstrain.config.schema import field_names
from dstrain.config.values import KeyPath, leaves
from dstrain.errors import DstrainError
from dstrain.planning.checks import refuse
from dstrain.planning.deepspeed.keys import KEYS
from dstrain.planning.deepspeed.user_keys import mistakes
from tests.support.plans import plan

FRAGMENTS = sorted(
    str(path.relative_to(ds_configs()))
    for path in ds_configs().rglob("*.json")
    if path.parent.name not in ("models", "devices")
)


def wrong(dotted: str, value: Any = 1) -> str:
    """The message and the hint."""
    found = what_is_wrong(tuple(dotted.split(".")), value)
    assert found, dotted
    return f"{found.message} | {found.hint}"


# --- the table


def test_the_table_is_deep_and_says_what_keys_are_for() -> None:
    real = {path: node for path, node in all_keys() if not GONE & set(node)}
    assert len(real) > 350
    assert {"zero_optimization", "optimizer", "pipeline", "fp16", "aio", "comms_logger"} <= set(top_level())
    for path in real:
        if path[0] in (
            "zero_optimization",
            "fp16",
            "bf16",
            "checkpoint",
            "aio",
            "pipeline",
            "flops_profiler",
        ):
            assert real[path].get("description") or path[-1] in ("aio",), path
    stage = find(("zero_optimization", "stage"))
    assert stage and stage["default"] == 0 and stage["choices"] == [0, 1, 2, 3]


@pytest.mark.parametrize("fragment", FRAGMENTS)
def test_every_key_that_dstrain_writes_is_known_and_current(fragment: str) -> None:
    values = json.loads((ds_configs() / fragment).read_text())
    for path, value in leaves(values):
        derived = isinstance(value, str) and value.startswith("$")
        assert what_is_wrong(path, "auto" if derived else value) is None, path
        assert canonical(path) == path


@pytest.mark.parametrize("path", KEYS, ids=".".join)
def test_every_row_of_the_table_is_a_key_of_deepspeeds_under_its_first_name(path: KeyPath) -> None:
    node = find(path)
    assert node is not None and canonical(path) == path
    assert ("deprecated" in node) == bool(KEYS[path].successor)
    assert KEYS[path].owner in {None, *field_names()}


def test_what_the_table_derives_is_what_the_fragments_leave_open() -> None:
    open_ = {
        (path, value[1:])
        for fragment in FRAGMENTS
        for path, value in leaves(json.loads((ds_configs() / fragment).read_text()))
        if isinstance(value, str) and value.startswith("$")
    }
    assert open_ == {(path, key.derived.name) for path, key in KEYS.items() if key.derived}


# --- what was meant


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("gradient_cliping", "no key 'gradient_cliping' | did you mean gradient_clipping?"),
        ("zero_optimisation.stage", "'zero_optimisation' | did you mean zero_optimization?"),
        ("zero_optimization.stge", "'stge' in zero_optimization | did you mean zero_optimization.stage?"),
        ("zero_optimization.offload_optimizer.devise", "did you mean zero_optimization.offload_optimizer.device?"),
        ("optimizer.params.beta", "did you mean optimizer.params.betas?"),
        ("scheduler.params.warmup_steps", "did you mean scheduler.params.warmup_num_steps?"),
        ("stage", "it belongs elsewhere: zero_optimization.stage"),
        ("loss_scale", "it belongs elsewhere: fp16.loss_scale"),
        ("enabled", "bf16.enabled, comet.enabled, comms_logger.enabled ..."),
        ("fp16.reduce_bucket_size", "it belongs elsewhere: zero_optimization.reduce_bucket_size"),
        ("reduce_bucket_sise", "did you mean zero_optimization.reduce_bucket_size?"),
        ("zero", "zero is dstrain's own key: write it at top level"),
        ("seq_len", "seq_len is dstrain's own key"),
        ("xyzzy", "config schema"),
        ("aio.xyzzy", "the keys of aio are: block_size, intra_op_parallelism"),
        ("zero_optimization.xyzzy", "plan --explain deepspeed.zero_optimization"),
        ("amp.enabled", "amp was removed from DeepSpeed | NVIDIA Apex AMP"),
        ("curriculum_learning.enabled", "data_efficiency.data_sampling.curriculum_learning"),
        ("zero_optimization.zeropp_loco_param", "LoCo-Zero++ has been removed"),
        ("zero_optimization.stage3_gather_fp16_weights_on_model_save", "use gather_16bit_weights_on_model_save"),
        ("bf16.check_overflow", "its name is check_grad_overflow"),
        ("gradient_clipping.x", "gradient_clipping takes a number, not a block of keys"),
    ],
)  # fmt: skip
def test_a_key_that_there_is_not(key: str, words: str) -> None:
    assert words in wrong(key)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("zero_optimization.stage", 4, "= 4: must be one of 0, 1, 2, 3"),
        ("zero_optimization.stage", "two", '= "two": must be an integer'),
        (
            "zero_optimization.reduce_bucket_size",
            "big",
            "must be an integer | an integer: Number of elements reduced",
        ),
        ("zero_optimization.reduce_bucket_size", 0, "must be greater than 0"),
        ("zero_optimization.reduce_bucket_size", 1.5, "must be an integer"),
        ("zero_optimization.overlap_comm", 2, "must be a boolean or null"),
        ("zero_optimization.offload_optimizer.ratio", 1.5, "must be at most 1.0"),
        ("zero_optimization.offload_optimizer.device", "disk", "must be one of none, cpu, nvme"),
        ("fp16.loss_scale", True, "must be a number"),
        ("fp16.loss_scale", -1, "must be at least 0"),
        ("steps_per_print", "5", "must be an integer or null"),
        ("wall_clock_breakdown", "true", "must be a boolean"),
        ("wall_clock_breakdown", 1, "must be a boolean"),
        ("communication_data_type", "fp8", "must be one of fp32, fp16, bf16"),
        ("checkpoint.tag_validation", "loud", "must be one of Warn, Ignore, Fail"),
        ("checkpoint", [], "checkpoint must be a block of keys, not []"),
        ("fp16", None, "fp16 must be a block of keys, not null"),
        ("comms_logger.prof_ops", "all_reduce", "must be a list"),
        ("tensor_parallel.dtype", "fp16", "takes a Python object"),
    ],
)
def test_a_value_that_deepspeed_does_not_take(key: str, value: Any, words: str) -> None:
    assert words in wrong(key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("zero_optimization.stage", "2"),  # pydantic reads these so
        ("zero_optimization.reduce_bucket_size", 5e8),
        ("zero_optimization.overlap_comm", 1),
        ("zero_optimization.overlap_comm", "yes"),
        ("zero_optimization.prefetch_bucket_size", 7),
        ("zero_optimization.leaf_module.classes", "a.B"),
        ("communication_data_type", "FP16"),
        ("checkpoint.tag_validation", "FAIL"),
        ("gradient_clipping", 1),
        ("gradient_clipping", "auto"),
        ("aio", None),
        ("bfloat16", {}),
        ("data_efficiency.data_sampling.curriculum_learning.curriculum_metrics.mine.any", 3),
        ("datastates_ckpt.host_cache_size", 1),
        ("optimizer.params.lr", 1),
    ],
)
def test_what_deepspeed_takes(key: str, value: Any) -> None:
    assert what_is_wrong(tuple(key.split(".")), value) is None


def test_the_configurations_of_hugging_faces_documentation_are_known() -> None:
    """Its page on DeepSpeed, ZeRO-3 with offload: what users of its Trainer have lying about."""
    offload = {"device": "cpu", "pin_memory": True}
    sizes = dict.fromkeys(
        ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
    )
    values = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16,
                 "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
        "zero_optimization": {"stage": 3, "offload_optimizer": offload, "offload_param": offload, "overlap_comm": True,
                              "contiguous_gradients": True, "sub_group_size": 1e9, **sizes,
                              "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9,
                              "stage3_gather_16bit_weights_on_model_save": True},
        "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "steps_per_print": 2000,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "wall_clock_breakdown": False,
    }  # fmt: skip
    assert not [path for path, value in leaves(values) if what_is_wrong(path, value)]


@settings(deadline=None)
@given(st.sampled_from([path for path, node in all_keys() if not GONE & set(node)]), st.data())
def test_any_key_with_a_letter_left_out_is_found_again(path: tuple[str, ...], data: st.DataObject) -> None:
    """Of the nine letters or more of the long names, whichever is missing."""
    name = path[-1]
    at = data.draw(st.integers(1, len(name) - 1)) if len(name) > 1 else 0
    typo = name[:at] + name[at + 1 :]
    parent = find(path[:-1]) if len(path) > 1 else {"keys": top_level()}
    assert parent is not None
    if (
        len(name) < 9
        or typo in parent["keys"]
        or parent.get("free")
        or homes_of(typo)
        or typo in field_names()
    ):
        return
    found = what_is_wrong((*path[:-1], typo), 1)
    assert found and found.depth == len(path)
    assert "did you mean" in found.hint


def test_a_key_of_deepspeeds_at_top_level_is_shown_its_place(tmp_path: Path) -> None:
    for key, place in (
        ("dump_state", "dump_state"),
        ("round_robin_gradients", "zero_optimization.round_robin"),
    ):
        with pytest.raises(DstrainError, match="unknown key") as caught:
            load_config(config_file=own(tmp_path, f"{key}: true\n"))
        assert f"--set deepspeed.{place}" in (caught.value.hint or "")


# --- places


def own(tmp_path: Path, text: str, name: str = "own.yaml") -> str:
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_a_typo_in_yaml_names_its_line(tmp_path: Path) -> None:
    path = own(tmp_path, "lr: 0.1\ndeepspeed:\n  steps_per_print: 5\n  gradient_cliping: 1\n")
    with pytest.raises(DstrainError) as caught:
        refuse(load_config(config_file=path))
    assert caught.value.where == f"{path}:4" and caught.value.hint == "did you mean gradient_clipping?"


def test_a_typo_in_a_setting_names_it() -> None:
    with pytest.raises(DstrainError) as caught:
        plan(settings=("deepspeed.zero_optimization.overlap_com=true",))
    assert caught.value.where == "--set deepspeed.zero_optimization.overlap_com"


def test_a_typo_in_json_names_its_line_and_a_block_its_own(tmp_path: Path) -> None:
    text = '{"steps_per_print": 5,\n\t"gradient_cliping"\n:\t1,\n"zero_optimisation": {\n\n"stage": 2}}'
    path = own(tmp_path, text, "own.json")
    found = mistakes(load_config(flags={"ds_config": path}))
    assert [error.where for error in found] == [f"{path}:2", f"{path}:4"]


def test_all_mistakes_are_found_each_once(tmp_path: Path) -> None:
    path = own(tmp_path, '{"fp61": {"enabled": true,\n"loss_scale": 1},\n"amp": {}, "stage": 2}', "own.json")
    found = mistakes(load_config(flags={"ds_config": path}, settings=["deepspeed.aio.depth=3"]))
    assert [error.where for error in found] == [
        f"{path}:1",
        f"{path}:3",
        f"{path}:3",
        "--set deepspeed.aio.depth",
    ]


KEY = st.text(min_size=1, max_size=8)
TREE = st.recursive(
    st.none()
    | st.integers()
    | st.text(max_size=8)
    | st.lists(st.dictionaries(KEY, st.integers(), max_size=2)),
    lambda inner: st.dictionaries(KEY, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(KEY, TREE, max_size=4), st.sampled_from([None, 1, "\t"]))
def test_lines_of_json_keys(values: dict[str, Any], indent: Any) -> None:
    text = json.dumps(values, indent=indent)
    found = _lines_of_keys(text, "any.json")
    lines = text.split("\n")
    assert set(found) == set(_paths(values))
    for keys, line in found.items():
        assert f"{json.dumps(keys[-1])}:" in lines[line - 1]


def _paths(values: dict[str, Any], above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for key, value in values.items():
        found.append((*above, key))
        found += _paths(value, (*above, key)) if isinstance(value, dict) else []
    return found


# --- keys that can't be used here


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("gradient_allreduce_op=sum", "grow with the number of replicas"),
        ("managed_gradient_accumulation=false", "each micro-batch would become an optimizer step"),
        ("checkpoint.load_universal=true", "universal"),
        ("tensor_parallel.autotp_size=2", "pipeline stages and replicas only"),
        ("compile.deepcompile=1", "without compiling anything"),
        ('hybrid_engine.enabled="1"', "builds its engines itself"),
        ("sequence_parallel_size=2", "pipeline stages and replicas only"),
        ("zero_optimization.zenflow.topk_ratio=0.2", "ZenFlow"),
        ("data_efficiency.enabled=true", "reads the data itself"),
        ("datastates_ckpt={a: 1}", "returns earlier"),
    ],
)
def test_what_would_break_the_plans_word(setting: str, words: str) -> None:
    with pytest.raises(DstrainError) as caught:
        plan(settings=(f"deepspeed.{setting}",))
    assert words in caught.value.message and caught.value.hint


@pytest.mark.parametrize(
    "setting",
    [
        "gradient_allreduce_op=mean", "managed_gradient_accumulation=true", "checkpoint.load_universal=false",
        "tensor_parallel.autotp_size=1", "sequence_parallel_size=1", "data_efficiency.enabled=false",
        "flops_profiler.profile_step=3", "comms_logger.enabled=true",
    ],
)  # fmt: skip
def test_what_says_the_same_or_harms_nobody(setting: str) -> None:
    key, value = setting.split("=")
    path = ("deepspeed", *key.split("."))
    assert plan(settings=(f"deepspeed.{setting}",)).deepspeed_origins[key] == f"--set {'.'.join(path)}", value


@pytest.mark.parametrize("key", ["wall_clock_breakdown", "flops_profiler.enabled"])
def test_deepspeeds_timers_fail_with_stages_alone(key: str) -> None:
    """Run with DeepSpeed 0.19.8: "bwd_microstep timer has already been started" with two stages, none with one."""
    assert plan(settings=(f"deepspeed.{key}=true",))
    with pytest.raises(DstrainError, match="pipeline engine fails"):
        plan(pipeline=2, settings=(f"deepspeed.{key}=true",))
    assert plan(pipeline=2, settings=(f"deepspeed.{key}=false",))


def test_deprecated_offload_leads_to_dstrains_own() -> None:
    with pytest.raises(DstrainError, match="--offload cpu"):
        plan(settings=("deepspeed.zero_optimization.cpu_offload=true",))


def test_another_name_of_a_key_is_written_under_its_first(tmp_path: Path) -> None:
    made = plan(zero=3, settings=("deepspeed.zero_optimization.prefetch_bucket_size=9",))
    block = made.deepspeed["zero_optimization"]
    assert block["stage3_prefetch_bucket_size"] == 9 and "prefetch_bucket_size" not in block
    with pytest.raises(DstrainError, match=r"bf16\.enabled = true contradicts false"):
        plan(settings=("deepspeed.bfloat16.enabled=true",))
