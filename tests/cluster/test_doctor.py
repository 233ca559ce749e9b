"""`dstrain doctor` and what `dstrain run` looks at first, on hosts of which something is wrong.

One cluster is as Debian installs machines (each calls itself 127.0.1.1): everything works there. In the other one each
host has a fault of its own, and one command names them all.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.support.arguments import layered
from tests.support.cluster.commands import Result, dstrain_argv
from tests.support.cluster.hosts import NOWHERE, SILENT, Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.runs import lay_out
from tests.support.cluster.waiting import wait_until

pytestmark = pytest.mark.timeout(300)

RUN = [
    *("run", "--hostfile", "hosts", "--name", "far", "--model", "model", "--data", "text.jsonl"),
    *("--data-parallel", "2", "--seq-len", "32", "--global-batch", "2", "--micro-batch", "1", "--steps", "2"),
    *("--set", "validation=0.2", "--set", "sample_tokens=0"),
]
SECRETS = {
    name: f"secret-of-{name.lower()}"
    for name in (
        *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"),
        # DeepSpeed would write these into pdsh's command line.
        *("MLFLOW_TRACKING_TOKEN", "PYTHON_KEYRING_PASSWORD", "UCXSECRET", "MV2_SECRET"),
    )
}
# What another launcher has left in the shell.
LEFT_BEHIND = {
    "RANK": "7",
    "WORLD_SIZE": "9",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "203.0.113.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "old",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "DS_ENV_FILE": "/etc/passwd",
    "PDSH_RCMD_TYPE": "rsh",
}


def settle(cluster: Cluster, materials: Path, hosts: list[str]) -> None:
    lay_out(materials, cluster.shared)
    (cluster.shared / "hosts").write_text("".join(f"{host} slots=1\n" for host in hosts))


@pytest.fixture(scope="module")
def debian(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], materials: Path
) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("debian") / "cluster", 2, loopback_names=True) as cluster:
        settle(cluster, materials, ["n1", "n2"])
        yield cluster


def test_two_hosts_that_are_well(debian: Cluster, environment: dict[str, str]) -> None:
    argv = dstrain_argv("doctor", "--hostfile", "hosts", "--json")
    said = debian.run("n1", argv, env=environment, timeout=200)
    assert said.code == 0, said
    found = json.loads(said.out)
    assert found["ok"] is True
    for host, other in (("n1", "n2"), ("n2", "n1")):
        checks = {check["check"]: check for check in found["checks"] if check["host"] == host}
        assert list(checks) == [
            *("ssh", "python", "dstrain", "torch", "deepspeed", "transformers", "driver", "devices"),
            *("memory", "disk", "own name", "run folder", "clock", "ports", "all-reduce", "send"),
        ]
        not_ok = {name for name, check in checks.items() if check["status"] != "ok"}
        assert not_ok - {"memory", "disk", "send"} == {"own name"}, "how full or busy this machine is varies"
        assert f"{host} resolves to 127.0.1.1 on itself" in checks["own name"]["message"]
        assert "/etc/hosts" in checks["own name"]["fix"]
        assert "is shared" in checks["run folder"]["message"]
        assert "(gloo, eth0)" in checks["all-reduce"]["message"]
        assert f"with {other}" in checks["send"]["message"]
        for name in ("all-reduce", "send"):
            assert float(checks[name]["message"].split()[0]) > 0
    wait_until(lambda: not any(map(debian.processes, debian.names)), 5, what="the end of what doctor started")
    assert not list(debian.shared.glob(".dstrain*"))


def command_lines() -> set[str]:
    """Those of all processes of this machine, and so of all hosts on it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            found.add((process / "cmdline").read_bytes().decode(errors="replace"))
        except OSError:
            continue  # it has ended
    return found


def environments(cluster: Cluster, host: str) -> set[str]:
    found = set()
    for process in cluster.processes(host):
        try:
            found.add(Path(f"/proc/{process.outside}/environ").read_bytes().decode(errors="replace"))
        except OSError:
            continue
    return found


def test_a_run_without_the_users_secrets_between_hosts_that_call_themselves_127_0_1_1(
    debian: Cluster, environment: dict[str, str]
) -> None:
    env = {**environment, **SECRETS, **LEFT_BEHIND}
    # Another project's: DeepSpeed would die of the second line, and the first would comment out the remote command.
    (debian.shared / ".deepspeed_env").write_text("# a=b\n\n")
    command = debian.start("n1", dstrain_argv(*RUN), env=env)
    seen: set[str] = set()
    elsewhere: set[str] = set()
    deadline = time.monotonic() + 200
    while command.running() and time.monotonic() < deadline:
        seen |= command_lines()
        elsewhere |= environments(debian, "n2")
        time.sleep(0.2)
    said = command.wait(10)
    folder = RunFolder(debian.shared / "runs" / "far")
    assert said.code == 0, f"{said}\n{folder.launcher_log.read_text()}"
    assert [folder.read_status(rank).host for rank in range(2)] == ["n1", "n2"]  # type: ignore[union-attr]
    # What must hold for the search to mean anything: it saw the launcher, the ssh to n2, and n2's rank.
    assert any("deepspeed.launcher.runner" in line for line in seen)
    assert any("dstrain.train.worker" in line and "ssh" in line for line in seen)
    assert any("DSTRAIN_CONTROL" in text for text in elsewhere)
    written = [path.read_bytes() for path in folder.path.rglob("*") if path.is_file()]
    assert any(b"DS_ACCELERATOR" in text for text in written)
    for name, secret in SECRETS.items():
        assert not [line for line in seen if secret in line], name
        assert not [text for text in written if secret.encode() in text], name
        assert not [text for text in elsewhere if secret in text], name


@pytest.fixture(scope="module")
def faulty(
    tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], materials: Path
) -> Iterator[Cluster]:
    """n1 is well. n2 lets nobody in, n3 has another torch, n4 no python, n5 a key that nobody knows; n6 thinks that
    n1 is elsewhere. ``own`` is on no shared disk, and stands in everybody's PYTHONPATH."""
    require_cluster()
    own = tmp_path_factory.mktemp("own")
    names = [f"n{number}" for number in range(1, 7)]
    with Cluster(
        tmp_path_factory.mktemp("faulty") / "cluster", 6, locked=["n2"], own_folders=[own]
    ) as cluster:
        settle(cluster, materials, [*names, NOWHERE, SILENT, "n9"])
        venv = cluster.seen("n1", own) / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
        for host in names[1:]:
            if host != "n4":
                shutil.copytree(venv, cluster.seen(host, own) / "venv", symlinks=True)
        other = cluster.seen("n3", own) / "lib" / "torch-1.0.dist-info"
        other.mkdir(parents=True)
        (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
        etc = cluster.folder / "etc"
        known = etc / "n1" / "ssh" / "ssh_known_hosts"
        known.write_text("!n5," + known.read_text())
        addresses = etc / "n6" / "hosts"
        silent = next(line.split()[0] for line in addresses.read_text().splitlines() if SILENT in line)
        addresses.write_text(addresses.read_text().replace(f"{cluster.address('n1')} n1", f"{silent} n1"))
        (cluster.shared / "own").symlink_to(own)
        yield cluster


@pytest.fixture(scope="module")
def refused(faulty: Cluster, environment: dict[str, str]) -> Result:
    """`dstrain run` there, with the python of n1's own disk."""
    own = os.readlink(faulty.shared / "own")
    libraries = [f"{own}/lib", environment["PYTHONPATH"], *(path for path in sys.path if "packages" in path)]
    argv = [f"{own}/venv/bin/python", "-m", "dstrain.cli.main", *layered([*RUN, "--data-parallel", "9"])]
    argv[argv.index("--global-batch") + 1] = "9"
    return faulty.run("n1", argv, env={**environment, "PYTHONPATH": os.pathsep.join(libraries)}, timeout=200)


@pytest.mark.parametrize(
    ("host", "message", "fix"),
    [
        ("n2", "Permission denied (publickey)", "ssh-copy-id n2"),
        ("n3", "torch: 1.0, and 2.", "install the same version on all hosts"),
        ("n4", "there is no python at ", "virtual environment at the same path on n4"),
        ("n5", "does not know the key of n5", "ssh n5 once manually"),
        ("n6", "can't connect to n1 at TCP port", "between n6 and n1"),
        (NOWHERE, "No route to host", "is running and on the network"),
        (SILENT, "Connection timed out", "is running and on the network"),
        ("n9", "Could not resolve hostname", "correct the name n9"),
    ],
)
def test_a_run_names_each_hosts_fault_and_its_remedy(
    refused: Result, faulty: Cluster, host: str, message: str, fix: str
) -> None:
    lines = refused.err.splitlines()
    [told] = [number for number, line in enumerate(lines) if line.startswith(f"  {host}: ")]
    assert message in lines[told], refused
    assert lines[told + 1].strip().startswith("fix: ") and fix in lines[told + 1]


def test_a_refused_run_has_started_nothing(refused: Result, faulty: Cluster) -> None:
    assert refused.code == 2
    assert refused.err.startswith("error: hosts:2: 8 of 9 hosts can't take part in this run\n"), refused
    assert not (faulty.shared / "runs").exists()
    wait_until(lambda: not any(map(faulty.processes, faulty.names)), 5, what="the end of all processes")


def test_doctor_tells_the_same_and_goes_on_with_those_that_answer(
    faulty: Cluster, environment: dict[str, str]
) -> None:
    (faulty.shared / "few").write_text("n1 slots=1\nn2 slots=1\nn3 slots=1\n")
    argv = dstrain_argv("doctor", "--hostfile", "few", "--runs-dir", "own")
    said = faulty.run("n1", argv, env=environment, timeout=200)
    assert said.code == 1, said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.out.splitlines() if "│" in line]
    told: dict[tuple[str, str], Any] = {
        (row[0], host): row[2:] for row in rows for host in row[1].split(", ")
    }
    status, message, _ = told["ssh", "n2"]
    assert (status, "Permission denied" in message) == ("failed", True)
    assert told["run folder", "n3"][0] == "warning", "nothing is shared there"
    assert told["all-reduce", "n1"][0] == told["send", "n3"][0] == "ok"
