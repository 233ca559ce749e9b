"""The DeepSpeed JSON of each layout against golden files, and what a user may lay on top of it.

The files in ``golden/`` are written anew by ``python tests/unit/test_deepspeed_json.py --update`` (from the
repository's root, with dstrain importable). Read the difference before you keep it: each of these JSON files is
what some run trains with.
"""

from __future__ import annotations

import difflib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.config.values import leaves
from dstrain.errors import DstrainError
from dstrain.planning.layout import Host
from dstrain.planning.plan import Machines, Plan
from tests.support.plans import plan, shape

GOLDEN = Path(__file__).parent / "golden"
MATRIX = list(itertools.product((0, 1, 2, 3), ("fp32", "bf16", "fp16"), (1, 2)))


def case(zero: int, precision: str, pipeline: int) -> Plan:
    return plan(zero=zero, precision=precision, pipeline=pipeline, data_parallel=2, global_batch=16)


def refused(**choices: Any) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        plan(**choices)
    assert caught.value.exit_code == 2
    return caught.value


# --- golden files


def golden_text(zero: int, precision: str, pipeline: int) -> str:
    """The JSON with the origin of each key, or the refusal."""
    try:
        made = case(zero, precision, pipeline)
    except DstrainError as error:
        record: dict[str, Any] = {
            "refused": {"where": error.where, "reason": error.message, "instead": error.hint}
        }
    else:
        record = {"deepspeed": made.deepspeed, "origins": made.deepspeed_origins}
    return json.dumps(record, indent=2) + "\n"


def golden_path(zero: int, precision: str, pipeline: int) -> Path:
    return GOLDEN / f"zero{zero}-{precision}-pipeline{pipeline}.json"


@pytest.mark.parametrize(("zero", "precision", "pipeline"), MATRIX)
def test_golden(zero: int, precision: str, pipeline: int) -> None:
    path = golden_path(zero, precision, pipeline)
    expected, found = path.read_text(encoding="utf-8"), golden_text(zero, precision, pipeline)
    lines = difflib.unified_diff(expected.splitlines(), found.splitlines(), path.name, "now", lineterm="")
    assert expected == found, "\n".join(["--update writes them anew, see the top of this file", *lines])


def test_no_golden_file_is_left_over() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {golden_path(*entry).name for entry in MATRIX}


# --- what DeepSpeed does wrong where a key is left out (docs: what is known of DeepSpeed 0.19.8)


def accepted() -> list[tuple[int, str, int]]:
    found = []
    for entry in MATRIX:
        try:
            case(*entry)
        except DstrainError:
            continue
        found.append(entry)
    return found


def test_which_are_accepted() -> None:
    refused = {(0, precision, pipeline) for precision in ("bf16", "fp16") for pipeline in (1, 2)}
    assert set(MATRIX) - set(accepted()) == refused


@pytest.mark.parametrize(("zero", "precision", "pipeline"), sorted(set(MATRIX) - set(accepted())))
def test_refusals_say_why_and_what_works(zero: int, precision: str, pipeline: int) -> None:
    error = refused(zero=zero, precision=precision, pipeline=pipeline, data_parallel=2)
    assert error.where == "--zero"
    assert len(error.message.split()) > 8, "a reason"
    words = (error.hint or "").replace(",", " ").split()
    instead = int(words[words.index("--zero") + 1])
    assert case(instead, precision, pipeline)


@pytest.mark.parametrize(("zero", "precision", "pipeline"), accepted())
def test_no_dangerous_key_is_left_to_deepspeed(zero: int, precision: str, pipeline: int) -> None:
    made = case(zero, precision, pipeline)
    values = made.deepspeed
    assert values["gradient_clipping"] == 1.0  # left out, DeepSpeed clips at 1.0 unasked
    assert values["data_types"]["grad_accum_dtype"] == "fp32"  # left out, bf16 sums up in bf16
    assert values["fp16"]["enabled"] is (precision == "fp16")
    assert values["bf16"]["enabled"] is (precision == "bf16")
    assert values["torch_autocast"]["enabled"] is False
    assert values["zero_optimization"]["stage"] == zero
    assert values["checkpoint"]["tag_validation"] == "Fail"
    assert values["wall_clock_breakdown"] is False  # crashes with stages
    assert "flops_profiler" not in values  # so does this
    assert "scheduler" not in values  # dstrain sets each step's lr itself
    if pipeline > 1:
        assert values["pipeline"]["use_reentrant"] is False
    batch = made.batch
    assert values["train_batch_size"] == batch.global_batch == 16
    assert values["train_micro_batch_size_per_gpu"] == batch.micro_batch
    assert values["gradient_accumulation_steps"] == batch.accumulation
    if zero:
        held = max(made.stage_parameters)
        assert held <= values["zero_optimization"]["reduce_bucket_size"] <= held + 1
    if zero in (1, 2):
        assert held <= values["zero_optimization"]["allgather_bucket_size"] <= held + 1


def test_buckets_never_grow_beyond_what_helps() -> None:
    big = shape(blocks=6)
    layers = tuple(type(layer)(layer.name, layer.kind, layer.parameters * 10_000, 1) for layer in big.layers)
    huge = type(big)(**{**vars(big), "layers": layers, "tied": (), "total_parameters": 10**9})
    values = plan(model=huge, zero=2, steps=1).deepspeed["zero_optimization"]
    assert values["reduce_bucket_size"] == 200_000_000


@pytest.mark.parametrize("clipping", [0.0, 0.5])
def test_clipping_is_always_written(clipping: float) -> None:
    made = plan(settings=(f"gradient_clipping={clipping}",))
    assert made.deepspeed["gradient_clipping"] == clipping
    assert made.deepspeed_origins["gradient_clipping"] == "gradient_clipping (--set gradient_clipping)"


def test_adam_is_adamw_said_aloud() -> None:
    optimizer = plan(lr=0.5).deepspeed["optimizer"]
    assert optimizer["type"] == "AdamW" and optimizer["params"]["adam_w_mode"] is True
    assert optimizer["params"]["lr"] == 0.5
    sgd = plan(settings=("optimizer=sgd", "momentum=0.9")).deepspeed["optimizer"]
    assert sgd == {"type": "SGD", "params": {"lr": 3e-4, "momentum": 0.9, "weight_decay": 0.1}}


def test_communication_overlaps_on_gpus_only_where_it_can() -> None:
    gpus = Machines((Host("localhost", 2),), "cuda")
    assert plan(machines=gpus, zero=3).deepspeed["zero_optimization"]["overlap_comm"] is True
    assert plan(zero=3).deepspeed["zero_optimization"]["overlap_comm"] is False


def test_activation_checkpointing_reaches_the_stages() -> None:
    values = plan(pipeline=2, activation_checkpointing=True).deepspeed["pipeline"]
    assert values["activation_checkpoint_interval"] == 1


@pytest.mark.parametrize("entry", accepted())
def test_every_key_has_an_origin_and_no_placeholder_is_left(entry: tuple[int, str, int]) -> None:
    made = case(*entry)
    paths = {".".join(path): value for path, value in leaves(made.deepspeed)}
    assert set(paths) == set(made.deepspeed_origins)
    assert not [path for path, value in paths.items() if str(value).startswith("$") or value == "auto"]


# --- what the user lays on top


def overlay(tmp_path: Path, text: str, **choices: Any) -> Plan:
    path = tmp_path / "own.json"
    path.write_text(text, encoding="utf-8")
    return plan(ds_config=str(path), **choices)


def overlay_refused(tmp_path: Path, text: str, **choices: Any) -> DstrainError:
    with pytest.raises(DstrainError) as caught:
        overlay(tmp_path, text, **choices)
    return caught.value


def test_a_file_adds_keys_and_tunes_free_ones(tmp_path: Path) -> None:
    made = overlay(
        tmp_path,
        '{\n"comms_logger": {"enabled": true},\n\n"zero_optimization":\n\t{"reduce_bucket_size": 7}}',
        zero=2,
    )
    assert made.deepspeed["comms_logger"] == {"enabled": True}
    assert made.deepspeed["zero_optimization"]["reduce_bucket_size"] == 7
    assert made.deepspeed["zero_optimization"]["stage"] == 2
    assert made.deepspeed_origins["comms_logger.enabled"] == f"{tmp_path / 'own.json'}:2"
    assert made.deepspeed_origins["zero_optimization.reduce_bucket_size"] == f"{tmp_path / 'own.json'}:5"


def test_the_mapping_lies_over_the_file(tmp_path: Path) -> None:
    setting = "deepspeed.zero_optimization.reduce_bucket_size=9"
    text = '{"zero_optimization": {"reduce_bucket_size": 7, "sub_group_size": 5}}'
    made = overlay(tmp_path, text, settings=(setting,))
    assert made.deepspeed["zero_optimization"]["reduce_bucket_size"] == 9
    assert made.deepspeed["zero_optimization"]["sub_group_size"] == 5
    assert made.deepspeed_origins["zero_optimization.reduce_bucket_size"] == f"--set {setting.split('=')[0]}"


def test_auto_means_as_derived(tmp_path: Path) -> None:
    text = """{"train_batch_size": "auto", "gradient_clipping": "auto", "bf16": {"enabled": "auto"},
               "zero_optimization": {"stage": "auto", "reduce_bucket_size": "auto"}}"""
    assert overlay(tmp_path, text, zero=2).deepspeed == plan(zero=2).deepspeed


_HUGGING_FACE_JSON = """{
  "scheduler": {
    "type": "%s",
    "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}
  },
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
  "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
  "gradient_clipping": "auto"
}"""


@pytest.mark.parametrize(
    ("theirs", "ours", "lr_final"),
    [("WarmupLR", "constant", 0.1), ("WarmupDecayLR", "linear", 0.0), ("WarmupCosineLR", "cosine", 0.0001)],
)
def test_a_scheduler_of_auto_values_chooses_the_schedule(
    theirs: str, ours: str, lr_final: float, tmp_path: Path
) -> None:
    made = overlay(tmp_path, _HUGGING_FACE_JSON % theirs)
    assert (made.run_config.lr_schedule, made.run_config.lr_final) == (ours, lr_final)
    assert "scheduler" not in made.deepspeed
    (note,) = [line for line in made.warnings if theirs in line]
    assert f"own.json:3: {theirs} is lr_schedule: {ours}" in note


def test_a_scheduler_of_auto_values_does_not_change_what_the_user_has_set(tmp_path: Path) -> None:
    text = _HUGGING_FACE_JSON % "WarmupDecayLR"
    assert overlay(tmp_path, text, settings=("lr_final=0.5",)).run_config.lr_final == 0.5
    with pytest.raises(DstrainError, match=r"scheduler.type = \"WarmupDecayLR\" can't be set") as caught:
        overlay(tmp_path, text, settings=("lr_schedule=cosine",))
    assert caught.value.where == f"{tmp_path / 'own.json'}:3"


@pytest.mark.parametrize(
    "block",
    [
        '{"type": "WarmupLR", "params": {"warmup_num_steps": 100}}',
        '{"type": "OneCycle", "params": {"cycle_min_lr": "auto"}}',
        '{"type": "WarmupLR", "params": {"betas": ["auto"]}}',
        '{"type": ["WarmupLR"]}',
        '{"params": {"warmup_num_steps": "auto"}}',
    ],
)
def test_another_scheduler_block_is_refused_or_has_no_effect(block: str, tmp_path: Path) -> None:
    try:
        made = overlay(tmp_path, f'{{"scheduler": {block}}}')
    except DstrainError as error:
        assert "scheduler" in error.message
    else:
        assert made.deepspeed == plan().deepspeed


def test_an_offload_block_for_no_device_has_no_effect(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"offload_optimizer": {"device": "%s", "pin_memory": true}}}'
    assert overlay(tmp_path, text % "none").deepspeed == plan().deepspeed
    for offload, device in (("none", "cpu"), ("cpu", "none")):
        with pytest.raises(DstrainError, match="offload_optimizer"):
            overlay(tmp_path, text % device, offload=offload)


def test_saying_what_is_decided_already_changes_nothing(tmp_path: Path) -> None:
    text = (
        '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}, "train_batch_size": 32, "fp16": {}}'
    )
    made = overlay(tmp_path, text, zero=2, precision="bf16")
    assert made == plan(zero=2, precision="bf16", ds_config=str(tmp_path / "own.json"))
    assert made.deepspeed_origins["zero_optimization.stage"] == "zero (--zero)"


def test_an_empty_block_keeps_what_is_in_it(tmp_path: Path) -> None:
    assert overlay(tmp_path, '{"zero_optimization": {}, "optimizer": {}}').deepspeed == plan().deepspeed


@pytest.mark.parametrize(
    ("text", "key", "owner", "value"),
    [
        ('{"zero_optimization": {"stage": 1}}', "zero_optimization.stage", "zero", "2"),
        ('{"bf16": {"enabled": true}}', "bf16.enabled", "precision", "bf16"),
        ('{"fp16": {"enabled": true}}', "fp16.enabled", "precision", "fp16"),
        ('{"train_batch_size": 64}', "train_batch_size", "global_batch", "64"),
        ('{"train_micro_batch_size_per_gpu": 1}', "train_micro_batch_size_per_gpu", "micro_batch", "1"),
        ('{"gradient_accumulation_steps": 32}', "gradient_accumulation_steps", "micro_batch", "1"),
        ('{"gradient_clipping": 0}', "gradient_clipping", "gradient_clipping", "0"),
        ('{"optimizer": {"type": "Adam"}}', "optimizer.type", "optimizer", "sgd"),
        ('{"optimizer": {"params": {"lr": 1}}}', "optimizer.params.lr", "lr", "1"),
        ('{"optimizer": {"params": {"eps": 1e-6}}}', "optimizer.params.eps", "eps", "1e-6"),
        (
            '{"scheduler": {"params": {"cos_min_ratio": 0.1}}}',
            "scheduler.params.cos_min_ratio",
            "lr_final",
            "0.1",
        ),
        ('{"data_types": {"grad_accum_dtype": "bf16"}}', "data_types.grad_accum_dtype", "precision", "bf16"),
        ('{"torch_autocast": {"enabled": true}}', "torch_autocast.enabled", "precision", "bf16"),
        ('{"pipeline": {"use_reentrant": true}}', "pipeline.use_reentrant", "pipeline", "2"),
        ('{"scheduler": {"type": "WarmupLR"}}', "scheduler.type", "lr_schedule", "constant"),
    ],
)
def test_a_decided_key_is_refused_with_both_origins(
    tmp_path: Path, text: str, key: str, owner: str, value: str
) -> None:
    error = overlay_refused(tmp_path, text, zero=2)
    assert error.where == f"{tmp_path / 'own.json'}:1"
    assert error.message.startswith(f"{key} = ")
    origin = "--zero" if owner == "zero" else "default"
    assert f"{owner} = " in error.message and f"({origin})" in error.message
    assert f"--set {owner}=" in (error.hint or "")
    assert plan(settings=(f"{owner}={value}",)), "the hint's way exists"


def test_a_conflict_in_yaml_names_its_line(tmp_path: Path) -> None:
    from dstrain.config.loader import load_config

    path = tmp_path / "own.yaml"
    path.write_text("zero: 2\ndeepspeed:\n  zero_optimization:\n    stage: 1\n")
    resolved = load_config(config_file=str(path))
    from dstrain.planning.make_plan import make_plan
    from tests.support.plans import DATA, LAPTOP

    with pytest.raises(DstrainError) as caught:
        make_plan(resolved, LAPTOP, shape(), DATA, "m")
    assert caught.value.where == f"{path}:4"
    assert f"zero = 2 ({path}:1)" in caught.value.message


@pytest.mark.parametrize(
    "text",
    [
        '{"zero_optimization": 3}',
        '{"fp16": true}',
        '{"optimizer": null}',
        '{"checkpoint": []}',
        '{"scheduler": null}',
    ],
)
def test_a_block_is_not_replaced_by_a_value(tmp_path: Path, text: str) -> None:
    """`"zero_optimization": null` would otherwise take the stage away without a word."""
    error = overlay_refused(tmp_path, text)
    assert "must be a block of keys" in error.message and error.where == f"{tmp_path / 'own.json'}:1"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('{\n"a": 1,\n}', 3, "not valid JSON"),
        ('{\n"a": 1\n"b": 2}', 3, "not valid JSON"),
        ("", 1, "not valid JSON"),
        ("{'a': 1}", 1, "not valid JSON"),
        ('{"a": 1, "b": 2,\n"a": 3}', 2, "duplicate key 'a'"),
        ('{"z": {"a": 1,\n\n"a": 1}}', 3, "duplicate key 'a'"),
        ('{"a": NaN}', None, "NaN is not JSON"),
        ('{"a": -Infinity}', None, "Infinity is not JSON"),
        ("[1, 2]", None, "JSON object"),
        ('"auto"', None, "JSON object"),
    ],
)
def test_bad_json(tmp_path: Path, text: str, line: int | None, words: str) -> None:
    error = overlay_refused(tmp_path, text)
    path = str(tmp_path / "own.json")
    assert error.where == (f"{path}:{line}" if line else path)
    assert words in error.message


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    assert refused(ds_config=str(tmp_path / "none.json")).where == "--ds-config"
    assert refused(ds_config=str(tmp_path)).where == "--ds-config"
    (tmp_path / "latin").write_bytes(b'{"a": "\xe9"}')
    assert "UTF-8" in refused(ds_config=str(tmp_path / "latin")).message


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    assert overlay(tmp_path, '\ufeff{"steps_per_print": 5}').deepspeed["steps_per_print"] == 5


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit(__doc__)
    GOLDEN.mkdir(exist_ok=True)
    for old in GOLDEN.glob("*.json"):
        old.unlink()
    for entry in MATRIX:
        golden_path(*entry).write_text(golden_text(*entry), encoding="utf-8")
