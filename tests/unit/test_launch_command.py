from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from dstrain.errors import DstrainError
from dstrain.launch import environment as environment_module
from dstrain.launch.command import LaunchRequest, deepspeed_command, free_port, write_launch_files
from dstrain.launch.environment import check_environment, default_environment
from dstrain.plan.layout import Host

HERE = LaunchRequest(
    run_folder=Path("/runs/a"),
    hosts=(),
    processes_per_host=4,
    accelerator="cpu",
    master_addr="127.0.0.1",
    master_port=29501,
    environment={"DS_ACCELERATOR": "cpu"},
    python="/venv/bin/python",
    directory=Path("/work"),
)
# 192.0.2.0/24 is kept free for documents (RFC 5737): never this machine
THERE = replace(HERE, hosts=(Host("192.0.2.1", 8), Host("192.0.2.2", 4)), master_addr="192.0.2.1")


def test_one_machine() -> None:
    assert deepspeed_command(HERE) == [
        *("/venv/bin/python", "-m", "deepspeed.launcher.runner"),
        *("--hostfile", "/dev/null", "--num_gpus", "4"),
        *("--master_addr", "127.0.0.1", "--master_port", "29501", "--no_local_rank"),
        *("--module", "dstrain.train.worker", "/runs/a"),
    ]


def test_hosts() -> None:
    assert deepspeed_command(THERE) == [
        *("/venv/bin/python", "-m", "deepspeed.launcher.runner"),
        *("--hostfile", "/runs/a/hostfile", "--launcher", "pdsh", "--force_multi"),
        *("--master_addr", "192.0.2.1", "--master_port", "29501", "--no_local_rank"),
        *("--module", "dstrain.train.worker", "/runs/a"),
    ]


def test_one_host_is_local_only_when_it_is_this_one() -> None:
    assert deepspeed_command(replace(HERE, hosts=(Host("localhost", 4),))) == deepspeed_command(HERE)
    assert "--force_multi" in deepspeed_command(replace(THERE, hosts=THERE.hosts[:1]))


@pytest.mark.parametrize(
    ("ids", "argument"),
    [
        ((), ["--num_gpus", "2"]),
        ((0, 1, 2), ["--num_gpus", "2"]),
        ((2, 3), ["--include", "localhost:2,3"]),
        ((7, 5, 1), ["--include", "localhost:5,7"]),
    ],
)
def test_chosen_gpus(ids: tuple[int, ...], argument: list[str]) -> None:
    request = replace(HERE, accelerator="cuda", processes_per_host=2, device_ids=ids)
    assert deepspeed_command(request)[5:7] == argument


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (replace(HERE, accelerator="cuda", device_ids=(0, 1)), "2 are visible"),
        (replace(HERE, hosts=(Host("localhost", 2),)), "has 2 slots"),
        (replace(THERE, processes_per_host=5), "192.0.2.2 has 4 slots"),
        (replace(THERE, master_addr="127.0.0.1"), "can't reach rank 0"),
        (replace(THERE, master_addr="localhost"), "can't reach rank 0"),
        (replace(THERE, run_folder=Path("/runs/a b")), "run folder"),
        (replace(THERE, directory=Path("/it's")), "launch folder"),
        (replace(THERE, python="/ven$v/python"), "python"),
    ],
)
def test_refused(request_: LaunchRequest, message: str) -> None:
    with pytest.raises(DstrainError, match=message.replace("$", r"\$")):
        deepspeed_command(request_)


FAKE_PYTHON = """#!/usr/bin/python3
import json, os, sys
print(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}))
"""


@pytest.mark.parametrize(
    "name", ["plain", "two words", "it's", 'a "b" c', "$HOME", "`id`", "a;b&c", "*", "-x", "ü\\n"]
)
def test_script_runs_by_hand(name: str, tmp_path: Path) -> None:
    place = tmp_path / name
    place.mkdir()
    fake = place / "python"
    fake.write_text(FAKE_PYTHON)
    fake.chmod(0o755)
    value = f"{name} # $X = \"'\\"
    request = replace(
        HERE, run_folder=place / "run", directory=place, python=str(fake), environment={"A": value, "B": ""}
    )
    write_launch_files(request)
    script = place / "run" / "launch.sh"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    answer = subprocess.run([str(script)], cwd="/", check=True, capture_output=True, text=True)
    seen = json.loads(answer.stdout)
    assert [str(fake), *seen["argv"]] == deepspeed_command(request)
    assert (seen["env"]["A"], seen["env"]["B"], seen["cwd"]) == (value, "", str(place))
    assert "DS_ENV_FILE" not in seen["env"]
    assert (place / "run" / "environment").read_text() == f"A={value}\nB=\n"
    assert not (place / "run" / "hostfile").exists()


def test_files_for_hosts(tmp_path: Path) -> None:
    write_launch_files(replace(THERE, run_folder=tmp_path))
    assert (tmp_path / "hostfile").read_text() == "192.0.2.1 slots=4\n192.0.2.2 slots=4\n"
    assert f"export DS_ENV_FILE={tmp_path}/environment\n" in (tmp_path / "launch.sh").read_text()
    assert (tmp_path / "environment").read_text() == "DS_ACCELERATOR=cpu\n"
    write_launch_files(replace(HERE, run_folder=tmp_path))
    assert not (tmp_path / "hostfile").exists()


@pytest.mark.parametrize(
    ("environment", "remote", "message"),
    [
        ({"A": "x\ny"}, False, "line end"),
        ({"A": "x\r"}, False, "line end"),
        ({"A B": "x"}, False, "name of an environment variable"),
        ({"": "x"}, False, "name of an environment variable"),
        ({"A": 'say "x"'}, True, "over ssh"),
        ({"A": "$HOME"}, True, "over ssh"),
        ({"A": "100%n"}, True, "over ssh"),
        ({"A": " x"}, True, "over ssh"),
    ],
)
def test_environment_refused(environment: dict[str, str], remote: bool, message: str) -> None:
    with pytest.raises(DstrainError, match=message):
        check_environment(environment, remote=remote)


def test_default_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_module, "_cores", lambda: 8)
    base = {"PATH": "/usr/bin:/venv/bin:/bin"}
    here = default_environment("cpu", 3, True, environ=base, python="/venv/bin/python")
    assert here["DS_ACCELERATOR"] == "cpu"
    assert here["OMP_NUM_THREADS"] == "2"
    assert here["PATH"] == "/venv/bin:/usr/bin:/bin"
    assert here["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")
    assert default_environment("cpu", 16, True, environ=base)["OMP_NUM_THREADS"] == "1"
    there = default_environment("cuda", 8, False, environ=base)
    assert not {"OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME"} & there.keys()
    assert there["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert "ServerAliveInterval" in there["PDSH_SSH_ARGS_APPEND"]


def test_the_users_own_environment_is_kept() -> None:
    own = {"OMP_NUM_THREADS": "5", "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": "/mine"}
    found = default_environment("cpu", 4, True, environ={"PATH": "/bin", **own})
    assert (found["OMP_NUM_THREADS"], found["GLOO_SOCKET_IFNAME"]) == ("5", "eth0")
    assert found.get("PYTHONPATH", "/mine").split(":")[-1] == "/mine"


@pytest.mark.parametrize("single_host", [True, False])
@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_the_users_own_environment_is_carried(accelerator: str, single_host: bool) -> None:
    own = {"GLOO_SOCKET_IFNAME": "eth0", "DSTRAIN_CACHE": "/cache", "XDG_CACHE_HOME": "/xdg"}
    found = default_environment(accelerator, 2, single_host, environ={"PATH": "/bin", **own})
    assert own.items() <= found.items()


def test_pythonpath_is_named_when_dstrain_is_borrowed() -> None:
    root = str(Path(__file__).resolve().parents[2])
    found = default_environment("cpu", 1, True, environ={"PATH": "/bin", "PYTHONPATH": f"/mine:{root}"})
    assert found["PYTHONPATH"] == f"{root}:/mine"


def test_free_port() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", free_port()))
