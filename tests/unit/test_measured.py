"""A run's plan beside what the run measured, and the utilisation that later plans take from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from dstrain.api import calibration
from dstrain.api.measured import measured
from dstrain.cli.plan import command
from dstrain.errors import DstrainError
from dstrain.estimate.device import Device, find_device
from dstrain.files import write_json
from dstrain.planning.layout import Host
from dstrain.planning.plan import Machines, Plan
from dstrain.report.measured import HeldAgainst, hold_against
from dstrain.runs.record.record import FORMAT
from dstrain.runs.run_folder import RunFolder
from tests.support.plans import plan, shape

H100 = find_device("h100-80g", "here")
ON_GPUS = Machines(
    (Host("node", 4),), "cuda", ("NVIDIA H100",) * 4, memory_bytes=H100.memory_bytes, device=H100
)


def planned(**choices: Any) -> Plan:
    values = {"precision": "bf16", "zero": 1, "global_batch": 16, "micro_batch": 2, "pipeline": 2}
    return plan(machines=ON_GPUS, model=shape(40), **{**values, **choices})


def launch(of: Plan, first_step: int = 1) -> dict[str, Any]:
    """A line of launches.jsonl, as the record has it."""
    layout = of.layout
    return {
        "format": FORMAT,
        "first_step": first_step,
        "config": of.config,
        "batch": {"micro_batch": of.batch.micro_batch},
        "layout": {
            "pipeline": layout.pipeline,
            "data_parallel": layout.data_parallel,
            "schedule": layout.schedule,
            "cut": list(layout.cut),
        },
    }


def steps(seconds: Sequence[float], first: int = 1, memory: int = 10**9, **more: Any) -> list[dict[str, Any]]:
    return [
        {"step": first + number, "loss": 1.0, "seconds": each, "memory": memory, **more}
        for number, each in enumerate(seconds)
    ]


def run_folder(
    place: Path, of: Plan, lines: list[dict[str, Any]], launches: list[dict[str, Any]] | None = None
) -> RunFolder:
    folder = RunFolder(place / "run")
    folder.path.mkdir()
    folder.config.write_text("model: llama-1b\n", encoding="utf-8")
    write_json(folder.plan, of.to_record())
    for path, records in ((folder.metrics, lines), (folder.launches, launches or [launch(of)])):
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return folder


def held(place: Path, of: Plan, seconds: Sequence[float], **more: Any) -> HeldAgainst:
    return hold_against(run_folder(place, of, steps(seconds, **more)))


def test_each_estimate_stands_beside_its_measurement(tmp_path: Path) -> None:
    made = planned()
    assert made.time is not None
    lines = [{"step": 0, "validation_loss": 2.0, "tokens": 0}, *steps([9.0, 5.0, 1.0, 3.0, 2.0])]
    lines[-1] |= {"memory": 3 * 10**9, "traffic_stages": 4096}
    found = measured(run_folder(tmp_path, made, lines).path)
    assert found.steps == (3, 5)  # the first two warm up
    step, memory = found.row("a step"), found.row("memory of the fullest rank")
    assert (step.estimated, step.measured) == (made.time.total, 2.0)
    assert step.difference == pytest.approx(2.0 / made.time.total - 1)
    assert memory.measured == 3 * 10**9
    assert memory.estimated == max(need.total for need in made.stage_memory)
    assert found.row("throughput").measured == made.batch.tokens / 2.0
    sent = {part.what: part.bytes for part in made.time.traffic}
    between = found.row("traffic between stages")
    assert between.estimated == max(
        sent["activations"], sent["activation gradients"]
    )  # one stage sends the one
    assert between.measured == 4096
    assert found.row("traffic among replicas").measured is None
    record = json.loads(json.dumps(found.to_record()))
    assert {row["what"] for row in record["rows"]} == {row.what for row in found.rows}


def test_a_stage_in_the_middle_sends_both_ways(tmp_path: Path) -> None:
    made = planned(pipeline=4)
    assert made.time is not None
    sent = {part.what: part.bytes for part in made.time.traffic}
    between = held(tmp_path, made, [1.0] * 3).row("traffic between stages")
    assert between.estimated == sent["activations"] + sent["activation gradients"]


def test_the_first_steps_count_where_there_are_no_others(tmp_path: Path) -> None:
    found = held(tmp_path, planned(), [4.0, 2.0])
    assert found.row("a step").measured == 3.0
    assert any("slower than later ones" in note for note in found.notes)


def test_only_the_newest_launch_counts(tmp_path: Path) -> None:
    made = planned()
    other = planned(pipeline=1, zero=2)
    lines = [*steps([9.0] * 5), *steps([2.0] * 4, first=6)]
    folder = run_folder(tmp_path, made, lines, [launch(other), launch(made, first_step=6)])
    found = hold_against(folder)
    assert found.row("a step").measured == 2.0 and found.steps == (8, 9)
    assert any("before 6 are left out" in note for note in found.notes)


@pytest.mark.parametrize(
    ("trained", "difference"),
    [
        ({"pipeline": 4}, "pipeline 4 and not 2"),
        ({"zero": 2}, "ZeRO-2 and not 1"),
        ({"micro_batch": 4}, "micro_batch 4 and not 2"),
    ],
)
def test_steps_of_another_layout_are_refused(
    tmp_path: Path, trained: dict[str, Any], difference: str
) -> None:
    folder = run_folder(tmp_path, planned(), steps([1.0] * 3), [launch(planned(**trained))])
    with pytest.raises(DstrainError, match=difference) as caught:
        hold_against(folder)
    assert "resume" in (caught.value.hint or "")


def test_a_run_without_steps_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, planned(), [{"step": 0, "validation_loss": 2.0}])
    with pytest.raises(DstrainError, match="not trained a step yet") as caught:
        hold_against(folder)
    assert "resume" in (caught.value.hint or "")
    folder.metrics.unlink()
    with pytest.raises(DstrainError, match="not trained a step yet"):
        hold_against(folder)


def test_a_launch_that_trained_nothing_yet_is_refused(tmp_path: Path) -> None:
    made = planned()
    folder = run_folder(tmp_path, made, steps([1.0] * 5), [launch(made), launch(made, first_step=6)])
    with pytest.raises(DstrainError, match="newest launch has not trained"):
        hold_against(folder)


def test_a_run_whose_time_was_not_estimated_still_tells_its_own(tmp_path: Path) -> None:
    made = plan(machines=replace(ON_GPUS, device=None), precision="bf16", zero=1)
    found = held(tmp_path, made, [1.0] * 4)
    assert found.row("a step").estimated is None and found.row("a step").difference is None
    assert found.row("a step").measured == 1.0


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("DSTRAIN_CACHE", str(cache))
    return cache


def with_utilisation(device: Device, **choices: Any) -> Plan:
    return plan(
        machines=replace(ON_GPUS, device=device),
        model=shape(40),
        **{"precision": "bf16", "zero": 1, "global_batch": 16, "micro_batch": 2, "pipeline": 2, **choices},
    )


def test_a_calibrated_plan_estimates_what_was_measured(tmp_path: Path, own_cache: Path) -> None:
    # A slow device: it mostly computes.
    slow = replace(H100, flops={"bf16": 1e10, "fp32": 1e10}, layer_overhead=0.0)
    truth = with_utilisation(replace(slow, utilisation=0.21)).time
    assert truth is not None
    found = held(tmp_path, with_utilisation(slow), [truth.total] * 5)
    kept = calibration.keep(found, slow)
    assert kept.utilisation == pytest.approx(0.21, rel=1e-6)
    later = calibration.calibrated(slow, "bf16")
    made = with_utilisation(later)
    assert made.time is not None and made.time.total == pytest.approx(truth.total, rel=1e-6)
    assert any("measured by run run, steps 3 to 5" in text for text in made.time.assumptions)
    assert calibration.calibrated(slow, "fp32") == slow  # another precision, another rate
    assert calibration.calibrated(replace(slow, name="other"), "bf16").utilisation == slow.utilisation
    assert calibration.forget(slow) == [kept]
    assert calibration.calibrated(slow, "bf16") == slow and calibration.forget(slow) == []


def test_what_no_utilisation_explains_is_not_kept(tmp_path: Path, own_cache: Path) -> None:
    found = held(tmp_path, planned(), [1e-9] * 4)
    with pytest.raises(DstrainError, match="can't be told"):
        calibration.keep(found, H100)
    with pytest.raises(DstrainError, match="was planned for h100-80g"):
        calibration.keep(found, find_device("l4", "here"))
    with pytest.raises(DstrainError, match="devices of unknown speed"):
        calibration.keep(found, None)
    assert not (own_cache / "calibration").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"utilisation": 2.0}', "{", '{"device": "h100-80g"}'])
def test_a_damaged_calibration_counts_as_none(tmp_path: Path, own_cache: Path, text: str) -> None:
    slow = replace(H100, flops={"bf16": 1e10}, precisions=("bf16",), layer_overhead=0.0)
    truth = with_utilisation(replace(slow, utilisation=0.3)).time
    assert truth is not None
    calibration.keep(held(tmp_path, with_utilisation(slow), [truth.total] * 4), slow)
    (path,) = (own_cache / "calibration").iterdir()
    path.write_text(text, encoding="utf-8")
    assert calibration.calibrated(slow, "bf16") == slow


def said(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def test_the_command_shows_a_table_or_json(tmp_path: Path, own_cache: Path) -> None:
    made = planned()
    folder = run_folder(tmp_path, made, steps([2.0] * 5, memory=3 * 10**9))
    table = said("--of", str(folder.path))
    assert table.exit_code == 0, table.output
    assert made.time is not None
    difference = f"{2.0 / made.time.total - 1:+.0%}".replace("%", " %")
    assert "2 s" in table.output and "3 GB" in table.output and difference in table.output
    record = json.loads(said("--of", str(folder.path), "--json").output)
    assert record["steps"] == [3, 5] and record["rows"][0]["measured"] == 2.0
    assert json.loads(said("--forget-calibration", "--json").output) == {"removed": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--of", "RUN", "--zero", "2"], "--of can't be combined with --zero"),
        (["--of", "RUN", "--fit"], "--of can't be combined with --fit"),
        (["--of", "RUN", "--set", "lr=1"], "--of can't be combined with --set"),
        (["--calibrate"], "--calibrate requires --of"),
        (["--forget-calibration", "--of", "RUN"], "--forget-calibration can't be combined with --of"),
        (["--of", "nothing"], "is not a run folder"),
    ],
)
def test_what_can_not_stand_together_is_refused(arguments: list[str], message: str) -> None:
    error = said(*arguments).exception
    assert isinstance(error, DstrainError) and message in error.message and error.hint
