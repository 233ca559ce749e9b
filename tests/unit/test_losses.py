"""The table of losses, and what a plan says and assumes of one from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli.showing.plan import choices
from dstrain.cli.showing.tables import make_console
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError
from dstrain.losses import LOSSES, loss_facts
from dstrain.model.loss import BUILT_IN
from dstrain.planning.checks import refuse
from dstrain.planning.plan import Plan
from dstrain.runs.checkpoint.identity import refuse_other
from dstrain.runs.checkpoint.manifest import MANIFEST
from tests.support.plans import plan, shape

OWN_CODE = Path(__file__).parents[1] / "support" / "own_code"
FOCAL = "own_losses:focal"
OWN = (f"loss={FOCAL}", f"code_dirs=[{OWN_CODE}]")
SCHEDULE = ("lr_schedule=own_schedules:wsd", f"code_dirs=[{OWN_CODE}]")


def outside(*settings: str, **flags: Any) -> Plan:
    return plan(settings=(*OWN, *settings), **flags)


def shown(made: Plan) -> str:
    """The table of choices."""
    console = make_console()
    with console.capture() as captured:
        console.print(choices(made))
    return captured.get()


def test_each_has_its_function() -> None:
    assert LOSSES.keys() == BUILT_IN.keys() and load_config().config.loss in LOSSES
    with pytest.raises(KeyError):
        loss_facts("focal")


def test_the_plan_says_what_it_does_not_know() -> None:
    made = outside("loss_options={gamma: 1.5}", micro_batch=4, seq_len=100, global_batch=8)
    assert made.not_covered == (f"loss {FOCAL}",) and plan().not_covered == ()
    copies = 3 * 4 * (4 * 100) * 257
    assert any(
        "estimated as F.cross_entropy(logits.float(), labels): 3 copies of the logits in fp32,"
        f" {copies / 1e6:,.1f} MB" in warning
        for warning in made.warnings
    )
    assert made.identity["loss"] == FOCAL and made.identity["loss_options"] == {"gamma": 1.5}
    assert not {"loss", "loss_options"} & plan().identity.keys(), "a checkpoint of before has none"
    assert Plan.from_record(json.loads(json.dumps(made.to_record()))) == made


def test_a_plan_of_before_is_one_of_cross_entropy() -> None:
    record = json.loads(json.dumps(plan().to_record()))
    for key in ("loss", "loss_options", "lr_schedule_options"):
        del record["config"][key], record["origins"][key]
    old = Plan.from_record(record)
    assert old.identity == plan().identity and old.run_config == plan().run_config
    assert shown(old) == shown(plan())


def test_the_table_of_choices_has_what_is_the_users_own() -> None:
    text = shown(outside("loss_options={gamma: 1.5}"))
    assert FOCAL in text and "{'gamma': 1.5}" in text and "--set loss_options" in text
    assert "own_schedules:wsd" in shown(plan(settings=SCHEDULE))
    assert "loss" not in shown(plan()) and "lr_schedule" not in shown(plan())


def test_it_is_taken_to_have_its_logits_in_fp32() -> None:
    """In bf16, where the built-in loss has a gradient of two bytes and small pieces beside the logits."""
    model = shape(vocab_size=2000, max_positions=None)
    flags: dict[str, Any] = {"model": model, "micro_batch": 1, "global_batch": 1, "precision": "bf16"}
    whole, chunked = flags | {"seq_len": 30_000}, flags | {"seq_len": 60_000}
    logits = 4 * 30_000 * 2000
    assert outside(**whole).stage_memory[0].loss == 3 * logits
    assert plan(**whole).stage_memory[0].loss < 2 * logits
    rows = outside(**chunked).loss_chunk
    assert rows == plan(**chunked).loss_chunk == 33_536, "a loss of each token works in chunks too"
    assert outside(**chunked).stage_memory[0].loss == 3 * 4 * rows * 2000


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ("loss_options={gamma: 2}",),
            r"loss_options \(gamma\) are for a loss function of your own, and cross-entropy takes none"
            r"\n  hint: remove loss_options",
        ),
        ((*OWN, "loss_options.logits=1"), "logits is passed to own_losses:focal by dstrain"),
        ((*OWN, "loss_options.labels=1"), "labels is passed to own_losses:focal by dstrain"),
        ((*OWN, "loss_options={a: .nan}"), "must be valid JSON"),
        (("loss=focal",), "must be 'cross-entropy', or one of your own like my_module:my_loss"),
        (("loss=my module:focal",), "must be 'cross-entropy', or one of your own"),
    ],
)
def test_what_cannot_be_is_refused(settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(DstrainError, match=words):
        refuse(load_config(settings=settings))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((), OWN, f"made with loss = built-in, but this run has {FOCAL}"),
        (OWN, (), f"made with loss = {FOCAL}, but this run has built-in"),
        (
            OWN,
            (*OWN, "loss_options={gamma: 1}"),
            "made with loss_options = {}, but this run has {'gamma': 1}",
        ),
        ((), SCHEDULE, ""),
        (SCHEDULE, ("lr_schedule=linear",), ""),
        (SCHEDULE, (*SCHEDULE, "lr_schedule_options={decay: 0.5}"), ""),
        (OWN, OWN, ""),
        (("lr_schedule=linear",), ("lr_schedule=constant",), ""),
    ],
)
def test_a_checkpoint_of_another_is_refused(
    before: tuple[str, ...], after: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    manifest = {"step": 1, "files": {"a": 1}, "identity": plan(settings=before).identity}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    if not words:
        refuse_other(tmp_path, plan(settings=after).identity)
        return
    with pytest.raises(DstrainError) as caught:
        refuse_other(tmp_path, plan(settings=after).identity)
    assert words in str(caught.value)
