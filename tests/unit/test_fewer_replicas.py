"""`elastic`: the plan of a run that lost hosts."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from dstrain.api.events import Events
from dstrain.api.planning import Planned
from dstrain.api.preflight import refuse_elastic_alone
from dstrain.api.restart_policy import RestartLoop, fewer_replicas
from dstrain.config.loader import ResolvedConfig, load_config
from dstrain.errors import RESUMABLE, DstrainError
from dstrain.launch.devices import Devices
from dstrain.launch.placement import Placement
from dstrain.planning.layout import Host
from dstrain.planning.make_plan import make_plan
from dstrain.planning.plan import Machines, Plan
from dstrain.runs.run_folder import RunFolder
from tests.support.plans import DATA, MINIMAL, shape

HOSTS = tuple(Host(f"n{number}", 2) for number in range(1, 5))


def planned(hosts: tuple[Host, ...] = HOSTS, **flags: object) -> tuple[Planned, ResolvedConfig]:
    resolved = load_config(config_file=str(MINIMAL), flags={"restarts": 3, "elastic": True} | flags)

    def make(resolved: ResolvedConfig, hosts: tuple[Host, ...]) -> Plan:
        return make_plan(resolved, Machines(hosts, "cuda"), shape(), DATA, "/models/tiny/config.json")

    devices = Devices("cuda", 2, ("a GPU", "a GPU"), memory_bytes=None)
    return Planned(make(resolved, hosts), devices, Placement(hosts, "pdsh"), shape(), make), resolved


@pytest.mark.parametrize(
    ("flags", "silent", "hosts", "replicas"),
    [
        ({"pipeline": 2, "global_batch": 24}, ["n4"], ["n1", "n2", "n3"], 3),
        ({"pipeline": 2, "global_batch": 24}, ["n1"], ["n2", "n3", "n4"], 3),
        ({"pipeline": 2, "global_batch": 24}, ["n1", "n3"], ["n2", "n4"], 2),
        ({"pipeline": 4, "global_batch": 24}, ["n2"], ["n1", "n3"], 1),
        ({"pipeline": 1, "global_batch": 24}, ["n4"], ["n1", "n2", "n3"], 6),
        # 32 samples are not shared by 6 or 5 replicas, and 5 would fill the hosts unevenly.
        ({"pipeline": 1, "global_batch": 32}, ["n4"], ["n1", "n2"], 4),
        # The run has two of the three replicas that are left; it never grows beyond what was asked for.
        ({"pipeline": 2, "data_parallel": 2, "global_batch": 24}, ["n2"], ["n1", "n3"], 2),
        # A host that stood idle takes the place of the one that is gone.
        ({"pipeline": 2, "data_parallel": 3, "global_batch": 24}, ["n1"], ["n2", "n3", "n4"], 3),
    ],
)
def test_as_many_replicas_as_the_other_hosts_hold(
    flags: dict[str, int], silent: list[str], hosts: list[str], replicas: int, tmp_path: Path
) -> None:
    before, resolved = planned(**flags)
    after = fewer_replicas(before, resolved, dict.fromkeys(silent, "down"), RunFolder(tmp_path))
    layout, full = after.plan.layout, before.plan.layout
    assert [host.name for host in layout.hosts] == hosts
    assert (layout.data_parallel, layout.pipeline, layout.cut) == (replicas, full.pipeline, full.cut)
    assert after.plan.batch.global_batch == before.plan.batch.global_batch
    assert not {host.name for host in after.placement.hosts} & set(silent)
    changed = {key for key, value in after.plan.identity.items() if value != before.plan.identity[key]}
    assert changed <= {"data_parallel", "micro_batch"}


@pytest.mark.parametrize(
    ("flags", "silent", "why"),
    [
        ({"pipeline": 8, "global_batch": 24}, ["n4"], "have too few slots for the 8 stages of a replica"),
        (
            {"pipeline": 2, "global_batch": 24},
            ["n1", "n2", "n3", "n4"],
            "have too few slots for the 2 stages of a replica",
        ),
    ],
)
def test_a_missing_stage_is_waited_for(
    flags: dict[str, int], silent: list[str], why: str, tmp_path: Path
) -> None:
    before, resolved = planned(**flags)
    with pytest.raises(DstrainError, match=why):
        fewer_replicas(before, resolved, dict.fromkeys(silent, "down"), RunFolder(tmp_path))


@pytest.mark.parametrize(("silent", "address"), [("n4", "10.0.0.1"), ("n1", None)])
def test_the_first_hosts_address_is_not_another_ones(
    silent: str, address: str | None, tmp_path: Path
) -> None:
    before, resolved = planned(pipeline=2, global_batch=24, master_addr="10.0.0.1")
    after = fewer_replicas(before, resolved, {silent: "down"}, RunFolder(tmp_path))
    assert after.plan.run_config.master_addr == address


def test_micro_batches_stay_as_they_were_asked_for(tmp_path: Path) -> None:
    """Three replicas would have 8 samples each, which micro-batches of 6 don't divide."""
    before, resolved = planned(pipeline=2, global_batch=24, micro_batch=6)
    after = fewer_replicas(before, resolved, {"n4": "down"}, RunFolder(tmp_path))
    assert after.plan.layout.data_parallel == 2
    assert (after.plan.batch.micro_batch, after.plan.batch.accumulation) == (6, 2)


class Heard(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, topic: str = "note") -> None:
        self.notes.append(f"{topic}: {text}")


class Hosts:
    """What ssh says of them, each time it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: dict[str, str]) -> None:
        self.answers = list(answers)
        monkeypatch.setattr("dstrain.api.restart_policy.silent_hosts", lambda hosts: self.answers.pop(0))
        monkeypatch.setattr("dstrain.api.restart_policy.time.sleep", lambda seconds: None)


def test_it_shrinks_at_once_and_returns_to_all_hosts_at_the_next_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = Hosts(monkeypatch, {"n3": "No route to host"}, {})
    before, resolved = planned(pipeline=2, global_batch=24)
    heard = Heard()
    restarting = RestartLoop(before, resolved, RunFolder(tmp_path), heard)
    smaller = restarting.next_attempt(DstrainError("n3 is gone"), trained=True)
    assert smaller.plan.layout.data_parallel == 3 and len(hosts.answers) == 1
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 1.0}\n')
    assert restarting.next_attempt(DstrainError("a rank was killed"), trained=True) is before
    said = "\n".join(heard.notes)
    assert "elastic: on n1, n2, n4: 24 samples per step" in said and "without n3: No route to host" in said
    assert "restart: 2 of 3" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("saved", [True, False])
def test_a_stop_while_a_restart_is_waited_for(
    number: signal.Signals, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a checkpoint was made the run can be resumed, as after a stop of its ranks."""
    newest = tmp_path / "checkpoints" / "step-000006" if saved else None
    monkeypatch.setattr("dstrain.api.restart_policy.newest_complete", lambda _: newest)
    restarting = RestartLoop(*planned(), RunFolder(tmp_path), Heard())
    threading.Timer(0.3, os.kill, (os.getpid(), number)).start()
    began = time.monotonic()
    with pytest.raises(DstrainError, match="stopped while waiting to restart") as caught:
        restarting.next_attempt(DstrainError("n3 is gone"), trained=True)
    assert time.monotonic() - began < 4
    assert caught.value.exit_code == (RESUMABLE if saved else 1)
    assert ("continues from step-000006" if saved else "starts again") in (caught.value.hint or "")


def test_it_waits_where_it_can_not_shrink_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = {"n4": "No route to host"}
    hosts = Hosts(monkeypatch, down, down, {})
    before, resolved = planned(pipeline=8, global_batch=24)
    heard = Heard()
    restarting = RestartLoop(before, resolved, RunFolder(tmp_path), heard)
    assert restarting.next_attempt(DstrainError("x"), trained=True) is before
    assert hosts.answers == []
    said = "\n".join(heard.notes)
    waiting = "waiting: for n4: No route to host (the remaining hosts have too few slots for the 8 stages of a replica)"
    assert said.count(waiting) == 1


def test_a_host_that_the_run_does_not_use_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = Hosts(monkeypatch, {"n4": "No route to host"})
    before, resolved = planned(pipeline=2, data_parallel=3, global_batch=24)
    heard = Heard()
    restarting = RestartLoop(before, resolved, RunFolder(tmp_path), heard)
    assert restarting.next_attempt(DstrainError("x"), trained=True) is before
    assert hosts.answers == []


@pytest.mark.parametrize("launcher", ["slurm", "none", "local"])
def test_elastic_needs_several_hosts_that_can_be_asked(launcher: str) -> None:
    _, resolved = planned()
    refuse_elastic_alone(Placement(HOSTS, "pdsh"), resolved)
    hosts = HOSTS[:1] if launcher == "local" else HOSTS
    with pytest.raises(DstrainError, match="requires a hostfile with several hosts"):
        refuse_elastic_alone(Placement(hosts, launcher), resolved)


@pytest.mark.parametrize("flags", [{"elastic": True}, {"elastic": True, "restarts": 0}])
def test_elastic_is_about_restarts(flags: dict[str, object]) -> None:
    resolved = load_config(config_file=str(MINIMAL), flags=flags)
    with pytest.raises(DstrainError, match="--elastic requires --restarts N"):
        make_plan(resolved, Machines(HOSTS, "cuda"), shape(), DATA, "/models/tiny/config.json")


def test_checkpoints_to_keep_need_checkpoints() -> None:
    resolved = load_config(config_file=str(MINIMAL), flags={"save_every": "never", "keep_every": 10})
    with pytest.raises(DstrainError, match="--keep-every can't be combined"):
        make_plan(resolved, Machines(HOSTS, "cuda"), shape(), DATA, "/models/tiny/config.json")
