"""The hosts themselves: a test on them is worth as much as they are like real ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.cluster.hosts import NOWHERE, SILENT, Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.processes import in_namespace
from tests.support.cluster.waiting import wait_until

pytestmark = pytest.mark.timeout(120)

# Makes a cluster, tells the namespaces of its hosts, and waits to be killed.
MAKER = """
import json, sys, time
from pathlib import Path
from tests.support.cluster.hosts import Cluster
with Cluster(Path(sys.argv[1]), 2) as cluster:
    cluster.start("n1", ["sleep", "1000"])
    while not cluster.processes("n1"):
        time.sleep(0.01)
    print(json.dumps(cluster.namespaces()), flush=True)
    time.sleep(1000)
"""


def ssh(cluster: Cluster, source: str, target: str, command: str = "hostname", *options: str) -> str:
    """What the command says on ``target``, or what ssh says of its failure."""
    done = cluster.run(source, ["ssh", *options, "-o", "ConnectTimeout=2", target, command])
    return (done.out if done.code == 0 else done.err).strip()


def test_hosts_reach_one_another_by_name(cluster: Cluster) -> None:
    assert ssh(cluster, "n1", "n2") == "n2"
    assert ssh(cluster, "n3", "n1") == "n1"
    assert ssh(cluster, "n2", "n2") == "n2"
    assert cluster.run("n1", ["hostname", "-I"]).out.split()[0] == cluster.address("n1")
    assert ssh(cluster, "n1", cluster.address("n3")) == "n3"


def test_pdsh_runs_on_all_hosts(cluster: Cluster) -> None:
    said = cluster.run("n1", ["pdsh", "-R", "ssh", "-w", "n1,n2,n3", "hostname; exit 3"])
    assert sorted(said.out.split()) == ["n1", "n1:", "n2", "n2:", "n3", "n3:"]
    assert said.err.count("exited with exit code 3") == 3


def test_an_ssh_login_has_nothing_of_the_environment_that_it_came_from(cluster: Cluster) -> None:
    env = {**cluster.login_environment(), "SECRET": "1", "PYTHONPATH": "/x", "PATH": "/opt/x:/usr/bin:/bin"}
    done = cluster.run("n1", ["ssh", "n2", "env"], env=env)
    assert done.code == 0
    assert not {"SECRET", "PYTHONPATH"} & {line.partition("=")[0] for line in done.out.splitlines()}
    assert "/opt/x" not in done.out


def test_a_host_has_its_own_processes_memory_and_network(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.run("n1", ["sh", "-c", "echo 1 > /dev/shm/x; echo 1 > /run/x"]).code == 0
    assert cluster.run("n2", ["ls", "/dev/shm/x", "/run/x"]).code == 2
    sleeper = cluster.start("n1", ["sleep", "1001"])
    wait_until(lambda: bool(cluster.processes("n1")))
    assert "1001" not in cluster.run("n2", ["ps", "axo", "args"]).out
    assert "1001" in cluster.run("n1", ["ps", "axo", "args"]).out
    sleeper.kill()
    interfaces = cluster.run("n1", ["ls", "/sys/class/net"]).out.split()
    assert interfaces == ["eth0", "lo"]


def test_the_disk_is_shared_but_for_a_folder_of_each_host(cluster: Cluster, tmp_path: Path) -> None:
    cluster.run("n1", ["sh", "-c", f"echo shared > {tmp_path}/x; echo n1 > {cluster.local}/x"])
    assert (tmp_path / "x").read_text() == "shared\n"
    assert cluster.run("n2", ["cat", tmp_path / "x"]).out == "shared\n"
    assert cluster.run("n2", ["ls", cluster.local]).out == ""
    assert cluster.seen("n1", cluster.local / "x").read_text() == "n1\n"
    assert not (cluster.local / "x").exists()


def test_a_command_ends_as_its_user_sees_it(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.run("n1", ["sh", "-c", "pwd; echo $A >&2; exit 7"], env={"A": "b c"}, cwd=tmp_path)
    assert (done.code, done.out, done.err) == (7, f"{tmp_path}\n", "b c\n")
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        sleeper = cluster.start("n2", ["sleep", "1000"])
        sleeper.send_signal(number)
        assert sleeper.wait(10).code == -number
        assert cluster.processes("n2") == []
    with pytest.raises(TimeoutError, match=r"no end after 0\.3 s"):
        cluster.run("n2", ["sh", "-c", "echo so far; sleep 1000"], timeout=0.3)
    cluster.stop_all()
    assert cluster.processes("n2") == []


def test_a_command_leads_a_session_of_its_own(cluster: Cluster) -> None:
    done = cluster.run("n1", ["sh", "-c", "echo $$; ps -o sid= -o pgid= -p $$"])
    own, *ids = done.out.split()
    assert ids == [own, own]


def test_a_cut_cable_lets_nothing_through_until_it_is_healed(cluster: Cluster) -> None:
    # Says a number each tenth of a second over one connection, which outlives the pause.
    talk = "for i in $(seq 40); do echo $i; sleep 0.1; done"
    talker = cluster.start("n1", ["ssh", "n2", talk])
    wait_until(lambda: bool(talker.out))
    cluster.cut("n2")
    time.sleep(0.3)
    before = talker.out
    assert "Connection timed out" in ssh(cluster, "n1", "n2")
    assert ssh(cluster, "n1", "n3") == "n3"
    assert talker.running() and talker.out == before
    assert any("seq 40" in str(process) for process in cluster.processes("n2")), "n2 itself runs on"
    cluster.heal("n2")
    assert ssh(cluster, "n1", "n2", "hostname", "-o", "ConnectTimeout=10") == "n2"
    assert talker.wait(30).out.split() == [str(number) for number in range(1, 41)]


def test_a_crash_takes_all_and_tells_nobody(cluster: Cluster) -> None:
    alive = ["-o", "ServerAliveInterval=1", "-o", "ServerAliveCountMax=2"]
    deaf = cluster.start("n1", ["ssh", "n2", "sleep 1000"])
    keen = cluster.start("n1", ["ssh", *alive, "n2", "sleep 1000"])
    local = cluster.start("n2", ["sleep", "1000"])
    wait_until(lambda: len([p for p in cluster.processes("n2") if p.arguments == ("sleep", "1000")]) == 3)
    cluster.run("n2", ["sh", "-c", f"echo disk > {cluster.local}/kept; echo memory > /run/lost"])
    cluster.crash("n2")
    assert not cluster.up("n2") and cluster.processes("n2") == []
    assert local.wait(5).code == -signal.SIGKILL
    said = keen.wait(15)
    assert said.code == 255 and "not responding" in said.err
    assert deaf.running(), "a connection without keepalive learns nothing"
    with pytest.raises(ValueError, match="n2 is down"):
        cluster.run("n2", ["true"])

    cluster.revive("n2")
    assert ssh(cluster, "n1", "n2") == "n2"
    assert cluster.processes("n2") == []
    assert cluster.run("n2", ["cat", cluster.local / "kept"]).out == "disk\n"
    assert cluster.run("n2", ["cat", "/run/lost"]).code == 1


def test_hosts_that_are_not_there(cluster: Cluster) -> None:
    assert "No route to host" in ssh(cluster, "n1", NOWHERE, "true", "-o", "ConnectTimeout=20")
    assert "Connection timed out" in ssh(cluster, "n1", SILENT)
    assert "Could not resolve hostname" in ssh(cluster, "n1", "n9")


def test_hosts_with_what_goes_wrong(tmp_path: Path) -> None:
    require_cluster()
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "outside").touch()
    with Cluster(
        tmp_path / "cluster", 2, loopback_names=True, locked=["n2"], own_folders=[folder]
    ) as cluster:
        assert "Permission denied (publickey)" in ssh(cluster, "n1", "n2")
        assert ssh(cluster, "n2", "n1") == "n1"
        assert cluster.run("n1", ["getent", "ahostsv4", "n1"]).out.split()[0] == "127.0.1.1"
        assert cluster.run("n1", ["getent", "ahostsv4", "n2"]).out.split()[0] == cluster.address("n2")
        cluster.run("n1", ["touch", folder / "n1"])
        assert cluster.run("n2", ["ls", folder]).out == ""
        assert cluster.seen("n1", folder / "n1").exists()
    assert [path.name for path in folder.iterdir()] == ["outside"]


def test_two_clusters_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    with Cluster(tmp_path / "other", 2) as other:
        assert other.address("n2") == cluster.address("n2")
        cluster.crash("n2")
        other.run("n2", ["sh", "-c", f"echo other > {other.local}/x"])
        assert ssh(other, "n1", "n2", f"cat {other.local}/x") == "other"
        sleeper = other.start("n1", ["sleep", "1000"])
        cluster.stop_all()
        assert sleeper.running()
        cluster.revive("n2")
    assert ssh(cluster, "n1", "n2") == "n2"


def machine() -> dict[str, object]:
    """What a cluster must leave as it was."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    home = Path.home() / ".ssh"
    return {
        "host name": socket.gethostname(),
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "routes": Path("/proc/net/route").read_text(),
        "mounts": [one for one in mounts if one.startswith(("/etc", "/run", "/dev/shm", "/sys", str(home)))],
        "hosts": Path("/etc/hosts").read_text(),
        "etc": sorted((str(path), path.stat().st_mtime_ns) for path in Path("/etc/ssh").rglob("*")),
        "home": sorted(os.listdir(home)) if home.exists() else None,
    }


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    require_cluster()
    before = machine()
    with Cluster(tmp_path / "cluster", 2) as cluster:
        cluster.start("n1", ["ssh", "n2", "sleep 1000"])
        wait_until(lambda: len(cluster.processes("n2")) > 1)
        namespaces = cluster.namespaces()
        assert all(map(in_namespace, namespaces))
    assert not any(map(in_namespace, namespaces))
    assert list(tmp_path.iterdir()) == []
    assert machine() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_hosts_end_with_the_process_that_made_them(
    number: signal.Signals, tmp_path: Path, repository: Path
) -> None:
    require_cluster()
    before = machine()
    command = [sys.executable, "-c", MAKER, str(tmp_path / "cluster")]
    env = {**os.environ, "PYTHONPATH": str(repository)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as maker:
        assert maker.stdout is not None
        namespaces = json.loads(maker.stdout.readline())
        assert len(namespaces) == 2 and all(map(in_namespace, namespaces))
        maker.send_signal(number)
    wait_until(lambda: not any(map(in_namespace, namespaces)))
    assert machine() == before
