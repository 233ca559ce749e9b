"""What a host must have for itself: words for one that lacks it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from dstrain.api.hub_data import at_commits, planned_commits
from dstrain.errors import DstrainError
from dstrain.planning.data_parts import data_parts
from dstrain.planning.plan import Plan, PlannedSource
from dstrain.runs.protocol import plan_digest
from dstrain.runs.run_folder import RunFolder
from dstrain.train import local_run_folder, run_data
from dstrain.train.local_run_folder import keep_plan, plan_seen
from dstrain.train.run_data import check_model_file, prepare_run_data
from tests.support.plans import DATA, plan

HERE = socket.gethostname()


class Line:
    """What a rank knows from its supervisor."""

    def __init__(self, plan: str | None = None, launch: str = "") -> None:
        self.plan, self.launch = plan, launch


def on_hosts(made: Plan, number: int, **changes: Any) -> Plan:
    """The same plan over so many hosts."""
    hosts = tuple(dataclasses.replace(made.layout.hosts[0], name=f"n{n}", slots=1) for n in range(number))
    layout = dataclasses.replace(made.layout, hosts=hosts, data_parallel=number)
    return dataclasses.replace(made, layout=layout, **changes)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSTRAIN_CACHE", str(tmp_path / "cache"))


def test_data_that_are_not_there_are_named_with_their_host(tmp_path: Path) -> None:
    missing = tmp_path / "text.jsonl"
    with pytest.raises(DstrainError) as error:
        prepare_run_data(on_hosts(plan(settings=(f"data={missing}",)), 2))
    text = str(error.value)
    assert f"on {HERE}: " in text and str(missing) in text
    assert f"every host needs {missing}: copy what is missing" in text


def test_other_data_are_refused_with_their_host(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("the quick brown fox. " * 200)
    one = plan(settings=(f"data={data}", "validation=0", "seq_len=32"))
    with pytest.raises(DstrainError, match="the data is not what the plan was made for") as error:
        prepare_run_data(one)
    assert f"on {HERE}, " in str(error.value)
    assert "copy" not in str(error.value)
    with pytest.raises(DstrainError, match="or copy the same files to this host"):
        prepare_run_data(on_hosts(one, 2))


def test_the_ranks_ask_for_the_commit_that_was_planned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataclasses.replace(DATA, commit="a" * 40)
    asked: list[dict[str, Any]] = []

    def take(request: dict[str, Any]) -> None:
        asked.append(request)
        raise DstrainError("enough")

    monkeypatch.setattr(run_data, "prepare_as_asked", take)
    for settings in (("data=org/name",), ("data=org/name@main",)):
        with pytest.raises(DstrainError, match="enough"):
            prepare_run_data(plan(data=data, settings=settings))
    assert [request["revision"] for request in asked] == ["a" * 40, "a" * 40]


def test_what_goes_on_asks_for_the_commits_of_its_plan(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert planned_commits(folder) == {}
    sources = [{"path": "org/name", "split": "b"}, "org/name", "text.txt"]
    made = plan(settings=("data=[{path: org/name, split: b, name: b}, org/name, text.txt]",))
    commits = ("a" * 40, "b" * 40, "")
    each = tuple(
        PlannedSource(str(source), True, 1, dataclasses.replace(DATA, commit=commit))
        for source, commit in zip(sources, commits, strict=True)
    )
    made = dataclasses.replace(made, data=dataclasses.replace(DATA, sources=each))
    folder.plan.write_text(json.dumps(made.to_record()))
    known = planned_commits(folder)
    parts = at_commits(data_parts(made.run_config), known)
    assert [part.revision for part in parts] == ["a" * 40, "b" * 40, None]
    other = plan(settings=("data=[{path: org/name, revision: v2}, org/other]",)).run_config
    assert [part.revision for part in at_commits(data_parts(other), known)] == ["v2", None]


def test_the_models_config_is_the_plans(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text("{}")
    fingerprint = hashlib.sha256(b"{}").hexdigest()[:16]
    made = plan()
    model = dataclasses.replace(made.model, file=str(file), fingerprint=fingerprint)
    good = dataclasses.replace(made, model=model)
    check_model_file(good)
    file.write_text("{} ")
    with pytest.raises(DstrainError, match=f"the model's config on {HERE} is not the one"):
        check_model_file(good)
    file.unlink()
    with pytest.raises(DstrainError, match=f"{HERE} can't read the model's config: No such file"):
        check_model_file(good)


def test_a_plan_that_was_sent_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert plan_seen(folder) is None
    folder.make("umask")
    keep_plan(folder, Line("the plan", "a launch"), rank=1)  # type: ignore[arg-type]
    assert folder.plan.read_text() == "the plan"
    assert plan_seen(folder) == plan_digest("the plan")
    keep_plan(folder, Line(launch="a launch"), rank=1)  # type: ignore[arg-type]  # it was the supervisor's


def test_without_a_supervisor_there_must_be_a_plan(tmp_path: Path) -> None:
    with pytest.raises(DstrainError, match=f"{HERE} has no .*plan.json"):
        keep_plan(RunFolder(tmp_path / "run"), Line(), rank=0)  # type: ignore[arg-type]


def test_rank_0_must_see_the_supervisors_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_run_folder, "LATE_SECONDS", 0.2)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.launch.write_text("an earlier launch\n")
    with pytest.raises(DstrainError, match=f"{HERE}, can't see the run folder"):
        keep_plan(folder, Line("the plan", "a launch"), rank=0)  # type: ignore[arg-type]
    assert not folder.plan.exists()
    folder.launch.write_text("a launch\n")
    keep_plan(folder, Line("the plan", "a launch"), rank=0)  # type: ignore[arg-type]
    assert folder.plan.read_text() == "the plan"
