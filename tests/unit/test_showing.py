"""A plan as it is shown: the picture has every rank once, fits the line, and leaves out what is alike."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dstrain.cli.showing.estimates import format_duration
from dstrain.cli.showing.picture import picture
from dstrain.cli.showing.plan import show_plan
from dstrain.estimate.device import find_device
from dstrain.planning.layout import Host
from dstrain.planning.plan import Machines, Plan
from tests.support.plans import plan, shape


def gpus(hosts: int, devices: int) -> Machines:
    device = find_device("a100-80g", "--device")
    return Machines(
        tuple(Host(f"node-{number}", devices) for number in range(hosts)),
        "cuda",
        memory_bytes=device.memory_bytes,
        device=device,
    )


def drawn(made: Plan, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(picture(made, console))
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [60, 80, 110, 160])
@pytest.mark.parametrize(
    ("hosts", "devices", "pipeline"), [(1, 1, 1), (1, 8, 4), (2, 4, 2), (3, 6, 3), (2, 4, 8)]
)
def test_each_rank_stands_once_in_the_picture(hosts: int, devices: int, pipeline: int, width: int) -> None:
    made = plan(machines=gpus(hosts, devices), pipeline=pipeline, global_batch=hosts * devices * 4)
    text = drawn(made, width)
    assert [int(rank) for rank in re.findall(r"rank (\d+)", text)] == list(range(hosts * devices))
    assert max(map(len, text.splitlines())) <= width
    stages = [int(stage) for stage in re.findall(r"stage (\d+)", text)]
    replicas = [int(replica) for replica in re.findall(r"replica (\d+)", text)]
    assert list(zip(stages, replicas, strict=True)) == [
        (place.stage, place.replica) for place in made.layout.places()
    ]


def test_a_picture_in_full() -> None:
    """Two replicas of two stages on two hosts, in 80 columns."""
    text = drawn(plan(machines=gpus(2, 2), pipeline=2, global_batch=16), 80)
    assert [line.rstrip() for line in text.splitlines()] == [
        "2 stages x 2 replicas = 4 ranks on 2 hosts x 2 devices (a100-80g)",
        "node-0 ┌───────────┬───────────┐",
        "       │ cuda:0    │ cuda:1    │",
        "       ├───────────┼───────────┤",
        "       │ rank 0    │ rank 1    │",
        "       │ stage 0   │ stage 1   │",
        "       │ replica 0 │ replica 0 │",
        "       │ embed-b2  │ b3-head   │",
        "       └───────────┴───────────┘",
        "node-1 ┌───────────┬───────────┐",
        "       │ cuda:0    │ cuda:1    │",
        "       ├───────────┼───────────┤",
        "       │ rank 2    │ rank 3    │",
        "       │ stage 0   │ stage 1   │",
        "       │ replica 1 │ replica 1 │",
        "       │ embed-b2  │ b3-head   │",
        "       └───────────┴───────────┘",
        "each replica's micro-batches pass through the stages and back; replicas of a",
        "stage sum their gradients",
    ]


def test_with_dualpipev_both_spans_stand_on_a_device() -> None:
    made = plan(
        machines=gpus(1, 2),
        model=shape(8),
        pipeline=2,
        schedule="dualpipev",
        micro_batch=1,
        global_batch=8,
    )
    text = drawn(made, 80)
    assert "embed-b" in text and "-head" in text
    first_device = [line.split("│")[1].strip() for line in text.splitlines() if line.count("│") == 3]
    assert first_device[-2].startswith("embed") and first_device[-1].endswith("head")


def test_hosts_and_devices_that_are_alike_are_left_out() -> None:
    text = drawn(plan(machines=gpus(16, 8), pipeline=4, global_batch=128), 120)
    assert "... and 14 more hosts like these, the last one node-15 with ranks 120 to 127" in text
    assert text.count("rank ") == 16
    many = drawn(plan(data_parallel=40, global_batch=40, micro_batch=1), 120)
    assert "... up to cpu:39 with rank 39" in many


def test_the_whole_plan_fits_the_line_and_says_each_part() -> None:
    console = Console(file=io.StringIO(), width=100)
    made = plan(machines=gpus(2, 4), pipeline=4, zero=1, global_batch=64, micro_batch=4)
    show_plan(made, console, verbose=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 100
    for part in (
        "model ",
        "batch ",
        "disk ",
        "of a rank",
        "per step, estimated",
        "tokens/s",
        "assumes",
        "choice",
    ):
        assert part in text
    assert made.memory_verdict.split(":")[0] in text
    for warning in made.warnings:
        assert " ".join(warning.split()) in " ".join(text.split())


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0005, "0.5 ms"), (0.82, "820 ms"), (1.5, "1.5 s"), (99, "99 s"), (200, "3 min 20 s"), (3600, "1 h 0 min"),
        (7500, "2 h 5 min"), (86400 * 12.44, "12.4 days"),
    ],
)  # fmt: skip
def test_durations(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.parametrize("flags", [{"offload": "cpu"}, {"zero": 3}, {"activation_checkpointing": True}])
def test_nothing_is_cut_off_in_80_columns(flags: dict[str, object]) -> None:
    """Offload sends over a link of its own."""
    console = Console(file=io.StringIO(), width=80)
    choices = {"zero": 2, "pipeline": 2, "global_batch": 64, "precision": "bf16"} | flags
    made = plan(machines=gpus(2, 4), model=shape(64, hidden_size=8192), **choices)
    show_plan(made, console, verbose=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text and max(map(len, text.splitlines())) <= 80
    assert ("to the host's memory" in text) == ("offload" in flags)
