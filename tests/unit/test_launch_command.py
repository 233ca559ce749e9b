from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dstrain.errors import DstrainError
from dstrain.launch import command as command_module
from dstrain.launch import environment as environment_module
from dstrain.launch.command import (
    free_port,
    launch_command,
    supervised_environment,
    write_launch_files,
)
from dstrain.launch.environment import check_environment, default_environment
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.planning.layout import Host
from dstrain.runs.protocol import ADDRESS
from dstrain.runs.run_folder import RunFolder
from dstrain.train.rank_environment import (
    launch_variables,
    rank_variables,
    refuse_another_world,
    typed_by_hand,
    without_local_rank,
)

HERE = LaunchSpec(
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
THERE = replace(
    HERE, hosts=(Host("192.0.2.1", 8), Host("192.0.2.2", 4)), master_addr="192.0.2.1", launcher="pdsh"
)


def test_one_machine() -> None:
    assert launch_command(HERE) == [
        *("/venv/bin/python", "-m", "deepspeed.launcher.runner"),
        *("--hostfile", "/dev/null", "--num_gpus", "4"),
        *("--master_addr", "127.0.0.1", "--master_port", "29501", "--no_local_rank"),
        *("--module", "dstrain.train.worker", "/runs/a"),
    ]


def test_hosts() -> None:
    assert launch_command(THERE) == [
        *("/venv/bin/python", "-m", "deepspeed.launcher.runner"),
        *("--hostfile", "/runs/a/hostfile", "--launcher", "pdsh", "--force_multi"),
        *("--master_addr", "192.0.2.1", "--master_port", "29501", "--no_local_rank"),
        *("--module", "dstrain.train.worker", "/runs/a"),
    ]


def test_torchrun() -> None:
    """Alone, the agent keeps its store in a file without a name: no port is opened for it."""
    sh, option, script, name, *argv = launch_command(replace(HERE, launcher="torchrun"))
    assert (sh, option, name) == ("sh", "-c", "sh")
    assert argv == [
        *("/venv/bin/python", "-m", "torch.distributed.run", "--nnodes=1"),
        *("--nproc-per-node=4", "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-conf=store_type=file"),
        *("--rdzv-endpoint=/proc/self/fd/3", "--local-addr=127.0.0.1"),
        *("--module", "dstrain.train.worker", "/runs/a"),
    ]
    seen = 'echo "$DSTRAIN_STORE_PORT $TORCH_DISABLE_SHARE_RDZV_TCP_STORE"; echo x >/proc/$$/fd/3; cat /proc/$$/fd/3'
    said = subprocess.run(
        ["sh", "-c", script, "sh", "sh", "-c", seen], capture_output=True, text=True, check=True
    )
    assert said.stdout == "29501 1\nx\n"


def test_torchrun_on_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pdsh starts an agent on each; the supervisor's address gets into launch.sh as a variable."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DstrainError, match=r"pdsh.*is not installed"):
        launch_command(replace(THERE, launcher="torchrun"))
    fake = tmp_path / "pdsh"
    fake.write_text('#!/bin/sh\nshift 7\nexec /bin/sh -c "$1"\n')  # what a remote shell would run
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    for file in (fake, python):
        file.chmod(0o755)
    request = replace(
        THERE, launcher="torchrun", run_folder=tmp_path / "run", python=str(python), directory=tmp_path
    )
    request = replace(request, environment={"A": "two words; $HOME"})
    with pytest.raises(DstrainError, match="does not preserve"):
        write_launch_files(request)
    write_launch_files(replace(request, environment={"A": "two words"}))
    for control in ("", "ab12@10.0.0.1,127.0.0.1:4711"):
        answer = subprocess.run(
            ["/bin/bash", str(tmp_path / "run" / "launch.sh")],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", ADDRESS: control},
            check=True,
            capture_output=True,
            text=True,
        )
        seen = json.loads(answer.stdout)
        assert (seen["env"]["A"], seen["env"][ADDRESS]) == ("two words", control)
        assert {"--nnodes=2", "--node-rank=%n", "--master-addr=192.0.2.1"} < set(seen["argv"])


def test_openmpi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    request = replace(THERE, launcher="openmpi", run_folder=tmp_path)
    with pytest.raises(DstrainError, match="Open MPI is not installed"):
        launch_command(request)
    for name in ("mpirun", "ompi_info"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert launch_command(request)[3:8] == [
        *("--hostfile", f"{tmp_path}/hostfile", "--launcher", "openmpi"),
        "--launcher_args=--map-by slot" + (" --allow-run-as-root" if os.geteuid() == 0 else ""),
    ]
    write_launch_files(request)
    carried = (tmp_path / "environment").read_text()
    assert carried == "DS_ACCELERATOR=cpu\nMASTER_ADDR=192.0.2.1\nMASTER_PORT=29501\n"


def test_folders_that_ranks_of_open_mpi_would_not_find(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They get it in quotes, and it is read before they could take these away."""
    for program in ("mpirun", "ompi_info"):
        (tmp_path / program).write_text("")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    name = "LD_LIBRARY_PATH"
    request = replace(THERE, launcher="openmpi", environment={name: "/plain:/with space"})
    with pytest.raises(DstrainError, match=f"{name} contains ' '") as caught:
        launch_command(request)
    assert caught.value.where == f"environment: {name}" and "--launcher pdsh" in (caught.value.hint or "")
    launch_command(replace(request, environment={name: "/plain:/also-plain_1.0"}))


def test_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    request = replace(THERE, launcher="slurm")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(DstrainError, match="no Slurm allocation"):
        launch_command(request)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert launch_command(request) == [
        *("srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=192.0.2.1,192.0.2.2"),
        *("--distribution=block", "--export=ALL", "--kill-on-bad-exit=1", "--overlap", "--unbuffered"),
        *("sh", "-c", 'trap "" TERM; exec "$@"', "sh"),
        *("/venv/bin/python", "-u", "-m", "dstrain.train.worker", "/runs/a"),
    ]
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    assert "--cpus-per-task=6" in launch_command(request)


def test_typed_on_every_node(tmp_path: Path) -> None:
    """launch.sh is the same on all, and is told which one it is: by its argument, or by the supervisor."""
    request = replace(
        HERE,
        launcher="none",
        hosts=tuple(Host(f"node-{number}", 4) for number in range(3)),
        master_addr="train-0.train",
        run_folder=tmp_path / "run",
        directory=tmp_path,
        python=str(tmp_path / "python"),
        node=2,
    )
    assert list(request.ranks) == [8, 9, 10, 11]
    assert list(replace(request, launcher="slurm").ranks) == list(range(12))
    (tmp_path / "python").write_text(FAKE_PYTHON)
    (tmp_path / "python").chmod(0o755)
    write_launch_files(request)
    assert not (tmp_path / "run" / "hostfile").exists()
    script = ["/bin/bash", str(tmp_path / "run" / "launch.sh")]
    bare = {"PATH": "/usr/bin:/bin"}
    for argv, environment in ((script, supervised_environment(request, "ab@h:1")), ([*script, "2"], {})):
        said = subprocess.run(argv, env=bare | environment, check=True, capture_output=True, text=True)
        seen = json.loads(said.stdout)
        assert seen["env"]["DSTRAIN_NODE_RANK"] == "2"
        assert seen["argv"] == [
            *("-m", "torch.distributed.run", "--nnodes=3", "--nproc-per-node=4", "--max-restarts=0"),
            *("--node-rank=2", "--master-addr=train-0.train", "--master-port=29501"),
            *("--module", "dstrain.train.worker", str(tmp_path / "run")),
        ]
    said = subprocess.run(script, env=bare, capture_output=True, text=True, check=False)
    assert said.returncode != 0 and "which node is this" in said.stderr


@pytest.mark.parametrize("launcher", ["local", "pdsh", "slurm", "none"])
def test_no_secret_is_written_or_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    secret = "hf_5ecret"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    base = HERE if launcher == "local" else THERE
    request = replace(
        base, launcher=launcher, run_folder=tmp_path, environment=default_environment("cpu", 2, False)
    )
    assert secret not in " ".join(launch_command(request))
    write_launch_files(request)
    supervised_environment(request, "ab@h:1")
    for file in {"environment", ".environment"} & {path.name for path in tmp_path.iterdir()}:
        assert (tmp_path / file).stat().st_mode & 0o777 == 0o600
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert {"launch.sh", "environment"} <= written.keys()
    assert not [name for name, text in written.items() if secret in text]


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, ("0", "1", "0", "1")),
        (
            {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "0"},
            ("3", "4", "1", None),
        ),
        (
            {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"},
            ("5", "8", "1", "4"),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "2",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "0",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            ("2", "4", "0", "2"),
        ),
    ],
)
def test_a_rank_knows_its_number(variables: dict[str, str], wanted: tuple[str | None, ...]) -> None:
    found = rank_variables(variables)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    assert tuple(found.get(name) for name in names) == wanted


def test_deepspeed_typed_by_hand_is_known_by_the_argument_that_it_adds(tmp_path: Path) -> None:
    assert typed_by_hand(["--local_rank=1", "runs/a"])
    assert not typed_by_hand(["runs/a"])
    assert without_local_rank(["--local_rank=1", "runs/a"]) == ["runs/a"]
    folder = RunFolder(tmp_path)
    folder.environment.write_text("OMP_NUM_THREADS=1\nPYTHONPATH=/a=b:/c\n")
    assert launch_variables(folder) == {"OMP_NUM_THREADS": "1", "PYTHONPATH": "/a=b:/c"}


def test_another_number_of_ranks_than_the_plans_is_refused(tmp_path: Path) -> None:
    refuse_another_world(4, RunFolder(tmp_path), {"WORLD_SIZE": "4"})
    with pytest.raises(DstrainError, match="the plan is for 4 ranks, but 2 were started"):
        refuse_another_world(4, RunFolder(tmp_path), {"WORLD_SIZE": "2"})


def test_one_host_is_local_only_when_it_is_this_one() -> None:
    assert launch_command(replace(HERE, hosts=(Host("localhost", 4),))) == launch_command(HERE)
    assert "--force_multi" in launch_command(replace(THERE, hosts=THERE.hosts[:1]))


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
    assert launch_command(request)[5:7] == argument


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
def test_refused(request_: LaunchSpec, message: str) -> None:
    with pytest.raises(DstrainError, match=message.replace("$", r"\$")):
        launch_command(request_)


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "torchrun"])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"run_folder": Path("/my runs/a")}, "run folder"),
        ({"directory": Path("/my work")}, "launch folder"),
        ({"python": "/my venv/bin/python"}, "python"),
    ],
)
def test_no_launcher_of_other_hosts_is_given_a_space(
    launcher: str, change: dict[str, Any], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    request = replace(THERE, launcher=launcher)
    assert launch_command(request)
    with pytest.raises(
        DstrainError, match=f"the path of the {what} would not survive the remote shell: '/my "
    ):
        launch_command(replace(request, **change))


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
    assert [str(fake), *seen["argv"]] == launch_command(request)
    assert (seen["env"]["A"], seen["env"]["B"], seen["cwd"]) == (value, "", str(place))
    assert "DS_ENV_FILE" not in seen["env"]
    assert (place / "run" / "environment").read_text() == f"A={value}\nB=\n"
    assert not (place / "run" / "hostfile").exists()


def test_files_for_hosts(tmp_path: Path) -> None:
    write_launch_files(replace(THERE, run_folder=tmp_path))
    assert (tmp_path / "hostfile").read_text() == "192.0.2.1 slots=4\n192.0.2.2 slots=4\n"
    travelling = f'export DS_ENV_FILE="${{DSTRAIN_ENV_FILE:-{tmp_path}/environment}}"\n'
    assert travelling in (tmp_path / "launch.sh").read_text()
    assert (tmp_path / "environment").read_text() == "DS_ACCELERATOR=cpu\n"
    write_launch_files(replace(HERE, run_folder=tmp_path))
    assert not (tmp_path / "hostfile").exists()


@pytest.mark.parametrize(
    ("environment", "remote", "message"),
    [
        ({"A": "x\ny"}, False, "newline"),
        ({"A": "x\r"}, False, "newline"),
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
    assert there["OMP_NUM_THREADS"] == "1" and "GLOO_SOCKET_IFNAME" not in there
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


def test_a_port_that_is_taken_at_one_address_is_not_free(monkeypatch: pytest.MonkeyPatch) -> None:
    families = [(socket.AF_INET, "127.0.0.1")] + [(socket.AF_INET6, "::1")] * socket.has_dualstack_ipv6()
    for family, address in families:
        with socket.create_server((address, 0), family=family) as taken:
            monkeypatch.setattr(command_module.random, "sample", lambda *_: [taken.getsockname()[1]])
            with pytest.raises(DstrainError, match="no free TCP port"):
                free_port()
