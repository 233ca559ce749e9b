"""Ends ranks on other hosts that do not notice the end of their connection."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from dstrain.launch.ssh_reachability import run_on_hosts
from dstrain.runs.run_folder import RunFolder

_SECONDS = 8.0
# A number may belong to another process by now: only one that has the run folder among its arguments is ours.
_KILL = "for p in {pids}; do tr '\\0' '\\n' </proc/$p/cmdline | grep -qxF -- {folder} && kill -9 $p; done"


def kill_silent(pids: Mapping[int, int], hosts: Sequence[str], folder: RunFolder) -> None:
    """SIGKILL over ssh, on all hosts at once, of ranks that are stopped or stuck in native code.

    Their launcher would wait for them: DeepSpeed's half a minute, or for ever where they are the only ones of their
    host. Where ssh does not get there, they stay.

    Args:
        pids: process numbers by rank, as the ranks said them.
        hosts: by rank, the host on which the plan has it. What a rank says of its host is not asked: the name goes
            into a command.
    """
    run_on_hosts(kill_commands(pids, hosts, folder), seconds=_SECONDS)


def kill_commands(pids: Mapping[int, int], hosts: Sequence[str], folder: RunFolder) -> dict[str, str]:
    """What the shell of each host is to run, by host; nothing for ranks that are on none of ``hosts``.

    Raises:
        ValueError, TypeError: a process number is no number.
    """
    by_host: dict[str, list[str]] = {}
    for rank, pid in pids.items():
        if 0 <= rank < len(hosts):
            by_host.setdefault(hosts[rank], []).append(f"{pid:d}")
    path = shlex.quote(str(folder.path))
    return {
        host: f"sh -c {shlex.quote(_KILL.format(pids=' '.join(numbers), folder=path))}"
        for host, numbers in by_host.items()
    }
