"""Checks which hosts answer over ssh, with a fix for each that does not."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dstrain.launch.hosts import is_this_host
from dstrain.planning.layout import Host

CONNECT_SECONDS = 6
NOT_INSTALLED = "ssh is not installed here"
_SSH_FAILED = 255
_NOT_FOUND, _NOT_EXECUTABLE = 127, 126


@dataclass(frozen=True)
class Trouble:
    """Why a host did not do what it was asked to, and how to fix it."""

    message: str
    fix: str


def ssh_command(host: str, line: str) -> list[str]:
    """The argv that has ``host``'s shell run ``line``, and never asks anything.

    What decides about unknown host keys is the user's own ssh configuration, as it is when the ranks are started.
    """
    # A host that is lost while it is asked is noticed after 15 s.
    options = ["BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", "LogLevel=ERROR"]
    options += ["ServerAliveInterval=5", "ServerAliveCountMax=3"]
    return ["ssh", "-T", *(f"-o{option}" for option in options), "--", host, line]


def silent_hosts(hosts: Sequence[Host]) -> dict[str, str]:
    """What ssh says of each host that does not answer within 6 seconds or refuses; asked all at once."""
    others = [host.name for host in hosts if not is_this_host(host.name)]
    with ThreadPoolExecutor(max_workers=max(1, min(64, len(others)))) as pool:
        said = pool.map(_why_silent, others)
    return {name: why for name, why in zip(others, said, strict=True) if why is not None}


def run_on_hosts(lines: Mapping[str, str], *, seconds: float, given: str | None = None) -> dict[str, str]:
    """Have the shell of each host run its line, on all at once.

    Args:
        lines: by the host's name.
        seconds: for all together; what has not ended by then is left to itself there.
        given: to each as its standard input, which stands in no command line.

    Returns:
        By host, why its line failed; nothing for those where it ended with 0.
    """
    started: dict[str, subprocess.Popen[str]] = {}
    failed: dict[str, str] = {}
    for host, line in lines.items():
        try:
            started[host] = subprocess.Popen(
                ssh_command(host, line),
                stdin=subprocess.DEVNULL if given is None else subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except FileNotFoundError:
            failed[host] = NOT_INSTALLED
    deadline = time.monotonic() + seconds
    try:
        for host, process in started.items():
            try:
                _, errors = process.communicate(given, timeout=max(0.01, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                failed[host] = f"no end within {seconds:.0f} s"
                continue
            if process.returncode:
                failed[host] = _last_line(errors, process.returncode)
    finally:
        for process in started.values():
            with process:  # closes its pipes, and waits
                process.kill()
    return failed


def trouble(host: str, code: int, errors: str, python: str) -> Trouble:
    """What an ssh that ended with ``code`` and said ``errors`` means; ``python`` is what it had to start there."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else f"it ended with exit code {code} and no output"
    if code == _SSH_FAILED:
        return _ssh_trouble(host, last, errors)
    if "No module named" in last and "dstrain" in last:
        return Trouble(
            f"{python} there has no dstrain, or an older one ({last})",
            f"install the same dstrain into the same folder on {host}, or put it on a shared disk",
        )
    if code in (_NOT_FOUND, _NOT_EXECUTABLE) or "No such file" in last or "not found" in last:
        return Trouble(
            f"there is no python at {python} ({last})",
            f"create the same virtual environment at the same path on {host}, or put it on a shared disk",
        )
    return Trouble(
        f"dstrain does not start there: {last}", f"try it: ssh {host} {python} -m dstrain.cli.main"
    )


def _ssh_trouble(host: str, last: str, errors: str) -> Trouble:
    """ssh's own words, and their remedy; compared in small letters."""
    said, last = errors.lower(), last.removeprefix("ssh: ")
    if "could not resolve hostname" in said:
        fix = f"correct the name {host}, or make it resolvable here (DNS, /etc/hosts, or `HostName` in ~/.ssh/config)"
    elif "remote host identification has changed" in said:
        last = f"the host key of {host} has changed: it was reinstalled, or it is another machine"
        fix = f"if that is expected: ssh-keygen -R {host}; then ssh {host} once manually, and compare its key"
    elif "host key verification failed" in said:
        last = f"this machine does not know the key of {host} ({last})"
        fix = f"ssh {host} once manually, compare its key and accept it"
    elif "permission denied" in said:
        fix = f"let this user log in without a password: ssh-copy-id {host} (ssh-keygen first, where there is no key)"
    elif "connection refused" in said:
        fix = f"start sshd on {host}; for another port than 22: `Port` in ~/.ssh/config"
    elif any(words in said for words in ("timed out", "no route to host", "network is unreachable")):
        fix = f"check that {host} is running and on the network, and that no firewall blocks port 22"
    else:
        fix = f"try it: ssh -oBatchMode=yes {host} true"
    return Trouble(last, fix)


def _why_silent(host: str) -> str | None:
    try:
        done = subprocess.run(
            ssh_command(host, "true"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=4 * CONNECT_SECONDS,
        )
    except FileNotFoundError:
        return NOT_INSTALLED
    except subprocess.TimeoutExpired:
        return "it answers too slowly"
    if done.returncode == 0:
        return None
    return _last_line(done.stderr, done.returncode)


def _last_line(errors: str, code: int) -> str:
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"ssh ended with exit code {code}"
