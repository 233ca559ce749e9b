"""Several real hosts on one machine, made of Linux namespaces: for tests of what happens between hosts.

Each host has its own network, process numbers, host name, /run, /dev/shm, /etc/hosts and sshd (login by key, as
the user of the test). Their network cards meet in a bridge that lives in a network namespace of its own, so
nothing of this machine's network is touched, and clusters stand side by side. The disk is shared by all, as
with NFS, but for :attr:`Cluster.local` and what ``own_folders`` names. Nothing outside of the cluster's folder is
written to. What is not made here: slow and lossy cables, clocks that differ, memory and processors of their own.

    with Cluster(tmp_path / "cluster", 2) as cluster:
        assert cluster.run("n1", ["ssh", "n2", "hostname"]).out == "n2\\n"
        cluster.crash("n2")
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.support.cluster.commands import Command, Result
from tests.support.cluster.etc import make_key, write_etc
from tests.support.cluster.host import SYSTEM_PATH, Host
from tests.support.cluster.needs import tool
from tests.support.cluster.processes import Process, end_all, in_namespace, send

NOWHERE = "nowhere"
"""A host name behind which there is nothing: `No route to host` after 3 s."""
SILENT = "silent"
"""A host name that never answers, as behind a firewall that drops what it does not like."""

_NET, _NET_6 = "10.77.0.", "fd77::"
_MOST = 64
_BEYOND = {NOWHERE: 250, SILENT: 251}


class Cluster:
    """Hosts ``n1``, ``n2``, ... that run from ``with`` on, until its end or that of this process.

    Args:
        folder: made and removed by the cluster.
        hosts: how many, up to 64.
        loopback_names: each host's /etc/hosts calls the host itself 127.0.1.1, as Debian's installer does.
        locked: hosts that accept nobody's key: `Permission denied (publickey)`.
        ipv6: their network has no IPv4, which is left to their loopback interfaces.
        own_folders: folders (existing ones) that each host has for itself, empty at first: no shared disk
            there. They outlive a crash; :meth:`seen` tells where the test finds them.
    """

    def __init__(
        self,
        folder: Path,
        hosts: int,
        *,
        loopback_names: bool = False,
        locked: Iterable[str] = (),
        ipv6: bool = False,
        own_folders: Iterable[Path] = (),
    ) -> None:
        if not 1 <= hosts <= _MOST:
            raise ValueError(f"{hosts} hosts; from 1 to {_MOST} there can be")
        self.folder = folder
        self.names = tuple(f"n{number}" for number in range(1, hosts + 1))
        self.shared = folder / "shared"
        self.local = folder / "local"
        self._own_folders = [self.local, *own_folders]
        self._net = _NET_6 if ipv6 else _NET
        self._loopback_names, self._locked = loopback_names, frozenset(locked)
        self._up: dict[str, Host] = {}
        self._switch: subprocess.Popen[bytes] | None = None
        self._commands = 0

    def __enter__(self) -> Cluster:
        self.folder.mkdir(mode=0o755)
        for folder in (self.shared, self.local):
            folder.mkdir()
        try:
            make_key(self.folder / "id")
            # It ends when our end of the pipe is closed, and with it the bridge.
            self._switch = subprocess.Popen(
                [tool("unshare"), "--net", "cat"],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
            while not _other_network(self._switch_pid):
                time.sleep(0.002)
            self._on_switch("link add br0 type bridge", "link set br0 up")
            self._power_on(self.names)
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def down(self) -> None:
        """End everything, and remove the folder."""
        for name in list(self._up):
            self._power_off(name)
        if self._switch is not None and self._switch.stdin is not None:
            self._switch.stdin.close()
            self._switch.wait(10)
            self._switch = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def address(self, host: str) -> str:
        return f"{self._net}{_BEYOND.get(host) or 10 + self.names.index(host) + 1}"

    def login_environment(self) -> dict[str, str]:
        """What a user's commands find after a login, and nothing that the test run was started with."""
        user = pwd.getpwuid(os.getuid())
        return {
            "HOME": user.pw_dir,
            "USER": user.pw_name,
            "LOGNAME": user.pw_name,
            "SHELL": user.pw_shell or "/bin/sh",
            "PATH": SYSTEM_PATH,
            "LANG": "C.UTF-8",
        }

    def start(
        self,
        host: str,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Command:
        """Start a command on a host. ``env`` is all of its environment; :meth:`login_environment` by default.

        It ends with the host at the latest.
        """
        self._commands += 1
        return Command(
            host,
            self._host(host).first_process,
            [os.fspath(word) for word in argv],
            self.login_environment() if env is None else env,
            self.shared if cwd is None else cwd,
            self.folder / f"command-{self._commands}",
        )

    def run(
        self,
        host: str,
        argv: Sequence[str | os.PathLike[str]],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        timeout: float = 60,
    ) -> Result:
        """Run a command on a host to its end. Raises TimeoutError as :meth:`Command.wait` does."""
        return self.start(host, argv, env=env, cwd=cwd).wait(timeout)

    def cut(self, host: str) -> None:
        """Pull the cable: nothing comes in or out, and nobody is told."""
        self._on_switch(f"link set {host} down")

    def heal(self, host: str) -> None:
        """Plug the cable in again."""
        self._on_switch(f"link set {host} up")

    def crash(self, host: str) -> None:
        """The host loses its power. The cable goes first: no connection is closed in order."""
        self._host(host)
        self.cut(host)
        self._power_off(host, crash=True)

    def revive(self, host: str) -> None:
        """ModuleStub a crashed host on. Its disk is as it was; /run and /dev/shm are new."""
        if host in self._up:
            raise ValueError(f"{host} is up")
        self._power_on([host])

    def up(self, host: str) -> bool:
        return host in self._up

    def processes(self, host: str) -> list[Process]:
        """What runs on a host, but for what belongs to it (:meth:`adopt`); nothing where it is down."""
        if host not in self._up:
            return []
        one = self._up[host]
        return [process for process in in_namespace(one.namespace) if process.outside not in one.furniture]

    def namespaces(self) -> list[str]:
        """Of the hosts that are up, the names of their pid namespaces: they can be looked into after the end."""
        return [host.namespace for host in self._up.values()]

    def namespace(self, host: str) -> str:
        """The name of a host's pid namespace."""
        return self._host(host).namespace

    def first_process(self, host: str) -> int:
        """The number on this machine of the process whose network is the host's."""
        return self._host(host).first_process

    def adopt(self, host: str) -> None:
        """What runs there now belongs to the host, as its sshd does: it is no longer counted, nor ended."""
        self._host(host).adopt()

    def reset(self, host: str) -> None:
        """End what runs on a host, adopted or not; what is left is what a start has brought."""
        one = self._host(host)
        end_all(one.namespace, one.first_furniture)
        one.furniture = one.first_furniture

    def kill(self, host: str, process: Process, number: signal.Signals = signal.SIGKILL) -> bool:
        """Signal one of a host's processes; False where it has ended already."""
        return send(process.outside, number, name=self._host(host).namespace)

    def stop_all(self) -> None:
        """SIGKILL what runs on the hosts, and wait until it is gone."""
        for one in self._up.values():
            end_all(one.namespace, one.furniture)

    def restore(self) -> None:
        """As after the start: every host up and in the network, nothing runs. Disks keep what they hold."""
        self.stop_all()
        self._power_on([name for name in self.names if name not in self._up])
        for name in self.names:
            self.heal(name)

    def seen(self, host: str, path: Path) -> Path:
        """Where the test finds what this host has at ``path``."""
        for number, own in enumerate(self._own_folders):
            if path == own or own in path.parents:
                return self.folder / "disks" / host / str(number) / path.relative_to(own)
        return path

    def _host(self, name: str) -> Host:
        if name not in self._up:
            raise ValueError(f"{name} is " + ("down" if name in self.names else "no host of this cluster"))
        return self._up[name]

    def _power_on(self, names: Sequence[str]) -> None:
        """Start hosts, all at the same time."""
        if not names:
            return
        for name in names:
            self._up[name] = self._start(name)
        cables = []
        for name in names:
            host = self._up[name]
            host.identify()
            # A network card keeps its number over a crash: the others have noted it for a minute.
            card = f"02:00:00:00:01:{self.names.index(name) + 1:02x}"
            cables += [
                f"link add {name} type veth peer name eth0 address {card} netns {host.first_process}",
                f"link set {name} master br0 up",
            ]
        self._on_switch(*cables)
        for name in names:
            self._up[name].plugged_in()
        for name in names:
            self._up[name].wait_until_ready()

    def _start(self, name: str) -> Host:
        wish = {
            "name": name,
            "address": self.address(name),
            "silent": self.address(SILENT),
            "binds": [(str(source), str(target)) for source, target in self._binds(name)],
            "sshd": tool("sshd"),
            "path": SYSTEM_PATH,
        }
        return Host(name, wish, self.folder / f"{name}.log")

    def _binds(self, name: str) -> list[tuple[Path, Path]]:
        """What this host has for itself on its disk, and where: (what, where)."""
        addresses = {other: self.address(other) for other in (*self.names, *_BEYOND)}
        if self._loopback_names:
            addresses[name] = "127.0.1.1"
        key = None if name in self._locked else (self.folder / "id.pub").read_text()
        binds = write_etc(self.folder / "etc" / name, addresses, self.folder / "id", accepted=key)
        for number, own in enumerate(self._own_folders):
            disk = self.folder / "disks" / name / str(number)
            disk.mkdir(parents=True, exist_ok=True)
            binds += [(disk, own)]
        return binds

    def _power_off(self, name: str, *, crash: bool = False) -> None:
        host = self._up.pop(name)
        if crash and host.namespace:
            send(host.first_process, signal.SIGKILL, name=host.namespace)
        host.end()
        if self._switch is not None and crash:
            # The kernel takes the cable away some time after the host's network; a new one needs the name now.
            self._on_switch(f"link delete {name}", force=True)

    @property
    def _switch_pid(self) -> int:
        if self._switch is None:
            raise ValueError("the cluster is down")
        return self._switch.pid

    def _on_switch(self, *lines: str, force: bool = False) -> None:
        """Run lines of ip(8) where the cables meet. ``force``: one that fails is passed over."""
        enter = [tool("nsenter"), "--target", str(self._switch_pid), "--net"]
        ip = [tool("ip"), *(["-force"] if force else []), "-batch", "-"]
        done = subprocess.run(
            [*enter, *ip], input="\n".join(lines), capture_output=True, text=True, check=False
        )
        if done.returncode and not force:
            raise RuntimeError(f"ip {lines}: {done.stderr.strip()}")


def _other_network(pid: int) -> bool:
    """Whether it has left ours. Raises FileNotFoundError where it has ended instead."""
    return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
