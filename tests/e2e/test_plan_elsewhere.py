"""``dstrain plan`` for machines that are not here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.planning.plan import Plan
from tests.support.e2e import Said

GOOD = ["plan", "--model", "model", "--data", "text.jsonl", "--seq-len", "32", "--global-batch", "64"]


@pytest.mark.timeout(120)
def test_sixteen_gpus_that_are_not_here(place: Path, dstrain_here: Callable[..., Said]) -> None:
    described = ["--device", "a100-80g", "--nodes", "2", "--pipeline", "4", "--precision", "bf16"]
    said = dstrain_here(*GOOD, *described, "--json")
    assert said.code == 0, said
    record = json.loads(said.out)
    assert (record["accelerator"], record["device"], record["memory_bytes"]) == (
        "cuda",
        "a100-80g",
        81920 * 2**20,
    )
    assert [host["name"] for host in record["layout"]["hosts"]] == ["node-0", "node-1"]
    assert len(record["layout"]["ranks"]) == 16 and record["layout"]["data_parallel"] == 4
    assert record["memory_verdict"].startswith("fits")
    links = {sent["what"]: sent["link"] for sent in record["time"]["traffic"]}
    assert (links["gradients"], links["activations"]) == ("between", "inside")
    assert Plan.from_record(record).time is not None

    shown = dstrain_here(*GOOD, *described)
    assert shown.code == 0 and "tokens/s" in shown.out and "a100-80g" in shown.out
    assert "fits" in shown.out


def test_this_machine_s_cpu_has_a_time_too(place: Path, dstrain_here: Callable[..., Said]) -> None:
    record = json.loads(dstrain_here(*GOOD, "--json").out)
    assert record["accelerator"] == "cpu" and record["device"]
    assert record["time"]["total"] > 0 and "cores" in " ".join(record["time"]["assumptions"])


def test_only_plan_has_them(place: Path, dstrain_here: Callable[..., Said]) -> None:
    said = dstrain_here("run", *GOOD[1:], "--device", "a100-80g")
    assert said.code == 2 and "--device" in said.err
