"""What reaches the ranks of what stands in the user's environment: unchanged, or refused, or left out."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest

from dstrain.config.passed_variables import check_patterns, passed
from dstrain.errors import DstrainError
from dstrain.launch import environment as environment_module
from dstrain.launch.command import write_launch_files
from dstrain.launch.environment import (
    check_environment,
    default_environment,
    environment_text,
    forgetting,
)
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.planning.layout import Host
from dstrain.runs.this_machine import is_loopback
from dstrain.train import rank_environment
from dstrain.train.rank_environment import card_towards, loopback_variables, network_variables, without_quotes

SECRETS = {
    "HF_TOKEN": "s1",
    "HUGGING_FACE_HUB_TOKEN": "s2",
    "AWS_SECRET_ACCESS_KEY": "s3",
    "WANDB_API_KEY": "s4",
    "MLFLOW_TRACKING_TOKEN": "s5",
    "MLFLOW_TRACKING_PASSWORD": "s6",
    "PYTHON_KEYRING_PASSWORD": "s7",
    "OPENAI_API_KEY": "s8",
}


@pytest.mark.parametrize("single_host", [True, False])
@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_no_secret_travels(accelerator: str, single_host: bool) -> None:
    found = default_environment(accelerator, 2, single_host, environ={"PATH": "/bin", **SECRETS})
    assert not set(SECRETS) & set(found)
    assert not set(SECRETS.values()) & set(found.values())


def test_what_sets_the_network_travels() -> None:
    own = {
        "NCCL_IB_HCA": "mlx5",
        "NCCL_DEBUG": "INFO",
        "UCX_NET_DEVICES": "eth0",
        "TORCH_EXTENSIONS_DIR": "/x",
    }
    found = default_environment("cuda", 8, False, environ={"PATH": "/bin", **own}, hosts=["n1", "n2"])
    assert own.items() <= found.items()
    assert found["DSTRAIN_HOSTS"] == "n1,n2"
    assert "DSTRAIN_HOSTS" not in default_environment("cuda", 8, True, environ={"PATH": "/bin"}, hosts=["n1"])


def test_pythonpath_travels_and_means_the_same_in_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = default_environment("cpu", 1, False, environ={"PATH": "/bin", "PYTHONPATH": "/mine::mine"})
    assert found["PYTHONPATH"].split(":")[-2:] == ["/mine", str(tmp_path / "mine")]


# Values of a variable that travels, as a user may have set it; whether they reach other hosts.
VALUES = {
    "plain": ("eth0", True),
    "empty": ("", True),
    "list": ("eth0,ib1", True),
    "path": ("/a/b.c-d_e:/f", True),
    "two words": ("two words", True),
    "comment sign": ("a # b", True),
    "assignment": ("a=b=c", True),
    "semicolon": ("a; touch /tmp/x", True),
    "glob": ("*?[a]", True),
    "tilde": ("~root", True),
    "single quote": ("it's", True),
    "umlaut": ("ü", True),
    "parentheses": ("(a) {b} <c> & |", True),
    "tab": ("a\tb", True),
    "double quotes": ('a "b"', False),
    "variable": ("$HOME", False),
    "substitution": ("$(id)", False),
    "backquotes": ("`id`", False),
    "backslash": ("a\\nb", False),
    "percent": ("%h", False),
    "history": ("a!b", False),
    "spaces in front": (" a", False),
    "spaces behind": ("a ", False),
    "line end": ("a\nb", False),
    "windows": ("a\r", False),
    "nul": ("a\0b", False),
}


@pytest.mark.parametrize("case", [name for name, (_, travels) in VALUES.items() if not travels])
def test_a_value_that_would_be_altered_is_refused(case: str) -> None:
    value, _ = VALUES[case]
    with pytest.raises(DstrainError) as caught:
        check_environment({"NCCL_X": value}, remote=True)
    assert caught.value.where == "environment: NCCL_X"
    assert "file" in (caught.value.hint or "")


def test_all_others_arrive_as_they_are_through_deepspeeds_own_hands(tmp_path: Path) -> None:
    """Its parser of the file, its quoting, and a shell, as an ssh has it."""
    from deepspeed.launcher.multinode_runner import PDSHRunner

    environment = {f"NCCL_{n}": value for n, (value, travels) in enumerate(VALUES.values()) if travels}
    check_environment(environment, remote=True)
    world = base64.urlsafe_b64encode(json.dumps({"n1": [0]}).encode()).decode()
    runner = PDSHRunner(
        Namespace(
            user_args=[],
            user_script="x",
            ssh_port=None,
            launcher_args="",
            master_addr="n1",
            master_port=1,
            venv_script=None,
            no_python=False,
            module=False,
            no_local_rank=True,
            save_pid=False,
            enable_each_rank_log=None,
        ),
        world,
    )
    for line in environment_text(environment).splitlines(keepends=True):  # as runner.main does
        runner.add_export(*line.split("=", maxsplit=1))
    command, _, _ = runner.get_cmd({}, {"n1": [0]})
    exports = next(word for word in command if word.startswith("export "))
    done = subprocess.run(
        ["/bin/sh", "-c", f"{exports} env -0"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    seen = dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)
    assert {name: seen[name] for name in environment} == environment
    assert list(tmp_path.iterdir()) == []


LEFT_BEHIND = {
    "RANK": "7",
    "WORLD_SIZE": "9",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "203.0.113.1",
    "MASTER_PORT": "1",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "1",
    "TORCHELASTIC_RUN_ID": "x",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
CARRIED_BY_DEEPSPEED = {
    "MLFLOW_TRACKING_TOKEN": "s",
    "PYTHONSTARTUP": "$(id)",
    "MV2_X": "`id`",
    "UCX_X": '"',
    "NCCL_X": "$X",
}


@pytest.mark.parametrize("remote", [True, False])
def test_what_another_launcher_has_left_is_forgotten(remote: bool) -> None:
    environment = {"PATH": os.defpath, "KEPT": "1", **LEFT_BEHIND, **CARRIED_BY_DEEPSPEED}
    done = subprocess.run(
        ["bash", "-c", f"set -eu\n{forgetting(remote=remote)}\nenv"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    left = set(re.findall(r"^(\w+)=", done.stdout, re.MULTILINE))
    assert "KEPT" in left
    assert not left & set(LEFT_BEHIND)
    assert left & set(CARRIED_BY_DEEPSPEED) == (set() if remote else set(CARRIED_BY_DEEPSPEED))


def test_with_nothing_to_forget() -> None:
    line = forgetting(remote=True)
    subprocess.run(["bash", "-c", f"set -eu\n{line}"], env={"PATH": os.defpath}, check=True)


# environment, the cards that lead to each place, what is set
CARDS = {
    "the way to the master": ({"MASTER_ADDR": "n1"}, {"n1": "ib0"}, ("ib0", "=ib0")),
    "on the master, as Debian names it": (
        {"MASTER_ADDR": "n1", "DSTRAIN_HOSTS": "n1,n2"},
        {"n2": "eth1", "192.0.2.1": "eth0"},
        ("eth1", "=eth1"),
    ),
    "nobody else is known": ({"MASTER_ADDR": "n1"}, {"192.0.2.1": "eth0"}, ("eth0", "=eth0")),
    "no way anywhere": ({"MASTER_ADDR": "n1"}, {}, (None, None)),
    "the user's": ({"MASTER_ADDR": "n1", "GLOO_SOCKET_IFNAME": "x"}, {"n1": "ib0"}, (None, None)),
    "the user's for NCCL": (
        {"MASTER_ADDR": "n1", "NCCL_SOCKET_IFNAME": "x"},
        {"n1": "ib0"},
        ("ib0", None),
    ),
    "one host": ({"MASTER_ADDR": "127.0.0.1"}, {"192.0.2.1": "eth0"}, ("lo", "=lo")),
    "one host, with the launch's": (
        {"MASTER_ADDR": "::1", "GLOO_SOCKET_IFNAME": "lo"},
        {"192.0.2.1": "eth0"},
        (None, "=lo"),
    ),
    "one host, with the user's": (
        {"MASTER_ADDR": "localhost", "NCCL_SOCKET_IFNAME": "ib0"},
        {},
        ("lo", None),
    ),
    "the outside by IPv6": ({"MASTER_ADDR": "n1"}, {"2001:db8::1": "eth0"}, ("eth0", "=eth0")),
    "one process": ({}, {"192.0.2.1": "eth0"}, (None, None)),
}


@pytest.mark.parametrize("case", CARDS)
def test_the_network_card(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, cards, wanted = CARDS[case]
    monkeypatch.setattr(rank_environment, "card_towards", cards.get)
    found = network_variables(environment)
    assert (found.get("GLOO_SOCKET_IFNAME"), found.get("NCCL_SOCKET_IFNAME")) == wanted


@pytest.mark.parametrize(
    "place", ["127.0.0.1", "127.0.1.1", "::1", "localhost", "no-such-host.invalid", "a" * 300]
)
def test_no_card_leads_there(place: str) -> None:
    assert card_towards(place) is None


@pytest.mark.parametrize(
    ("variables", "wanted"),
    {
        "torch's launchers": ({"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, {"MASTER_ADDR": "127.0.0.1"}),
        "DeepSpeed's": ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, {"MASTER_ADDR": "127.0.0.1"}),
        "torchrun, alone": (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "DSTRAIN_STORE_PORT": "7", "MASTER_PORT": "9"},
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"},
        ),
        "torchrun holds the store": (
            {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            {},
        ),
        "other hosts": ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "4"}, {}),
        "nobody says": ({"WORLD_SIZE": "4"}, {}),
    }.values(),
)
def test_the_ranks_of_one_host_meet_at_its_loopback_address(
    variables: dict[str, str], wanted: dict[str, str]
) -> None:
    assert loopback_variables(variables) == wanted


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback(name: str) -> None:
    assert is_loopback(name)


@pytest.mark.parametrize(
    "name", ["", "n1", "127.example.org", "10.0.0.1", "::10", "::1234", "fe80::1", "localhost.example"]
)
def test_not_loopback(name: str) -> None:
    assert not is_loopback(name)


@pytest.mark.parametrize(
    "value", ["ab@[fd77::11],10.0.0.1:4711", "two words", "plain", "ab@10.0.0.1,127.0.0.1:4711", ""]
)
def test_what_deepspeed_puts_in_quotes_for_open_mpi(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.multinode_runner import OpenMPIRunner

    monkeypatch.setattr(OpenMPIRunner, "validate_args", lambda self: None)
    runner = OpenMPIRunner(Namespace(user_args=[], user_script=""), "", {})
    runner.add_export("DSTRAIN_X", value)
    arrived = {"DSTRAIN_X": runner.exports["DSTRAIN_X"], "MINE": '"a b"'}
    assert without_quotes(arrived) == {}, "a shell has taken them away"
    arrived["OMPI_COMM_WORLD_RANK"] = "0"
    assert arrived | without_quotes(arrived) == {**arrived, "DSTRAIN_X": value}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of dstrain, which may hold a space, is named in no PYTHONPATH."""
    monkeypatch.setattr("dstrain.launch.environment._is_installed", lambda environ: True)


@pytest.mark.usefixtures("installed")
def test_what_is_handed_on_reaches_the_ranks_of_open_mpi_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the user's shell through the run folder's file, DeepSpeed's parser of it and its argv of mpirun."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.launcher.multinode_runner import OpenMPIRunner

    monkeypatch.setattr(OpenMPIRunner, "validate_args", lambda self: None)
    own = {
        "NCCL_IB_HCA": "=mlx5_0:1,mlx5_1:1",
        "FI_PROVIDER": "efa;ofi_rxm",
        "LD_LIBRARY_PATH": "/a:/b-1.0_c",
        "CUDA_HOME": "/a b",
        "MY_X": "it's",
    }
    environment = default_environment("cuda", 2, False, environ={"PATH": "/bin", **own}, carried=["MY_*"])
    file = travelling(environment, "openmpi", tmp_path)["environment"]
    runner = OpenMPIRunner(Namespace(user_args=[], user_script=""), "", {})
    for line in file.splitlines(keepends=True):  # as runner.main does
        runner.add_export(*line.split("=", maxsplit=1))
    arrived = {**runner.exports, "OMPI_COMM_WORLD_RANK": "0", "MINE": '"a b"'}
    found = arrived | without_quotes(arrived)
    assert {name: found[name] for name in environment} == environment
    assert own.items() <= environment.items() and found["MINE"] == '"a b"'


def travelling(environment: dict[str, str], launcher: str, folder: Path) -> dict[str, str]:
    """The launch files of two hosts, by their names."""
    spec = LaunchSpec(
        run_folder=folder / "run",
        hosts=(Host("192.0.2.1", 2), Host("192.0.2.2", 2)),  # RFC 5737: never this machine
        processes_per_host=2,
        accelerator="cuda",
        master_addr="192.0.2.1",
        master_port=29501,
        environment=environment,
        launcher=launcher,
        directory=folder,
        python="/env/bin/python",
    )
    programs = folder / "programs"
    programs.mkdir()
    for name in ("mpirun", "ompi_info", "pdsh"):
        (programs / name).write_text("")
        (programs / name).chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        patch.setenv("SLURM_JOB_ID", "7")
        write_launch_files(spec)
    return {path.name: path.read_text() for path in (folder / "run").iterdir() if path.is_file()}


# What ssh drops and a run on GPUs needs; the last two by `pass_env`.
OF_THE_USER = {
    "DEEPSPEED_TIMEOUT": "90",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "2000",
    "PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512",
    "PYTORCH_ALLOC_CONF": "expandable_segments:False",
    "FI_PROVIDER": "efa",
    "FI_EFA_USE_DEVICE_RDMA": "1",
    "LD_LIBRARY_PATH": "/opt/amazon/efa/lib:/opt/nccl/lib",
    "CUDA_HOME": "/usr/local/cuda",
    "NCCL_IB_HCA": "mlx5",
    "OMP_NUM_THREADS": "3",
    "MY_SETTING": "1",
    "ANOTHER": "2",
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "torchrun", "slurm", "none"])
def test_every_launcher_hands_the_same_on(launcher: str, tmp_path: Path) -> None:
    environ = {"PATH": os.defpath, **OF_THE_USER, **SECRETS, "UNRELATED": "x"}
    environment = default_environment("cuda", 2, False, environ=environ, carried=["MY_*", "ANOTHER"])
    assert OF_THE_USER.items() <= environment.items()
    assert not {"UNRELATED", *SECRETS} & set(environment)
    files = travelling(environment, launcher, tmp_path)
    for name, value in environment.items():
        exported = f"export {name}={shlex.quote(value)}"
        assert exported in files["launch.sh"].splitlines()
        if launcher in ("pdsh", "openmpi"):
            assert f"{name}={value}" in files["environment"].splitlines()
        elif launcher == "torchrun":
            remote = shlex.split(files["launch.sh"].splitlines()[-1])[-1]
            assert f"{exported}; " in remote


def test_patterns_take_neither_secrets_nor_what_launchers_set() -> None:
    left_out = {**SECRETS, "LOCAL_RANK": "3", "SLURM_PROCID": "1", "DSTRAIN_HOSTS": "x", "MASTER_ADDR": "y"}
    left_out |= {"CUDA_VISIBLE_DEVICES": "1", "DS_ACCELERATOR": "cpu", "OMPI_COMM_WORLD_RANK": "2"}
    taken = {
        "TOKENIZERS_PARALLELISM": "false",
        "NCCL_IB_PKEY": "7",
        "KEYS": "",
        "MONKEY": "1",
        "PATIENCE": "2",
    }
    assert passed(left_out | taken, ["*"]) == {name: value for name, value in taken.items() if value}
    found = default_environment("cuda", 2, False, environ={"PATH": "/bin", **left_out}, carried=["*"])
    assert not set(SECRETS) & set(found) and found["DS_ACCELERATOR"] == "cuda" and "LOCAL_RANK" not in found


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        *((name, "looks like a secret") for name in SECRETS),
        *(
            (name, "looks like a secret")
            for name in ("GITHUBTOKEN", "MY_KEY_*", "db_password", "*_API_KEY", "MY_AUTH")
        ),
        *(
            (name, "set on each host or rank")
            for name in ("RANK", "LOCAL_WORLD_SIZE", "SLURM_*", "DS_ACCELERATOR")
        ),
        *((name, "not the name of") for name in ("", "A=1", "2A", "A B", "$X", "a-b", "[A]")),
    ],
)
def test_names_that_are_refused(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_patterns(["FINE", pattern])
    check_patterns(["FINE", "MY_*", "?X", "TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY"])


@pytest.mark.parametrize("single_host", [True, False])
def test_library_folders_mean_the_same_in_another_folder(
    single_host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is the current folder, whatever lies there."""
    monkeypatch.chdir(tmp_path)
    environ = {"PATH": "/bin", "LD_LIBRARY_PATH": ":/opt/lib:mine::/opt/lib"}
    found = default_environment("cpu", 1, single_host, environ=environ)
    assert found["LD_LIBRARY_PATH"] == f"/opt/lib:{tmp_path}/mine"
    assert "LD_LIBRARY_PATH" not in default_environment("cpu", 1, single_host, environ={"PATH": "/bin"})
    assert "LD_LIBRARY_PATH" not in default_environment(
        "cpu", 1, False, environ=environ | {"LD_LIBRARY_PATH": ":"}
    )


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_gpu_memory_grows_in_segments(name: str) -> None:
    bare = {"PATH": "/bin"}
    assert (
        default_environment("cuda", 2, True, environ=bare)["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    )
    assert "PYTORCH_ALLOC_CONF" not in default_environment("cpu", 2, True, environ=bare)
    own = default_environment("cuda", 2, True, environ=bare | {name: "backend:cudaMallocAsync"})
    assert {key: own[key] for key in own if key.endswith("ALLOC_CONF")} == {name: "backend:cudaMallocAsync"}


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_the_ranks_of_a_host_share_its_cores(accelerator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on GPUs, where torchrun would say 1, and srun nothing: each rank would take all."""
    monkeypatch.setattr(environment_module, "_cores", lambda: 96)
    for single_host in (True, False):
        for ranks, threads in ((8, "12"), (1, "96"), (128, "1")):
            found = default_environment(accelerator, ranks, single_host, environ={"PATH": "/bin"})
            assert found["OMP_NUM_THREADS"] == threads
    own = {"PATH": "/bin", "OMP_NUM_THREADS": "5"}
    assert default_environment(accelerator, 8, False, environ=own)["OMP_NUM_THREADS"] == "5"
