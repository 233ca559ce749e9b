"""The learning rate: the table of built-in schedules, and one from outside, which is tried before the first step."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.planning import check_code_here
from dstrain.config.json_schema import json_schema
from dstrain.config.loader import load_config
from dstrain.config.schema import RunConfig
from dstrain.errors import DstrainError
from dstrain.lr_schedules import LR_SCHEDULES, schedule_keys
from dstrain.planning.checks import refuse
from dstrain.train.lr_schedule import LearningRate, OwnSchedule
from tests.support.own_code import own_schedules
from tests.support.plans import plan

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code"
WSD = "own_schedules:wsd"
OWN = (f"lr_schedule={WSD}", f"code_dirs=[{OWN_CODE}]")


def of(*settings: str, **flags: Any) -> LearningRate:
    return LearningRate.of(load_config(settings=list(settings), flags=flags).config)


def as_before(config: RunConfig, step: int) -> float:
    """The learning rate as version 0.1 computed it, word for word."""
    peak, warmup_steps, steps, final = config.lr, config.warmup_steps, config.steps, config.lr_final
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if config.lr_schedule == "constant":
        return peak
    done = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.lr_schedule == "cosine" else 1 - done
    return peak * (final + (1 - final) * left)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (7, 0), (300, 30), (997, 13), (5, 5), (5, 9)])
@pytest.mark.parametrize("lr_final", [0.0, 0.1, 0.37, 1.0])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_built_in_schedules_are_those_of_0_1_to_the_bit(
    name: str, lr_final: float, steps: int, warmup: int
) -> None:
    settings = (f"lr_schedule={name}", f"lr_final={lr_final}", f"warmup_steps={warmup}", "lr=0.0003")
    config = load_config(settings=settings, flags={"steps": steps}).config
    rate = LearningRate.of(config)
    for step in range(1, steps + 1):
        assert rate(step) == as_before(config, step), step


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_what_they_take_are_config_keys(name: str) -> None:
    assert set(LR_SCHEDULES[name].takes) <= set(RunConfig.model_fields)
    assert set(LR_SCHEDULES[name].takes) <= set(schedule_keys())


def test_a_new_schedule_is_one_entry() -> None:
    script = """
import json
from dstrain.lr_schedules import LR_SCHEDULES, LrSchedule
LR_SCHEDULES["root"] = LrSchedule(lambda step, steps, lr_final: max(lr_final, step ** -0.5), takes=("lr_final",))
from dstrain.config.json_schema import json_schema
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError
from dstrain.train.lr_schedule import LearningRate
from tools.configuration_page import page
rate = LearningRate.of(load_config(settings=["lr_schedule=root", "lr=1.0", "warmup_steps=0"]).config)
try:
    load_config(settings=["lr_schedule=exponential"])
except DstrainError as error:
    message = str(error)
print(json.dumps({
    "rates": [rate(1), rate(4), rate(300)],
    "schema": json_schema()["properties"]["lr_schedule"]["anyOf"][0]["enum"],
    "page": "cosine, linear, constant, root, or module:name" in page(),
    "message": message,
}))
"""
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    assert found["rates"] == [1.0, 0.5, 0.1] and found["page"]
    assert found["schema"] == ["cosine", "linear", "constant", "root"]
    assert "'cosine', 'linear', 'constant' or 'root'" in found["message"]


# --- from outside


def test_it_counts_without_the_warm_up() -> None:
    rate = of(*OWN, "lr_schedule_options={decay: 0.5}", "warmup_steps=4", "lr=0.5", steps=14)
    assert [rate(step) for step in range(1, 5)] == [0.125, 0.25, 0.375, 0.5]
    assert [rate(step) / 0.5 for step in range(5, 15)] == [
        own_schedules.wsd(i, 10, 0.5) for i in range(1, 11)
    ]
    assert of("lr_schedule=own_schedules:whole", OWN[1], "lr=0.5", "warmup_steps=0")(3) == 0.5


def test_it_is_not_asked_where_all_steps_are_warm_up() -> None:
    rate = of("lr_schedule=own_schedules:text", OWN[1], "lr=1.0", "warmup_steps=8", steps=8)
    assert [rate(step) for step in (1, 8)] == [0.125, 1.0]


def test_of_very_many_steps_some_are_tried() -> None:
    asked = []

    def schedule(step: int, steps: int) -> float:
        asked.append(step)
        return 1.0

    OwnSchedule("mine:schedule", schedule, {}).try_all(10**12)
    assert {1, 10**12} <= set(asked) and len(asked) == 2 * len(set(asked)) == 20_000
    assert asked[10_000:] == asked[9_999::-1], "again backwards"


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("negative", "{}", "returned -0.0333333 at step 16 of 30"),
        ("not_finite", "{}", "returned nan at step 30 of 30"),
        ("text", "{}", "returned a str at step 1 of 30, not a number"),
        ("truth", "{}", "returned a bool at step 1 of 30, not a number"),
        ("enormous", "{}", "failed at step 1 of 30: OverflowError"),
        ("ends", "{}", "failed at step 1 of 30: SystemExit: 3"),
        ("divides", "{}", "failed at step 30 of 30: ZeroDivisionError"),
        ("decays", "{}", "is not a pure function: step 30 of 30 has "),
        ("wsd", "{decoy: 0.5}", "failed at step 1 of 30: TypeError: .*'decoy'"),
        ("wsd", "{decay: long}", "failed at step 1 of 30: TypeError"),
        ("__doc__", "{}", "failed at step 1 of 30: TypeError: 'str' object is not callable"),
    ],
)
def test_what_is_no_schedule_is_refused_before_the_first_step(name: str, options: str, words: str) -> None:
    settings = (
        f"lr_schedule=own_schedules:{name}",
        OWN[1],
        f"lr_schedule_options={options}",
        "warmup_steps=10",
    )
    with pytest.raises(DstrainError, match=f"^learning-rate schedule own_schedules:{name} {words}") as caught:
        of(*settings, steps=40)
    assert caught.value.exit_code == 1 and caught.value.hint


def test_a_module_that_is_not_on_this_host_is_named() -> None:
    with pytest.raises(
        DstrainError, match=r"learning-rate schedule nowhere:wsd.* has no module 'nowhere'"
    ) as caught:
        of("lr_schedule=nowhere:wsd", OWN[1])
    assert caught.value.exit_code == 1


def test_the_plan_says_what_it_does_not_know() -> None:
    made = plan(settings=(*OWN, "lr_schedule_options={decay: 0.5}"))
    assert made.not_covered == (f"learning-rate schedule {WSD}",) and plan().not_covered == ()
    assert not any("not for" in warning for warning in made.warnings)
    assert made.identity == plan().identity, "a decay phase may begin where a constant one has ended"
    told = plan(settings=(*OWN, "lr_final=0.2")).warnings
    assert any(f"lr_final is not for {WSD}, which is called with the step" in warning for warning in told)
    assert not any("lr_final" in warning for warning in plan(settings=("lr_final=0.2",)).warnings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("lr_schedule_options={decay: 0.5}",),
            r"lr_schedule_options \(decay\) are for a schedule of your own, and cosine takes keys of the config"
            r"\n  hint: the keys of cosine: lr, warmup_steps, lr_final",
        ),
        (
            ("lr_schedule=constant", "lr_schedule_options={decay: 0.5}"),
            "the keys of constant: lr, warmup_steps$",
        ),
        (
            (*OWN, "lr_schedule_options.step=1"),
            r"step is passed to own_schedules:wsd by dstrain(.|\n)*remove it",
        ),
        ((*OWN, "lr_schedule_options.steps=1"), r"steps is passed to own_schedules:wsd(.|\n)*--set steps="),
        ((*OWN, "lr_schedule_options={a: .inf}"), "must be valid JSON"),
        (
            ("lr_schedule=wsd",),
            "must be 'cosine', 'linear' or 'constant', or one of your own like my_module:my_sch",
        ),
        (("lr_schedule=my module:wsd",), "must be 'cosine', 'linear' or 'constant', or one of your own"),
    ],
)
def test_what_cannot_be_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(DstrainError, match=words):
        refuse(load_config(settings=settings))


@pytest.mark.parametrize(
    ("key", "name", "words"),
    [
        ("lr_schedule", "own_schedule:wsd", "did you mean own_schedules?"),
        ("lr_schedule", "own_schedules:wds", "did you mean wsd?"),
        ("loss", "own_losses:focl", "did you mean focal?"),
        ("loss", "nowhere:focal", "there is no module 'nowhere'"),
    ],
)
def test_what_is_not_there_is_said_before_anything_starts(key: str, name: str, words: str) -> None:
    resolved = load_config(settings=[f"{key}={name}", f"code_dirs=[{OWN_CODE}]"])
    with pytest.raises(DstrainError) as caught:
        check_code_here(resolved)
    assert words in str(caught.value) and caught.value.where == f"--set {key}"


def test_an_editor_knows_the_choices() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    valid = jsonschema.Draft202012Validator(json_schema()).is_valid
    for key, value, good in (
        ("lr_schedule", "linear", True), ("lr_schedule", WSD, True), ("lr_schedule", "wsd", False),
        ("loss", "cross-entropy", True), ("loss", "own_losses:focal", True), ("loss", "focal", False),
    ):  # fmt: skip
        assert valid({key: value}) is good
