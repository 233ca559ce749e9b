"""What several hosts on one machine need of it; where that is missing, the tests say so loudly."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

import pytest

# A tool, and the Debian package that it comes from.
HOSTS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "mount",
    "setsid": "util-linux",
    "env": "coreutils",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "ps": "procps",
    "hostname": "hostname",
}
SLURM = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
}
OPENMPI = {"mpirun": "openmpi-bin", "ompi_info": "openmpi-bin"}

# All that a host is made of, tried on a pair of cables that nobody will use.
_TRIAL = """
ip link add trial type bridge && ip link add one type veth peer name two &&
mount -t tmpfs none /run && mount -t tmpfs none /dev/shm && hostname trial
"""


def require_cluster(*, slurm: bool = False, openmpi: bool = False) -> None:
    """Skip the test where this machine can't make hosts, and tell what would help.

    Args:
        slurm: whether Slurm's daemons are needed as well.
        openmpi: whether Open MPI is.
    """
    wanted = HOSTS | (SLURM if slurm else {}) | (OPENMPI if openmpi else {})
    reason = _missing(tuple(wanted.items())) or _refused()
    if reason:
        pytest.skip(reason)


def tool(name: str) -> str:
    """The path of a tool. Those for root lie where a user's PATH does not look."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"{name}: not installed")
    return found


@functools.cache
def _missing(wanted: tuple[tuple[str, str], ...]) -> str | None:
    absent = {}
    for name, package in wanted:
        try:
            tool(name)
        except FileNotFoundError:
            absent[name] = package
    if not absent:
        return None
    packages = " ".join(sorted(set(absent.values())))
    return f"{', '.join(absent)} not found (Debian: apt-get install --no-install-recommends {packages})"


@functools.cache
def _refused() -> str | None:
    """Why the kernel, or what this runs in, does not let us make namespaces; None if it does."""
    namespaces = ["--net", "--pid", "--uts", "--ipc", "--mount", "--fork", "--mount-proc"]
    path = {"PATH": f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"}
    command = [tool("unshare"), *namespaces, "sh", "-c", _TRIAL]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, env=path)
    if tried.returncode == 0:
        return None
    said = " ".join(tried.stderr.split()) or f"exit code {tried.returncode}"
    if os.getuid() != 0:
        help_ = (
            "be root, or have a user namespace: apt-get install uidmap, then "
            "`unshare --map-root-user --map-auto make test`"
        )
    else:
        help_ = "a container needs CAP_SYS_ADMIN and CAP_NET_ADMIN: docker run --privileged"
    return f"namespaces are not to be had here ({said}); {help_}"
