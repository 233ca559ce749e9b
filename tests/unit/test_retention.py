"""Which steps are saved, which checkpoints stay, and how much of the disk that takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from dstrain.cli.options import choices, given
from dstrain.config.loader import load_config
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.estimate.disk import check_disk, most_checkpoints
from dstrain.formatting import format_bytes
from dstrain.train.checkpointing.checkpoints import SaveSchedule
from tests.support.plans import MINIMAL, plan, shape


@pytest.mark.parametrize(
    ("written", "steps", "seconds"),
    [
        ("500", 500, None),
        ("0", 0, None),
        ("20m", "20m", 1200),
        ("1h30m", "1h30m", 5400),
        ("never", "never", None),
    ],
)
def test_save_every_is_steps_or_time(
    written: str, steps: int | str, seconds: int | None, tmp_path: Path
) -> None:
    @click.command()
    @choices
    def command(settings: tuple[str, ...], **flags: Any) -> None:
        by_flag = load_config(config_file=str(MINIMAL), flags=given(flags)).config
        assert (by_flag.save_every, by_flag.save_every_seconds) == (steps, seconds)

    said = CliRunner().invoke(command, ["--save-every", written])
    assert said.exit_code == 0, said
    assert load_config(settings=(f"save_every={written}",)).config.save_every == steps
    (tmp_path / "c.yaml").write_text(f"save_every: {written}\n")
    assert load_config(config_file=str(tmp_path / "c.yaml")).config.save_every == steps


@pytest.mark.parametrize(
    "value", ["500", "", "20", "m", "0m", "-5m", "20 m", "often", -1, 1.5, True, None, []]
)
def test_what_save_every_is_not(value: Any) -> None:
    with pytest.raises(DstrainError, match=r"a number of steps \(0 or more\), a duration such as 20m"):
        load_config(flags={"save_every": value})


def saved_steps(config: RunConfig, clock: Any = None) -> list[int]:
    schedule = SaveSchedule(config, **({"clock": clock} if clock else {}))
    return [step for step in range(1, config.steps + 1) if schedule.due(step)]


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"save_every": 3}, [3, 6, 9, 10]),
        ({"save_every": 0}, [10]),
        ({"save_every": 5}, [5, 10]),
        ({"save_every": 4, "keep_every": 3}, [3, 4, 6, 8, 9, 10]),
        ({"save_every": 0, "keep_every": 4}, [4, 8, 10]),
        ({"save_every": 100}, [10]),
        ({"save_every": "never"}, []),
    ],
)
def test_steps_that_are_saved(keys: dict[str, Any], steps: list[int]) -> None:
    assert saved_steps(RunConfig(steps=10, **keys)) == steps


def kept(steps: list[int], keep: int, keep_every: int) -> tuple[list[int], int]:
    """What lies there in the end, and how many there were at most, told step by step."""
    there: list[int] = []
    most = 0
    for step in steps:
        there.append(step)
        most = max(most, len(there))
        newest = there[-keep:]
        there = [s for s in there if s in newest or (keep_every and s % keep_every == 0)]
    return there, most


@pytest.mark.parametrize("save_every", [0, 1, 3, 4, 7, 50])
@pytest.mark.parametrize("keep", [1, 2, 5])
@pytest.mark.parametrize("keep_every", [0, 1, 3, 6, 10])
def test_the_plan_counts_no_fewer_than_there_will_be(save_every: int, keep: int, keep_every: int) -> None:
    for steps in (1, 2, 9, 30):
        config = RunConfig(steps=steps, save_every=save_every, keep=keep, keep_every=keep_every)
        _, most = kept(saved_steps(config), keep, keep_every)
        assert most <= most_checkpoints(config) <= most + keep + 1
        if not keep_every:
            assert most_checkpoints(config) == most


def test_by_the_clock_any_step_may_be_saved() -> None:
    assert most_checkpoints(RunConfig(steps=100, save_every="20m", keep=3)) == 4
    assert most_checkpoints(RunConfig(steps=100, save_every="20m", keep=3, keep_every=10)) == 14
    assert most_checkpoints(RunConfig(steps=100, save_every="never", keep=3)) == 0


def test_the_plan_says_what_a_checkpoint_takes() -> None:
    model = shape(blocks=6)
    number = model.total_parameters
    sizes = {
        zero: plan(model=model, zero=zero, precision="bf16" if zero else "fp32").checkpoint_bytes
        for zero in (0, 1, 2, 3)
    }
    each = {zero: size / number for zero, size in sizes.items()}
    assert each == pytest.approx({0: 12, 1: 14, 2: 14, 3: 12}, rel=0.02)
    made = plan(model=model, steps=1000, save_every=100, keep=3)
    assert made.disk_bytes == 4 * made.checkpoint_bytes
    with_weights = plan(model=model, steps=1000, save_every=100, keep=3, settings=("save_weights=true",))
    assert with_weights.disk_bytes == made.disk_bytes + 4 * number


def test_a_disk_that_is_too_small_is_refused_with_numbers() -> None:
    one = 2_000_000_000
    check_disk(needed=3 * one, one=one, free=2 * one, held=one, where="runs/x")
    with pytest.raises(DstrainError) as error:
        check_disk(needed=6 * one, one=one, free=2 * one, held=one, where="runs/x")
    text = str(error.value)
    assert text.startswith("runs/x: the checkpoints need 12 GB at most (2 GB each,")
    assert "6 GB are free for them" in text and "--keep 2 without --keep-every fits" in text
    with pytest.raises(DstrainError) as error:
        check_disk(needed=2 * one, one=one, free=one // 2, held=0, where="runs/x")
    assert "--keep" not in str(error.value.hint) and "runs_dir=FOLDER" in str(error.value.hint)


@pytest.mark.parametrize(
    ("size", "words"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (12_345, "12.3 kB"), (999_999, "1 MB"),
     (1_540_000_000, "1.54 GB"), (2e12, "2 TB"), (1.5e16, "15,000 TB")],
)  # fmt: skip
def test_bytes_in_words(size: float, words: str) -> None:
    assert format_bytes(size) == words
