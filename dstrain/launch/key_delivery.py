"""Brings the key of a launch's control connection to its ranks, and takes it away again.

Ranks that are children of this process's own children (`local`, `none`, `torchrun` on one machine) or that Slurm starts
get it in their environment, which only their user can read. What starts ranks over ssh writes variables into command
lines, where everybody reads them: there the key is a file of mode 0600 in the run folder of each host, written through
ssh's standard input. A shared folder gets it from each host anew, by a rename: whoever reads it reads all of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dstrain.errors import DstrainError
from dstrain.files import write_atomically
from dstrain.launch.hosts import is_this_host
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.launch.ssh_reachability import run_on_hosts
from dstrain.runs.control_key import KEY
from dstrain.runs.run_folder import RunFolder

_DELIVERY_SECONDS = 30.0
_REMOVAL_SECONDS = 3.0
# mktemp makes it 0600. A link at the file's place is replaced, not followed: -T.
_PUT = """
umask 077
mkdir -p -- {folder} && aside=$(mktemp -- {file}.XXXXXXXX) || exit 1
cat >"$aside" && mv -fT -- "$aside" {file} && exit
rm -f -- "$aside"
exit 1
"""


@contextmanager
def delivered(key: bytes, spec: LaunchSpec) -> Iterator[dict[str, str]]:
    """For the time of a launch: the variables for the environment of its launcher.

    Afterwards the files are removed, for at most 3 s on other hosts. One that stays, on a host that is lost or by a
    supervisor that was killed, opens nothing: its key was that of this launch.

    Raises:
        DstrainError: a host does not take it, within 30 s.
    """
    if not spec.over_ssh:
        yield {KEY: key.hex()}
        return
    file = RunFolder(spec.run_folder).control_key
    others = [host.name for host in spec.hosts if not is_this_host(host.name)]
    try:
        _put(key.hex(), file, others)
        yield {}
    finally:
        with suppress(OSError):
            file.unlink()
        remove = f"rm -f -- {shlex.quote(str(file))}"
        run_on_hosts(dict.fromkeys(others, remove), seconds=_REMOVAL_SECONDS)


def _put(text: str, file: Path, others: Sequence[str]) -> None:
    """Raises DstrainError where a host does not take it."""
    try:
        write_atomically(file, text + "\n", private=True)
    except OSError as error:
        raise DstrainError(f"it can't be written: {error.strerror}", where=str(file)) from error
    script = _PUT.format(folder=shlex.quote(str(file.parent)), file=shlex.quote(str(file)))
    line = f"sh -c {shlex.quote(script)}"
    failed = run_on_hosts(dict.fromkeys(others, line), seconds=_DELIVERY_SECONDS, given=text + "\n")
    for host, why in failed.items():
        raise DstrainError(
            f"the key of the control connection can't be written on {host}: {why}",
            where=str(file),
            hint=f"check that this user may write there: ssh {host} ls -ld {shlex.quote(str(file.parent))}",
        )
