"""Runs on hosts whose network has no IPv4, and on one that has no IPv4 at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.runs.run_folder import RunFolder
from tests.support.cluster.commands import TWO_STAGES, dstrain_argv
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.runs import lay_out, numbers
from tests.support.cluster.watching import Watch

pytestmark = pytest.mark.timeout(400)

STEPS = 4
ARGUMENTS = [
    *TWO_STAGES,
    *("--steps", str(STEPS), "--set", "sample_tokens=0"),
]


class Site:
    """Where the runs lie, and the hosts that they run on."""

    def __init__(self, cluster: Cluster, environment: dict[str, str], place: Path) -> None:
        self.cluster, self._environment, self.place = cluster, environment, place

    def run(self, name: str, *arguments: str) -> RunFolder:
        """`dstrain run` on n1, to its good end."""
        argv = dstrain_argv(*ARGUMENTS, "--name", name, *arguments)
        folder = RunFolder(self.place / "runs" / name)
        said = self.cluster.start("n1", argv, env=self._environment, cwd=self.place).wait(300)
        logs = "".join(path.read_text(errors="replace")[-3000:] for path in folder.logs.glob("*.log"))
        assert said.code == 0, f"{said}\n{logs}"
        return folder


@pytest.fixture(scope="module")
def site(
    environment: dict[str, str], materials: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    require_cluster()
    place = tmp_path_factory.mktemp("site")
    lay_out(materials, place)
    (place / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    with Cluster(tmp_path_factory.mktemp("ipv6") / "cluster", 2, ipv6=True) as cluster:
        yield Site(cluster, environment, place)


def test_the_hosts_have_no_ipv4(site: Site) -> None:
    for host in site.cluster.names:
        addresses = site.cluster.run(host, ["ip", "-4", "-brief", "address"]).out.split()
        assert [word for word in addresses if "." in word] == ["127.0.0.1/8"]
    assert site.cluster.run("n1", ["ssh", "n2", "hostname"]).out == "n2\n"


@pytest.mark.heavy
@pytest.mark.parametrize("launcher", ["pdsh", "torchrun", "openmpi"])
def test_two_hosts(site: Site, launcher: str) -> None:
    if launcher == "openmpi":
        require_cluster(openmpi=True)
    site.run(launcher, "--hostfile", "hosts", "--launcher", launcher)
    address = site.cluster.address("n1")
    site.run(f"{launcher}-address", "--hostfile", "hosts", "--launcher", launcher, "--master-addr", address)
    runs = [RunFolder(site.place / "runs" / name) for name in (launcher, f"{launcher}-address")]
    assert [status.host for status in map(runs[0].read_status, (0, 1)) if status is not None] == ["n1", "n2"]
    assert len(numbers(runs[0])) == STEPS + 1 and numbers(runs[0]) == numbers(runs[1])


def test_one_host_without_any_ipv4(site: Site) -> None:
    loopback = ["127.0.0.1/8", "dev", "lo"]
    site.cluster.run("n1", ["ip", "address", "delete", *loopback])
    try:
        with Watch(site.cluster) as watch:
            folder = site.run("alone")
    finally:
        site.cluster.run("n1", ["ip", "address", "add", *loopback])
    assert len(numbers(folder)) == STEPS + 1
    assert {listener.address for listener in watch.listeners.values()} == {"::1"}
