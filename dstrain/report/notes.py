"""What rank 0 says to the user during a run, found among the lines of the launcher's log."""

from __future__ import annotations

from pathlib import Path

from dstrain.runs.run_folder import NOTE


class Notes:
    """Follows a log from its present end on; `new` gives the notes that came since the last call."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._position = log.stat().st_size if log.exists() else 0
        self._rest = b""

    def new(self) -> list[str]:
        """Without what stands in front of them: our mark, and the host's name that pdsh writes."""
        try:
            with self._log.open("rb") as file:
                file.seek(self._position)
                new = file.read()
        except FileNotFoundError:
            return []
        self._position += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        parted = [line.decode(errors="replace").partition(NOTE) for line in lines]
        return [note for _, mark, note in parted if mark]
