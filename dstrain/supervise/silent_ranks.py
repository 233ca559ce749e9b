"""An end for ranks of other hosts that do not even notice that their line has ended."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterable
from contextlib import suppress

from dstrain.launch.ssh_reachability import ssh_command
from dstrain.runs.run_folder import RankStatus, RunFolder

_SECONDS = 8.0
# A number may belong to another process by now: only one that has the run folder among its arguments is ours.
_KILL = "for p in {pids}; do tr '\\0' '\\n' </proc/$p/cmdline | grep -qxF -- {folder} && kill -9 $p; done"


def kill_silent(ranks: Iterable[RankStatus], folder: RunFolder) -> None:
    """SIGKILL over ssh, on all hosts at once, of ranks that are stopped or stuck in native code.

    Their launcher would wait for them: DeepSpeed's half a minute, or for ever where they are the only ones of their
    host. Where ssh does not get there, they stay.
    """
    pids: dict[str, list[int]] = {}
    for status in ranks:
        pids.setdefault(status.host, []).append(status.pid)
    started = []
    for host, numbers in pids.items():
        line = _KILL.format(pids=" ".join(map(str, numbers)), folder=shlex.quote(str(folder.path)))
        with suppress(FileNotFoundError):  # no ssh: another launcher than those that need it
            started.append(
                subprocess.Popen(
                    ssh_command(host, f"sh -c {shlex.quote(line)}"),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
    for process in started:
        try:
            process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
