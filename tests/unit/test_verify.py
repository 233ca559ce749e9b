"""`dstrain verify`: layouts by name, the comparison of two run folders, and the exit code."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from dstrain.api import verifying
from dstrain.api.events import SILENT, Events
from dstrain.api.planning import Planned, plan_for
from dstrain.api.verifying import shrink_model
from dstrain.config.loader import load_config
from dstrain.errors import DstrainError
from dstrain.planning.layout_names import LayoutChoice, layouts_for
from dstrain.report.comparison import bound_from, compare_runs
from dstrain.runs.run_folder import RunFolder
from dstrain.supervise.failure_cause import Cause, Outcome
from tests.support.plans import MINIMAL, plan, shape


def make_run(path: Path, *, shift: float = 0.0, steps: int = 3, skipped: bool = False) -> RunFolder:
    """A finished run whose losses, norms and weights are off by ``shift``, relatively."""
    run = RunFolder(path)
    run.weights.mkdir(parents=True)
    records = [{"step": 0, "validation_loss": 5.0}]
    for step in range(1, steps + 1):
        norm = None if skipped and step == 1 else 2.0 * (1 + shift)
        records.append({"step": step, "loss": 4.0 * (1 + shift), "grad_norm": norm})
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    for stage in (0, 1):
        save_file(
            {f"layer.{stage}": np.array([1.0, -2.0 * (1 + shift)], dtype=np.float32)},
            run.weights / f"stage-{stage}.safetensors",
        )
    return run


@pytest.mark.parametrize("name", ["zero0-pp1-dp1", "zero3-pp2-dp4", "zero1-pp2-dp1-dualpipev-cpu"])
def test_layout_names_round_trip(name: str) -> None:
    assert LayoutChoice.parse(name).name == name


@pytest.mark.parametrize(
    "name", ["", "zero4", "pp2", "zero1-pp", "zero2-dp2-pp2", "zero1-pp2-nvme", "zero1-pp0"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DstrainError, match="is not a layout"):
        LayoutChoice.parse(name)


def test_layouts_for_four_ranks_are_accepted_and_use_all() -> None:
    for precision in ("fp32", "bf16"):
        found = layouts_for(4, precision)
        assert {choice.pipeline for choice in found} == {1, 2, 4}
        assert all(choice.ranks == 4 and choice.refusal(precision) is None for choice in found)
    assert LayoutChoice(0, 4) in layouts_for(4, "fp32")
    assert all(choice.zero for choice in layouts_for(4, "bf16"))


def test_comparison_finds_the_largest_relative_difference(tmp_path: Path) -> None:
    found = compare_runs(make_run(tmp_path / "a", shift=1e-3), make_run(tmp_path / "b"))
    assert (found.loss, found.grad_norm) == pytest.approx((1e-3, 1e-3))
    assert found.weights == pytest.approx(1e-3, rel=1e-3)


def test_a_step_skipped_by_one_run_only_is_a_difference(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a", skipped=True), make_run(tmp_path / "b")
    assert compare_runs(a, b).grad_norm == float("inf")
    assert compare_runs(a, a).grad_norm == 0


def test_runs_of_other_lengths_can_not_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has steps"):
        compare_runs(make_run(tmp_path / "a", steps=2), make_run(tmp_path / "b"))


def test_what_is_no_number_is_infinitely_far(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", shift=float("nan"))
    assert compare_runs(b, a).weights == compare_runs(a, b).loss == float("inf")
    with pytest.raises(ValueError, match="infinitely far"):
        bound_from([a, b], 1e-5)
    assert bound_from([a], 1e-5).loss == 1e-5


def test_bound_is_twice_the_spread_or_the_floor(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", shift=1e-2),
        make_run(tmp_path / "c", shift=1e-4),
    ]
    assert bound_from(runs, 1e-5).loss == pytest.approx(2e-2, rel=0.02)
    assert bound_from([runs[0], runs[0]], 1e-5).weights == 1e-5


def planned_as(*not_covered: str, **changes: Any) -> SimpleNamespace:
    """What `_compare` looks at of a plan."""
    return SimpleNamespace(plan=SimpleNamespace(not_covered=not_covered), shape=shape(**changes))


def test_what_the_equality_proof_does_not_cover_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = 'DeepSpeed\'s communication_data_type = "bf16" (ds.json:1)'
    monkeypatch.setattr(verifying, "_plan", lambda *each: (planned_as(key), each[3]))
    monkeypatch.setattr(verifying, "_train", lambda planned, name: (make_run(tmp_path / name), 1.0))
    told: list[str] = []

    class Told(Events):
        def note(self, text: str, kind: str = "note") -> None:
            told.append(text)

    verifying._compare(load_config(), [LayoutChoice(2, 2), LayoutChoice(2, 4)], tmp_path, Told())
    assert [line for line in told if key in line] == [
        f"not covered by the equality proof: {key}; a layout may differ because of it"
    ]


@pytest.mark.parametrize(("shift", "differs"), [(1e-6, False), (1e-3, True)])
def test_a_layout_that_differs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float, differs: bool
) -> None:
    def plan(resolved, choice, more, name, events, earlier):  # type: ignore[no-untyped-def]
        return planned_as(), name

    def train(planned, name):  # type: ignore[no-untyped-def]
        return make_run(tmp_path / name, shift=0.0 if name.startswith("one-process") else shift), 1.0

    monkeypatch.setattr(verifying, "_plan", plan)
    monkeypatch.setattr(verifying, "_train", train)
    result = verifying._compare(load_config(), [LayoutChoice(2, 4)], tmp_path, SILENT)
    assert result.equal == (not differs)
    table = json.loads((tmp_path / "verify.json").read_text())
    assert [row["verdict"] for row in table["layouts"]] == ["DIFFERS" if differs else "equal"]
    assert "zero2-pp4-dp1" in (tmp_path / "verify.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dropout": 0.1}, ["dropout", "config.json"]),
        ({"adapter_drops_by_layout": True}, ["the adapter drops", "set adapter.dropout to 0"]),
        ({"randomness": "router_jitter_noise 0.01"}, ["router_jitter_noise 0.01", "set it to 0"]),
        ({"randomness": ""}, ["no single value"]),
        ({"router_loss": True}, ["router loss", "--micro-batch"]),
    ],
)
def test_what_layouts_do_not_train_alike_is_refused_before_anything_is_trained(
    changes: dict[str, Any], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_plan", lambda *_: (planned_as(**changes), None))
    monkeypatch.setattr(verifying, "_train", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(DstrainError) as caught:
        verifying._compare(load_config(config_file=str(MINIMAL)), [LayoutChoice(2, 4)], tmp_path, SILENT)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sizes"), [({}, [2, 1, 4]), ({"row_leak": "x"}, [2]), ({"router_loss": True}, [2])]
)
def test_one_process_is_compared_with_itself_at_the_sizes_that_train_the_same_model(
    changes: dict[str, Any], sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def plan(resolved, choice, more, name, events, earlier):  # type: ignore[no-untyped-def]
        tried.extend(more.values())
        return planned_as(**changes), name

    monkeypatch.setattr(verifying, "_plan", plan)
    monkeypatch.setattr(verifying, "_train", lambda planned, name: (make_run(tmp_path / name), 1.0))
    config = load_config(flags={"micro_batch": 2, "global_batch": 8})
    assert verifying._compare(config, [LayoutChoice(2, 4)], tmp_path, SILENT).equal
    assert tried == sizes


@pytest.mark.parametrize(
    "outcome",
    [
        pytest.param(Outcome(False, 75, None, stopped_after=3), id="in order"),
        pytest.param(Outcome(False, 130, Cause(None, None, "was stopped", []), by_user=True), id="at once"),
    ],
)
def test_the_end_of_one_layout_by_the_user_is_the_end_of_all(
    outcome: Outcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were compared before are in the table; no other one is trained."""
    trained = []
    config = SimpleNamespace(config=SimpleNamespace(saves=True))

    def plan(resolved, choice, more, name, events, earlier):  # type: ignore[no-untyped-def]
        trained.append(name)
        return planned_as(), config

    def launch(*_):  # type: ignore[no-untyped-def]
        folder = make_run(tmp_path / trained[-1])
        result = {"steps": 3, "validation_loss": None, "prompt": "", "continuation": ""}
        folder.result.write_text(json.dumps(result))
        return outcome if trained[-1] == "zero2-pp2-dp1" else Outcome(True, 0, None)

    monkeypatch.setattr(verifying, "_plan", plan)
    monkeypatch.setattr(verifying, "launch", launch)
    monkeypatch.setattr(verifying, "new_run_folder", lambda *_, **__: RunFolder(tmp_path / trained[-1]))
    for name in ("refuse_full_disk", "launch_spec"):
        monkeypatch.setattr(verifying, name, lambda *_: None)
    with pytest.raises(DstrainError, match="stopped ") as caught:
        verifying._compare(load_config(), [LayoutChoice(2, size) for size in (1, 2, 4)], tmp_path, SILENT)
    assert caught.value.exit_code == outcome.exit_code
    assert trained[-2:] == ["zero2-pp1-dp1", "zero2-pp2-dp1"], "not zero2-pp4"
    table = json.loads((tmp_path / "verify.json").read_text())
    assert [row["layout"] for row in table["layouts"]] == ["zero2-pp1-dp1"]


@pytest.mark.parametrize(
    "broken", [MemoryError(), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_what_was_measured_is_kept_whatever_happens_to_the_next_layout(
    broken: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(resolved, choice, more, name, events, earlier):  # type: ignore[no-untyped-def]
        return planned_as(), name

    def train(planned, name):  # type: ignore[no-untyped-def]
        if name == "zero2-pp2-dp1":
            raise broken
        return make_run(tmp_path / name), 1.0

    monkeypatch.setattr(verifying, "_plan", plan)
    monkeypatch.setattr(verifying, "_train", train)
    wanted = [LayoutChoice(2, size) for size in (1, 2, 4)]
    own = isinstance(broken, OSError)  # of the layout's own run
    with contextlib.nullcontext() if own else pytest.raises(type(broken)):
        verifying._compare(load_config(), wanted, tmp_path, SILENT)
    table = json.loads((tmp_path / "verify.json").read_text())["layouts"]
    verdicts = ["equal", "failed: [Errno 28] No space left on device", "equal"] if own else ["equal"]
    assert [row["verdict"] for row in table] == verdicts


def test_a_disk_that_takes_no_table_ends_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, record: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(
        verifying, "_plan", lambda *arguments: (SimpleNamespace(shape=shape(), plan=plan()), arguments[3])
    )
    monkeypatch.setattr(verifying, "_train", lambda planned, name: (make_run(tmp_path / name), 1.0))
    monkeypatch.setattr(verifying, "write_json", refuse)
    wanted = [LayoutChoice(2, size) for size in (1, 2, 4)]
    result = verifying._compare(load_config(), wanted, tmp_path, SILENT)
    assert [row.verdict for row in result.rows] == ["equal"] * 3
    assert result.unwritten is not None and result.unwritten.exit_code == 1
    assert "verify.json: No space left on device" in str(result.unwritten) and result.unwritten.hint


def test_model_and_data_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The documents of a user's code may take long to read."""
    made = plan()
    earlier = Planned(made, SimpleNamespace(), SimpleNamespace(), shape(), lambda resolved, hosts: made)  # type: ignore[arg-type]
    monkeypatch.setattr("dstrain.api.planning.prepare", None)
    assert plan_for(load_config(), earlier=earlier).plan is made


def test_tiny_keeps_the_family_and_the_vocabulary(tmp_path: Path) -> None:
    folder = shrink_model(load_config(flags={"model": "llama-8b"}), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["vocab_size"]) == ("llama", 128256)
    assert (config["hidden_size"], config["num_hidden_layers"]) == (64, 6)
