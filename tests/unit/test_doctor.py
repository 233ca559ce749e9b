"""What doctor makes of what it finds; finding it on real hosts is in tests/cluster/test_doctor.py."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dstrain.cli.doctor import command as doctor
from dstrain.diagnostics import host, host_checks, network, network_exchange
from dstrain.diagnostics.diagnosis import (
    FAILED,
    OK,
    WARNING,
    Check,
    judge_clock,
    judge_facts,
    judge_folders,
    judge_names,
)
from dstrain.diagnostics.host_facts import facts, torch_cuda
from dstrain.diagnostics.network import judge_exchange
from dstrain.diagnostics.remote_session import Conversation, NoAnswerError, ask_all
from dstrain.errors import DstrainError
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.launch.ssh_reachability import Trouble, ssh_command, trouble
from dstrain.planning.layout import Host
from dstrain.runs.this_machine import port_taken
from tests.support.nvml import A100, H100, NvmlModule, build_library

VERSIONS = {"dstrain": "0.1.0 (ab)", "torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0"}
FACTS: dict[str, Any] = {
    "hostname": "n1",
    "machine": "boot/n1",
    "python": "3.11.7",
    "versions": VERSIONS,
    "driver": "570.1",
    "own_addresses": ["10.0.0.1"],
    "cores": 8,
    "memory": 10**11,
    "shared_memory": 10**10,
    "disk": 10**12,
    "directory": True,
    "sees_runs": True,
    "devices": {"kind": "cuda", "count": 4, "names": ["H100"] * 4},
}
CPU = {"devices": {"kind": "cpu", "count": 0, "names": ["x"]}, "driver": None}


def test_a_host_that_is_well() -> None:
    checks = [*judge_facts("n1", 4, FACTS, FACTS, gpus=True), *judge_folders("n1", "/w", "/w/runs", FACTS)]
    assert {check.status for check in checks} == {OK}
    assert not [check for check in checks if check.fix]
    assert [check.check for check in checks] == [
        *("python", "dstrain", "torch", "deepspeed", "transformers", "driver", "devices"),
        *("memory", "disk", "shared memory", "own name", "run folder"),
    ]


def versions(**changed: str | None) -> dict[str, Any]:
    return {"versions": {**VERSIONS, **changed}}


# what is different from a host that is well; the slots; the check that tells, its status, words, and words of the fix
ODD: dict[str, tuple[dict[str, Any], int, str, str, str, str]] = {
    "other python": ({"python": "3.12.1"}, 4, "python", FAILED, "3.12.1, and 3.11.7 here", "the same"),
    "nearly the same python": ({"python": "3.11.9"}, 4, "python", WARNING, "3.11.9, and", "the same"),
    "other dstrain": (
        versions(dstrain="0.1.0 (cd)"),
        4,
        "dstrain",
        FAILED,
        "(cd), and 0.1.0 (ab)",
        "the same",
    ),
    "other torch": (versions(torch="2.12.0"), 4, "torch", FAILED, "2.12.0, and 2.13.0 here", "the same"),
    "no deepspeed": (versions(deepspeed=None), 4, "deepspeed", FAILED, "not installed", "deepspeed 0.19.8"),
    "other transformers": (versions(transformers="6"), 4, "transformers", FAILED, "6, and 5.23", "the same"),
    "other driver": ({"driver": "535.2"}, 4, "driver", WARNING, "535.2, and 570.1 here", "the same"),
    "too few GPUs": ({}, 8, "devices", FAILED, "slots=8, but it has 4 GPUs", "`n1 slots=4`"),
    "no GPU where others have some": (CPU, 4, "devices", FAILED, "no GPU found", "nvidia-smi"),
    "nonsense for devices": (
        {"devices": None, "devices_error": "CUDA_VISIBLE_DEVICES: can't\n  hint: x"},
        *(4, "devices", FAILED, "CUDA_VISIBLE_DEVICES: can't hint: x", "nvidia-smi"),
    ),
    "little memory": ({"memory": 10**9}, 4, "memory", WARNING, "1 GB free: low", "fewer slots"),
    "little disk": ({"disk": 10**9}, 4, "disk", WARNING, "1 GB free: low", "free some space"),
    "disk not known": ({"disk": None}, 4, "disk", WARNING, "not known", ""),
    "a container's /dev/shm": (
        {"shared_memory": 2**26},
        4,
        "shared memory",
        WARNING,
        "67.1 MB",
        "--shm-size",
    ),
    "Debian's own name": (
        {"own_addresses": ["127.0.1.1"]},
        *(4, "own name", WARNING, "n1 resolves to 127.0.1.1 on itself", "/etc/hosts of n1"),
    ),
    "a name without address": (
        {"own_addresses": []},
        4,
        "own name",
        WARNING,
        "n1 does not resolve",
        "/etc/hosts",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_a_host_that_is_odd(case: str) -> None:
    different, slots, name, status, message, fix = ODD[case]
    checks = judge_facts("n1", slots, {**FACTS, **different}, FACTS, gpus=True)
    [found] = [check for check in checks if check.check == name]
    assert found.status == status
    assert message in found.message and fix in found.fix
    assert [check for check in checks if check.status != OK and check != found] == [
        check for check in checks if different is CPU and check.check == "driver"
    ]


def test_processors() -> None:
    for slots, status in ((8, OK), (9, WARNING)):
        checks = judge_facts("n1", slots, {**FACTS, **CPU}, {**FACTS, **CPU}, gpus=False)
        assert [check.status for check in checks if check.check == "devices"] == [status]
        assert "shared memory" not in {check.check for check in checks}


def test_folders_that_are_not_shared() -> None:
    facts = {**FACTS, "directory": False, "sees_runs": False}
    folder, runs = judge_folders("n2", "/w", "/w/runs", facts)
    assert folder.status == runs.status == WARNING
    assert "/w, the folder where the run is started, does not exist" in folder.message
    assert "checkpoints" in runs.message and "--save-every never" in runs.fix


def test_clocks() -> None:
    assert judge_clock("n2", -0.9, 0.01).status == OK
    assert judge_clock("n2", 3.0, 2.5).status == OK, "nobody knows"
    late = judge_clock("n2", -3.0, 0.01)
    assert (late.status, late.message.split(":")[0]) == (WARNING, "-3.000 s (± 0.010)")
    assert "timedatectl" in late.fix


def test_one_machine_under_two_names() -> None:
    [found] = judge_names({"n1": "boot/n1", "n2": "boot/n2", "10.0.0.1": "boot/n1"})
    assert (found.host, found.status) == ("10.0.0.1", FAILED)
    assert "same machine as n1" in found.message


def rank(*said: dict[str, Any], error: str | None = None) -> dict[str, Any]:
    return {"said": [{"doing": "meeting", "card": "eth0"}, *said], "error": error}


REDUCING = {"doing": "all-reduce"}
REDUCED = {"done": "all-reduce", "bytes_per_second": 2e9}


def sending(peer: int) -> dict[str, Any]:
    return {"doing": "send", "peer": peer}


def sent(peer: int, speed: float = 1e9) -> dict[str, Any]:
    return {"done": "send", "peer": peer, "bytes_per_second": speed}


def test_an_exchange_that_went_well() -> None:
    answers = [
        rank(REDUCING, REDUCED, sending(1), sent(1, 1e9), sending(2), sent(2, 1.5e9)),
        rank(REDUCING, REDUCED, sending(0), sent(0, 1e9), sending(2), sent(2, 1e8)),
    ]
    checks = judge_exchange(["n1", "n2", "n3"], [*answers, rank(REDUCING, REDUCED, sent(0, 1.5e9))], "gloo")[
        :4
    ]
    assert [(check.host, check.check, check.status) for check in checks] == [
        ("n1", "all-reduce", OK),
        ("n1", "send", OK),
        ("n2", "all-reduce", OK),
        ("n2", "send", WARNING),
    ]
    assert checks[0].message == "2.00 GB/s (gloo, eth0)"
    assert checks[1].message == "1.00 GB/s with n2, the slowest"
    assert "0.10 GB/s with n3" in checks[3].message and "1.50 GB/s" in checks[3].message


FAILURES = {
    "no torch": ({"said": [], "error": "no libcudart.so"}, "all-reduce", "torch did not start: no libcudart"),
    "no meeting": (rank(error="timed out"), "all-reduce", "rendezvous at n1 failed: timed out"),
    "no sum": (rank(REDUCING, error="wait timeout"), "all-reduce", "the all-reduce: wait timeout"),
    "a pair": (
        rank(REDUCING, REDUCED, sending(0), error="connection closed"),
        *("send", "between n1 and n2: connection closed"),
    ),
    "a host that is lost": (Trouble("no answer within 5 s", "look"), "all-reduce", "no answer within 5 s"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_an_exchange_that_failed(case: str) -> None:
    answer, name, message = FAILURES[case]
    well = rank(REDUCING, REDUCED, sending(1), sent(1))
    checks = judge_exchange(["n1", "n2"], [well, answer], "NCCL")  # type: ignore[list-item]
    [failed] = [check for check in checks if check.status == FAILED]
    assert (failed.host, failed.check) == ("n2", name)
    assert failed.message.startswith(message)
    assert failed.fix


class SlowHost:
    """A conversation whose host takes its time to answer."""

    def __init__(self, name: str, seconds: float) -> None:
        self.host, self._seconds, self.asked = name, seconds, dict[str, Any]()

    def ask(self, question: str, *, seconds: float, **arguments: Any) -> dict[str, Any]:
        if question == "free_port":
            return {"port": 20001}
        self.asked = {"seconds": seconds, **arguments}
        time.sleep(self._seconds)
        return rank(REDUCING, REDUCED)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_exchange_has_time_for_its_start_and_says_that_it_lasts(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstrain.diagnostics.remote_session._WAITING_SECONDS", 0.1)
    said: list[tuple[str, threading.Thread]] = []
    hosts = [SlowHost("n1", 0.0), SlowHost("n2", 0.5)]
    checks = network.exchange(hosts, device, say=lambda line: said.append((line, threading.current_thread())))  # type: ignore[arg-type]
    assert [check.status for check in checks] == [OK, OK]
    limit = {"cpu": 90, "cuda": 600}[device]
    name = {"cpu": "gloo", "cuda": "NCCL"}[device]
    assert len(said) >= 2 and {thread for _, thread in said} == {threading.main_thread()}
    told = rf"all-reduce and send between 2 ranks \({name}\): \d+ s of at most {limit} s"
    assert all(re.fullmatch(told, line) for line, _ in said)
    for each in hosts:
        assert each.asked["limit"] == limit and each.asked["seconds"] > limit
    # A part that hangs ends by its own limit, and a host that nobody asks any more after all of them.
    assert 2 * network_exchange.WAIT_SECONDS[device] < limit < host._MOST_SECONDS


@pytest.mark.parametrize(("device", "seconds"), [("cpu", 20), ("cuda", 180)])
def test_a_part_of_an_exchange_has_time_for_the_start_of_nccl(
    device: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: dict[str, Any] = {}

    def begin(backend: str, **more: Any) -> None:
        began.update(more, backend=backend)
        raise RuntimeError("as far as this test goes")

    monkeypatch.setattr(network_exchange.dist, "init_process_group", begin)
    monkeypatch.setattr(network_exchange.torch.cuda, "set_device", lambda number: None)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "lo")
    with pytest.raises(RuntimeError, match="as far as"):
        network_exchange.main(device)
    assert began["timeout"].total_seconds() == seconds
    assert began["backend"] == {"cpu": "gloo", "cuda": "nccl"}[device]


# What ssh ends with, and says (OpenSSH 9.2)
TROUBLES = {
    "no key": (
        255,
        "me@n2: Permission denied (publickey).\n",
        "Permission denied (publickey)",
        "ssh-copy-id n2",
    ),
    "key not known": (255, "Host key verification failed.\r\n", "does not know the key", "once manually"),
    "other key": (
        255,
        "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.\n",
        *("has changed", "ssh-keygen -R n2"),
    ),
    "no such name": (
        255,
        "ssh: Could not resolve hostname n2: Name or service not known\n",
        *("Could not resolve", "correct the name n2"),
    ),
    "refused": (255, "ssh: connect to host n2 port 22: Connection refused\n", "refused", "start sshd on n2"),
    "silent": (255, "ssh: connect to host n2 port 22: Connection timed out\n", "timed out", "n2 is running"),
    "no way": (255, "ssh: connect to host n2 port 22: No route to host\n", "No route", "n2 is running"),
    "something else": (255, "Too many authentication failures\n", "Too many", "ssh -oBatchMode=yes n2 true"),
    "no python": (
        127,
        "env: '/v/python': No such file or directory\n",
        "no python at /v/python",
        "path on n2",
    ),
    "python for others": (
        126,
        "env: '/v/python': Permission denied\n",
        "no python at /v/python",
        "path on n2",
    ),
    "no dstrain": (
        1,
        "/v/python: Error while finding module specification for 'dstrain.diagnostics.host' (ModuleNotFoundError: "
        "No module named 'dstrain')\n",
        *("no dstrain, or an older one", "the same dstrain"),
    ),
    "old dstrain": (
        1,
        "/v/python: No module named dstrain.diagnostics\n",
        "or an older one",
        "the same dstrain",
    ),
    "no psutil": (1, "ModuleNotFoundError: No module named 'psutil'\n", "does not start", "ssh n2 /v/python"),
    "without a word": (3, "", "exit code 3", "ssh n2 /v/python"),
}


@pytest.mark.parametrize("case", TROUBLES)
def test_why_a_host_does_not_answer(case: str) -> None:
    code, errors, message, fix = TROUBLES[case]
    found = trouble("n2", code, errors, "/v/python")
    assert message in found.message
    assert fix in found.fix


def test_nothing_that_ssh_gets_is_an_option_of_the_hosts_or_split_by_its_shell() -> None:
    argv = ssh_command("n2", "true; 'x'")
    assert argv[-3:] == ["--", "n2", "true; 'x'"]
    assert "-oBatchMode=yes" in argv


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh whose remote shell is one here; ``folder/before`` is what a login says and does first."""
    folder = tmp_path / "fake"
    folder.mkdir()
    (folder / "before").write_text("")
    (folder / "ssh").write_text(
        f'#!/bin/sh\n. {folder}/before\nfor line; do :; done\nprintf %s "$line" >{folder}/line\nexec sh -c "$line"\n'
    )
    (folder / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "X": "a b'c\"$HOME`id`;*\\ %h !"}


def test_a_conversation(fake_ssh: Path, tmp_path: Path) -> None:
    """Whatever the login says, and whatever the names are."""
    (fake_ssh / "before").write_text("echo Welcome; echo '{\"time\": 0}'; echo oh >&2\n")
    odd = tmp_path / "it's $(a) folder; `x`"
    odd.mkdir()
    with Conversation("n2", environment=ENVIRONMENT, directory=str(odd)) as talk:
        assert abs(talk.ask("time", seconds=60)["time"] - time.time()) < 60
        words = shlex.split((fake_ssh / "line").read_text())
        assert words[:5] == ["cd", str(odd), ";", "exec", "env"]
        assert {f"{name}={value}" for name, value in ENVIRONMENT.items()} == set(words[5:7])
        facts = talk.ask("facts", seconds=60, directory=str(odd), runs=str(odd), token="none")
        assert facts["directory"] is True and facts["sees_runs"] is False
        assert facts["versions"]["torch"] and facts["python"].startswith("3.")
        ports = talk.ask("listen", seconds=30)["ports"]
        here = {"name": "here", "hosts": ["127.0.0.1"], "ports": ports}
        nobody = {"name": "nobody", "hosts": ["no-such-host.invalid"], "ports": ports}
        [unreached] = talk.ask("reach", seconds=30, targets=[here, nobody])["unreached"]
        assert unreached["name"] == "nobody" and "not known" in unreached["why"]


def test_a_host_that_does_not_answer_is_given_up(fake_ssh: Path) -> None:
    (fake_ssh / "before").write_text("exec sleep 1000\n")
    with Conversation("n2", environment={}, directory="/") as talk:
        started = time.monotonic()
        for _ in range(2):
            with pytest.raises(NoAnswerError, match="no answer within 1 s"):
                talk.ask("time", seconds=1)
    assert time.monotonic() - started < 20


def test_one_that_fails_does_not_hide_the_others(fake_ssh: Path) -> None:
    with (
        Conversation("n1", environment=ENVIRONMENT, directory="/") as well,
        Conversation("n2", environment=ENVIRONMENT, directory="/", python="/no/python") as ill,
    ):
        first, second = ask_all([well, ill], "time", seconds=60)
    assert isinstance(first, dict) and first["time"] > 0
    assert isinstance(second, Trouble) and "no python at /no/python" in second.message


def test_ctrl_c_does_not_wait_for_answers(fake_ssh: Path) -> None:
    (fake_ssh / "before").write_text("exec sleep 1000\n")
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with Conversation("n2", environment={}, directory="/") as talk:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(KeyboardInterrupt):
                ask_all([talk], "time", seconds=1000)
    finally:
        signal.signal(signal.SIGUSR1, before)


# CUDA_VISIBLE_DEVICES, the devices that are found, what is said in their place
VISIBLE: dict[str, tuple[str | None, dict[str, Any] | None, str]] = {
    "nothing said": (None, {"kind": "cuda", "count": 2, "names": (H100[1], A100[1])}, ""),
    "one": ("1", {"kind": "cuda", "count": 1, "names": (A100[1],)}, ""),
    "a slice": ("MIG-1", None, "can't address a MIG slice"),
    "none of them": ("7", None, "'7' names none of this machine's GPUs, which are 0 to 1"),
}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> NvmlModule:
    nvml = NvmlModule()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return nvml


@pytest.mark.parametrize("case", VISIBLE)
def test_the_devices_of_a_host(
    case: str, tmp_path: Path, two_gpus: NvmlModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen, wanted, said = VISIBLE[case]
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    (tmp_path / "token").touch()
    found = facts(str(tmp_path), str(tmp_path), "token")
    assert (found["driver"], found["driver_cuda"]) == ("570.86.15", "12.8")
    assert found["devices"] == wanted
    assert said in found.get("devices_error", "") and ("devices_error" in found) == (wanted is None)
    assert found["directory"] is found["sees_runs"] is True


def test_a_host_whose_driver_fails_is_no_host_without_gpus(
    tmp_path: Path, two_gpus: NvmlModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    two_gpus.init = NvmlModule.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    found = facts(str(tmp_path), str(tmp_path), "token")
    assert found["devices"] is found["driver"] is None
    [check] = [one for one in judge_facts("n1", 2, found, found, gpus=False) if one.check == "devices"]
    assert check.status == FAILED and "NVIDIA's driver can't be asked for the GPUs" in check.message
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = facts(str(tmp_path), str(tmp_path), "token")
    assert found["devices"]["kind"] == "cpu" and found["driver"] is None


# --- the driver, and the CUDA of torch


@pytest.mark.parametrize(
    ("built_for", "has", "status", "said", "fix"),
    [
        ("13.0", "13.1", OK, "built for CUDA 13.0, the driver has 13.1", ""),
        (
            "12.8",
            "12.4",
            OK,
            "built for CUDA 12.8, the driver has 12.4",
            "",
        ),  # any minor version of the major one
        ("12.8", "13.0", OK, "built for CUDA 12.8, the driver has 13.0", ""),
        (
            "13.0",
            "12.8",
            FAILED,
            "but the driver (570.1) has CUDA 12.8 at most",
            "(580.65.06 or newer), or PyTorch for",
        ),
        (
            "14.1",
            "13.0",
            FAILED,
            "built for CUDA 14.1",
            "a driver for CUDA 14, or PyTorch for CUDA 13, on n1",
        ),
        ("", "13.0", FAILED, "built for CPUs", "PyTorch for CUDA on n1"),
        (None, "13.0", None, "", ""),
        ("13.0", None, None, "", ""),
    ],
)
def test_the_driver_and_the_cuda_of_torch(
    built_for: str | None, has: str | None, status: str | None, said: str, fix: str
) -> None:
    changed = {**FACTS, "torch_cuda": built_for, "driver_cuda": has}
    found = [one for one in judge_facts("n1", 4, changed, changed, gpus=True) if one.check == "cuda"]
    assert [one.status for one in found] == ([] if status is None else [status])
    assert all(said in one.message and fix in one.fix and bool(one.fix) == bool(fix) for one in found)
    on_cpu = {**changed, **CPU}
    assert not [one for one in judge_facts("n1", 4, on_cpu, on_cpu, gpus=False) if one.check == "cuda"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", ""),
        ('cuda = "12.8"\n', "12.8"),
        ("__version__ = '3'\n", None),
        (None, None),
    ],
)
def test_the_cuda_that_torch_is_built_for(
    text: str | None, found: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch is not to be imported')\n")
    if text is not None:
        (tmp_path / "torch" / "version.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert torch_cuda() == found


def test_the_cuda_of_the_torch_that_is_here() -> None:
    code = (
        "import torch, dstrain.diagnostics.host_facts as f; print([f.torch_cuda(), torch.version.cuda or ''])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ours, theirs = ast.literal_eval(done.stdout)
    assert ours == theirs


def request(**changed: Any) -> LaunchSpec:
    kept = {
        "run_folder": Path("/runs/a"),
        "hosts": (Host("192.0.2.1", 1), Host("192.0.2.2", 1)),  # RFC 5737: never this machine
        "processes_per_host": 1,
        "accelerator": "cpu",
        "master_addr": "192.0.2.1",
        "master_port": 29501,
        "environment": {},
        "launcher": "pdsh",
    }
    return LaunchSpec(**{**kept, **changed})


def test_pdsh_is_missed_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DstrainError, match=r"pdsh.*is not installed"):
        host_checks.refuse_unfit_hosts(request(), None)


def test_a_run_on_this_machine_looks_at_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_checks, "examine_hosts", None)  # a call would fail
    host_checks.refuse_unfit_hosts(request(hosts=(), launcher="local"), None)


@pytest.mark.parametrize("asked_for", [None, "cpu"])
def test_hosts_with_gpus_and_a_plan_for_cpus(
    asked_for: str | None,
    fake_ssh: Path,
    two_gpus: NvmlModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plan was made where there are none: nobody has asked for the CPU."""
    (fake_ssh / "pdsh").write_text("")
    (fake_ssh / "pdsh").chmod(0o755)
    monkeypatch.setattr("dstrain.diagnostics.network.own_addresses", lambda: ["127.0.0.1"])
    library = build_library(tmp_path / "driver")
    environment = {
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": ENVIRONMENT["PYTHONPATH"],
        "LD_LIBRARY_PATH": str(library),
    }
    if asked_for is not None:
        monkeypatch.setenv("DS_ACCELERATOR", asked_for)
    spec = request(run_folder=tmp_path / "runs" / "a", environment=environment)
    if asked_for is None:
        with pytest.raises(DstrainError) as caught:
            host_checks.refuse_unfit_hosts(spec, None)
        assert "192.0.2.1: devices: it has 2 GPUs, but the plan is for CPUs" in caught.value.message
        return
    with pytest.raises(DstrainError) as caught:
        host_checks.refuse_unfit_hosts(spec, None)
    assert "GPUs" not in caught.value.message and "same machine" in caught.value.message


def test_a_refusal_names_the_line_of_the_hostfile_and_its_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pdsh").write_text("")
    (tmp_path / "pdsh").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "hosts").write_text("# ours\n192.0.2.1 slots=8\n192.0.2.2 slots=8\n")
    asked: list[Host] = []

    def examined(hosts: list[Host], **_: Any) -> list[Check]:
        asked.extend(hosts)
        return [
            Check("192.0.2.1", "ssh", OK, "answers"),
            Check("192.0.2.1", "clock", WARNING, "late", "wind it"),
            Check("192.0.2.2", "devices", FAILED, "slots=8, but it has 4 GPUs", "`192.0.2.2 slots=4`"),
        ]

    monkeypatch.setattr(host_checks, "examine_hosts", examined)
    with pytest.raises(DstrainError) as caught:
        host_checks.refuse_unfit_hosts(request(), str(tmp_path / "hosts"))
    assert [host.slots for host in asked] == [8, 8]
    assert caught.value.where == f"{tmp_path}/hosts:3"
    assert caught.value.message == (
        "1 of 2 hosts can't take part in this run\n"
        "  192.0.2.2: devices: slots=8, but it has 4 GPUs\n    fix: `192.0.2.2 slots=4`"
    )


def test_this_machine_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    said = CliRunner().invoke(doctor, ["--json"])
    found = json.loads(said.stdout)
    assert said.exit_code == 0 and found["ok"] is True, said.output
    checks = {check["check"]: check["status"] for check in found["checks"]}
    assert checks["all-reduce"] == checks["send"] == OK
    assert {"ssh", "clock", "ports", "own name"}.isdisjoint(checks)
    assert list(tmp_path.iterdir()) == []


def test_this_machine_in_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch; a folder that no run can be written into is what the image's health check looks for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    said = CliRunner().invoke(doctor, ["--quick", "--json"])
    found = json.loads(said.stdout)
    assert said.exit_code == 0 and "devices" in {check["check"] for check in found["checks"]}
    assert {"all-reduce", "send"}.isdisjoint(check["check"] for check in found["checks"])
    said = CliRunner().invoke(doctor, ["--quick", "--json", "--runs-dir", "/proc/self"])
    [failed] = [check for check in json.loads(said.stdout)["checks"] if check["status"] == FAILED]
    assert said.exit_code == 1 and failed["check"] == "run folder"


def test_a_hostfile_that_is_bad_is_refused_by_doctor(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("-oProxyCommand=x slots=1\n")
    said = CliRunner().invoke(doctor, ["--hostfile", str(tmp_path / "hosts")])
    assert isinstance(said.exception, DstrainError)


HEAVY = ("torch", "deepspeed", "transformers", "datasets", "numpy")


def test_what_runs_on_a_host_is_light(repository: Path) -> None:
    """It is started over ssh, on disks that may be slow, before every run."""
    code = f"import sys, {host.__name__}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# --- where the ranks are to meet


@pytest.mark.parametrize("everywhere", [True, False])
def test_a_port_that_is_taken_is_named_with_its_process(everywhere: bool) -> None:
    """Also where it is held on all addresses, and the ranks of one machine want loopback alone."""
    with socket.create_server(("" if everywhere else "127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        told = port_taken(port, only_here=True)
        assert told is not None and told.startswith(f"port {port} is taken by ")
        assert f"(process {os.getpid()})" in told
        spec = LaunchSpec(Path("/r"), (), 1, "cpu", "127.0.0.1", port, {})
        with pytest.raises(DstrainError, match=f"port {port} is taken") as caught:
            host_checks.refuse_taken_port(spec, "--master-port")
        assert caught.value.where == "--master-port" and "another --master-port" in (caught.value.hint or "")
        host_checks.refuse_taken_port(replace(spec, launcher="slurm"), "")  # rank 0 may be on another host
        host_checks.refuse_taken_port(replace(spec, launcher="none", node=1), "")
        with Conversation("here", environment={}, directory="/", over_ssh=False) as talk:
            (check,) = host_checks._master_port(talk, port)
            assert (check.status, check.check) == (FAILED, "master port") and str(port) in check.message
    host_checks.refuse_taken_port(spec, "--master-port")
    assert port_taken(port) is None
