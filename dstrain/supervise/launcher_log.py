"""What the launchers themselves write about ranks and hosts that they lost."""

from __future__ import annotations

import re
import signal
from pathlib import Path

# pdsh puts "host: " before each line of a remote launcher.
_KILLED = (
    # deepspeed.launcher.launch
    re.compile(r"^(?:(?P<host>[A-Za-z0-9._-]+): )?.*exits with return code = -(?P<number>\d+)"),
    # torchrun's agent
    re.compile(r"^(?:(?P<host>[A-Za-z0-9._-]+): )?.*failed \(exitcode: -(?P<number>\d+)\) local_rank: "),
    # Open MPI's mpirun
    re.compile(r"process rank \d+ with PID \d+ on node (?P<host>\S+) exited on signal (?P<number>\d+)"),
    # Slurm's srun, which says a signal in strsignal(3)'s words
    re.compile(r"^srun: error: (?P<host>\S+): tasks? \S+: (?P<words>[A-Z][a-z ]+?)(?: \(core dumped\))?$"),
)
_BY_WORDS = {signal.strsignal(number): int(number) for number in signal.valid_signals()}


def killed_in_log(lines: list[str]) -> tuple[str | None, int] | None:
    """(host or None, signal) of the first rank that a launcher reports as killed, but for SIGTERM, which it sends
    itself."""
    for line in lines:
        for pattern in _KILLED:
            match = pattern.search(line)
            if match is None:
                continue
            found = match.groupdict()
            number = int(found["number"]) if "number" in found else _BY_WORDS.get(found["words"], 0)
            if number not in (0, signal.SIGTERM):
                return found["host"], number
    return None


# ssh's own code for a connection that was lost or never made; pdsh waits for the other hosts all the same.
_LOST = re.compile(r"^pdsh@[^:\s]+: (?P<host>\S+): ssh exited with exit code 255\s*$")


def lost_in_log(lines: list[str]) -> str | None:
    """The first host that pdsh's ssh could not reach, or not any more."""
    return next((match["host"] for match in map(_LOST.search, lines) if match), None)


class LogWatch:
    """Follows the launcher log from ``start`` (in bytes) for a host that was lost."""

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._position = start
        self._lost = False

    def lost_host(self) -> bool:
        """Whether a host has been lost by now. Reads only what is new, up to its last whole line."""
        if not self._lost:
            try:
                with self._path.open("rb") as file:
                    file.seek(self._position)
                    new = file.read()
            except OSError:
                return False  # a network file system's hiccup: the next look will tell
            whole = new[: new.rfind(b"\n") + 1]
            self._position += len(whole)
            self._lost = lost_in_log(whole.decode("utf-8", errors="replace").splitlines()) is not None
        return self._lost
