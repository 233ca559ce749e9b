"""Process 1 of a host: makes the host out of its namespaces, and ends it.

Run inside of them, with one argument, a JSON object (:func:`main`). The kernel ends whatever lives in a pid
namespace together with its first process, and this one lives as long as its standard input is open: whatever
ends the test, its hosts end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

SSH_PORT = 22


def main() -> None:
    """Make the host, say ``made``; once its cable is plugged in (a line of input), say ``ready``."""
    wish = json.loads(sys.argv[1])
    os.environ["PATH"] = wish["path"]
    socket.sethostname(wish["name"])
    make_disks(wish["binds"])
    print("made", flush=True)
    os.read(0, 100)
    join_network(wish["address"], wish["silent"])
    subprocess.Popen(
        [wish["sshd"], "-D", "-e", "-f", "/etc/ssh/sshd_config"],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr,
    )
    while not listening(SSH_PORT):
        time.sleep(0.005)
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, reap)
    while os.read(0, 1):
        pass


def make_disks(binds: list[tuple[str, str]]) -> None:
    """What a host has for itself: memory file systems, and ``binds``: (folder or file, where it appears)."""
    # Its own network interfaces appear in a sysfs of its own. A container may forbid that, and nothing breaks.
    own_sysfs = subprocess.run(["mount", "-t", "sysfs", "none", "/sys"], capture_output=True, check=False)
    if own_sysfs.returncode == 0:
        subprocess.run(["mount", "-t", "tmpfs", "none", "/sys/fs/cgroup"], capture_output=True, check=False)
    for folder in ("/run", "/dev/shm"):
        mount("-t", "tmpfs", "none", folder)
    for folder in ("/run/sshd", "/run/lock"):
        os.mkdir(folder, 0o755)
    for source, target in binds:
        mount("--bind", source, target)


def join_network(address: str, silent: str) -> None:
    """``silent`` is an address whose packets go to a network card that nobody has."""
    ip("link", "set", "lo", "up")
    if ":" in address:  # no other host can have it: there is nothing to wait for
        ip("address", "add", f"{address}/64", "dev", "eth0", "nodad")
    else:
        ip("address", "add", f"{address}/24", "dev", "eth0")
    ip("link", "set", "eth0", "up")
    ip("neighbour", "add", silent, "lladdr", "02:00:00:00:00:01", "dev", "eth0", "nud", "permanent")


def listening(port: int) -> bool:
    """Read, not tried: a connection that says nothing would be a line in sshd's log."""
    return all(
        any(words[1].endswith(f":{port:04X}") and words[3] == "0A" for words in map(str.split, lines))
        for lines in (Path(f"/proc/net/{table}").read_text().splitlines()[1:] for table in ("tcp", "tcp6"))
    )


def reap(number: int, frame: object) -> None:
    """Orphans become children of process 1, which has to collect them."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


if __name__ == "__main__":
    main()
