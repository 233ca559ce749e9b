"""``dstrain plan --fit``: what it proposes is what `dstrain plan` with its flags says, and the user's choices stay."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dstrain.estimate.memory import memory_needed
from dstrain.planning.plan import Plan
from tests.support.e2e import Said

COMMON = (
    "--model", "model", "--data", "text.jsonl", "--tokenizer", "bytes", "--seq-len", "32", "--global-batch", "16",
)  # fmt: skip
GPUS = ("--device", "h100-80g", "--nodes", "2", "--gpus-per-node", "2")


def record(said: Said) -> Any:
    assert said.code == 0, said.err
    return json.loads(said.out)


@pytest.mark.parametrize("machines", [GPUS, ()], ids=["described GPUs", "this machine's cores"])
def test_rows_say_what_plan_says_with_their_flags(
    dstrain_here: Callable[..., Said], machines: tuple[str, ...]
) -> None:
    found = record(dstrain_here("plan", *COMMON, *machines, "--fit", "--json"))
    assert found["fits"] and found["fixed"] == [] and len(found["rows"]) > 2
    ranks = {row["choices"]["pipeline"] * row["choices"]["data_parallel"] for row in found["rows"]}
    assert max(ranks) > 1
    for row in found["rows"][:3]:
        said = record(dstrain_here("plan", *COMMON, *machines, *shlex.split(row["flags"]), "--json"))
        assert {key: said["config"][key] for key in row["choices"] if key != "data_parallel"} == {
            key: value for key, value in row["choices"].items() if key != "data_parallel"
        }
        assert said["layout"]["data_parallel"] == row["choices"]["data_parallel"]
        assert said["time"] == row["time"]
        plan = Plan.from_record(said)
        assert memory_needed(plan.layout, plan.stage_memory, plan.accelerator)[0] == row["memory_bytes"]


def test_the_table_says_what_to_type_and_why_the_others_fell(dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("plan", *COMMON, *GPUS, "--zero", "2", "--fit")
    assert said.code == 0, said.err
    for words in (
        "4 x h100-80g on 2 hosts",
        "--zero 2",
        "zero2-pp1-dp4",
        "--micro-batch",
        "candidates",
        "tokens/s",
    ):
        assert words in said.out, said.out
    assert "zero1" not in said.out and "--zero 1" not in said.out


def test_without_a_known_device_it_asks_for_one(
    dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstrain.api.machines.cpu_device", lambda *_, **__: None)
    said = dstrain_here("plan", *COMMON, "--fit")
    assert said.code == 2 and "--device" in said.err and "Traceback" not in said.err


def test_choices_that_leave_nothing_are_refused_as_plan_refuses_them(
    dstrain_here: Callable[..., Said],
) -> None:
    for choices in (
        ("--micro-batch", "3"),
        ("--pipeline", "300"),
        ("--pipeline", "3", "--data-parallel", "3"),
    ):
        said = dstrain_here("plan", *COMMON, *GPUS, *choices, "--fit")
        assert said.code == 2 and said.err == dstrain_here("plan", *COMMON, *GPUS, *choices).err


def test_a_precision_that_the_device_has_not_is_refused(dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("plan", *COMMON, "--device", "t4", "--precision", "bf16", "--fit")
    assert said.code == 2 and "bf16" in said.err and "--precision" in said.err, said.err


def test_where_nothing_fits_it_says_by_how_much_and_what_would_help(
    dstrain_here: Callable[..., Said], repository: Path, place: Path
) -> None:
    described = (repository / "ds_configs" / "devices" / "h100-80g.yaml").read_text()
    (place / "small.yaml").write_text(re.sub(r"memory_mib: \d+", "memory_mib: 8", described))
    arguments = (
        "plan", *COMMON, "--global-batch", "256", "--device", "small.yaml", "--gpus-per-node", "1", "--fit",
    )  # fmt: skip
    assert record(dstrain_here(*arguments, "--json"))["fits"]
    said = dstrain_here(*arguments, "--micro-batch", "256")
    assert said.code == 0, said.err
    words = " ".join(said.out.split())
    assert "nothing fits. The closest layout needs" in words
    assert "A layout fits without --micro-batch 256" in words
    found = record(dstrain_here(*arguments, "--micro-batch", "256", "--json"))
    assert not found["fits"] and found["helps"] == ["--micro-batch 256"]
    assert found["rows"][0]["memory_bytes"] > found["limit_bytes"] > 0


def test_no_layout_is_cut_off_in_80_columns(
    dstrain_here: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    said = dstrain_here(
        "plan", *COMMON, "--device", "h100-80g", "--nodes", "2", "--global-batch", "1024", "--fit"
    )
    assert said.code == 0 and "…" not in said.out, said.out


def test_one_thing_at_a_time(dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("plan", *COMMON, "--fit", "--explain", "zero")
    assert said.code == 2 and "--explain describes one" in said.err
