"""The key of the control connection on hosts that are reached over ssh: where it lies, who can read it, how it goes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.runs.control_key import find_key
from dstrain.runs.run_folder import RunFolder
from tests.support.cluster.commands import Command
from tests.support.cluster.hosts import Cluster
from tests.support.cluster.needs import require_cluster
from tests.support.cluster.plain_path import plain_python, plain_root
from tests.support.cluster.waiting import wait_until
from tests.support.cluster.watching import Watch

KEY = bytes(range(32))
# Holds the key until a file `end` appears beside the run folder.
LAUNCH = """
import sys, time
from pathlib import Path
from dstrain.errors import DstrainError
from dstrain.launch.key_delivery import delivered
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.planning.layout import Host
folder, launcher, *names = sys.argv[1:]
hosts = tuple(Host(name, 1) for name in names)
spec = LaunchSpec(Path(folder), hosts, 1, "cpu", names[0], 29500, {}, launcher)
try:
    with delivered(bytes(range(32)), spec) as variables:
        print("delivered", *variables, flush=True)
        while not Path(folder, "..", "end").exists():
            time.sleep(0.01)
except DstrainError as error:
    sys.exit(str(error))
"""


class Launch:
    """A launch on n1 with a run folder at ``path``, on a disk of each host's own or on the shared one."""

    def __init__(self, cluster: Cluster, path: Path) -> None:
        self.cluster, self.path = cluster, path
        self.file = RunFolder(path).control_key

    def start(self, *hosts: str, launcher: str = "pdsh") -> Command:
        self.seen("n1").parent.mkdir(parents=True, exist_ok=True)
        environment = {**self.cluster.login_environment(), "PYTHONPATH": str(plain_root())}
        argv = [plain_python(), "-c", LAUNCH, str(self.path), launcher, *hosts]
        command = self.cluster.start("n1", argv, env=environment)
        wait_until(lambda: "delivered" in command.out or not command.running(), 60, what="the delivery")
        return command

    def seen(self, host: str) -> Path:
        return self.cluster.seen(host, self.file)

    def end(self, command: Command) -> None:
        self.cluster.run("n1", ["touch", str(self.path.parent / "end")])
        said = command.wait(30)
        assert said.code == 0, said


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three hosts, of which the last lets nobody in."""
    require_cluster()
    with Cluster(tmp_path_factory.mktemp("apart") / "cluster", 3, locked=["n3"]) as cluster:
        yield cluster


@pytest.fixture(params=["a shared disk", "disks of their own"])
def launch(apart: Cluster, request: pytest.FixtureRequest) -> Iterator[Launch]:
    shared = request.param == "a shared disk"
    place = (apart.shared if shared else apart.local) / "with 'quotes' $HOME"
    yield Launch(apart, place / "run")
    apart.stop_all()
    for host in apart.names:
        apart.run(host, ["rm", "-rf", str(place)])


def test_each_host_has_it_in_a_private_file_for_the_time_of_the_launch(launch: Launch) -> None:
    with Watch(launch.cluster) as watch:
        command = launch.start("n1", "n2")
        assert command.out.split() == ["delivered"], f"nothing for the environment\n{command.err}"
        for host in ("n1", "n2"):
            assert find_key({}, launch.seen(host)) == KEY
            assert [path.name for path in launch.seen(host).parent.iterdir()] == [launch.file.name]
        launch.end(command)
    for host in ("n1", "n2"):
        assert list(launch.seen(host).parent.iterdir()) == []
    assert any(b"mktemp" in line for line in watch.command_lines), "nothing was watched"
    assert not watch.seen(KEY.hex())


def test_what_lies_at_its_place_is_replaced_and_not_written_through(launch: Launch) -> None:
    """A link to another file, or to a folder, and what a killed launch has left there, which others may read."""
    for number, host in enumerate(("n1", "n2")):
        folder = launch.seen(host).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "victim").write_text("as it was")
        (folder / "folder").mkdir(exist_ok=True)
        launch.seen(host).unlink(missing_ok=True)
        launch.seen(host).symlink_to("folder" if number else "victim")
    command = launch.start("n1", "n2")
    for host in ("n1", "n2"):
        assert find_key({}, launch.seen(host)) == KEY
        assert (launch.seen(host).parent / "victim").read_text() == "as it was"
        assert list((launch.seen(host).parent / "folder").iterdir()) == []
    launch.end(command)


@pytest.mark.parametrize("launcher", ["slurm", "none"])
def test_it_is_in_the_environment_where_that_is_private(launch: Launch, launcher: str) -> None:
    command = launch.start("n1", "n2", launcher=launcher)
    assert command.out.split() == ["delivered", "DSTRAIN_CONTROL_KEY"]
    assert not launch.seen("n1").exists() and not launch.seen("n2").exists()
    launch.end(command)


def test_a_host_that_does_not_take_it_is_named(launch: Launch) -> None:
    said = launch.start("n1", "n3").wait(30)
    assert said.code == 1 and "can't be written on n3: " in said.err and "Permission denied" in said.err
    assert not launch.seen("n1").exists(), "and taken away again"

    launch.cluster.run("n2", ["mkdir", "-p", str(launch.file / "a folder")])
    said = launch.start("n1", "n2").wait(30)
    assert said.code == 1 and "can't be written" in said.err, said


def test_a_lost_host_delays_the_end_by_three_seconds_at_most(launch: Launch) -> None:
    command = launch.start("n1", "n2")
    launch.cluster.cut("n2")
    try:
        launch.cluster.run("n1", ["touch", str(launch.path.parent / "end")])
        assert command.wait(8).code == 0
        assert not launch.seen("n1").exists()
    finally:
        launch.cluster.heal("n2")
