"""The run folder on a rank's own host, which may differ from the supervisor's.

`dstrain.train.host_agreement` finds out whether the ranks share theirs. This is looked at before, and needs no torch.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path

from dstrain.errors import DstrainError
from dstrain.files import write_atomically
from dstrain.runs.protocol import plan_digest
from dstrain.runs.run_folder import RunFolder
from dstrain.train.control_client import ControlClient

LATE_SECONDS = 5.0
"""So long a network file system may show a file later on another host."""


def plan_seen(folder: RunFolder) -> str | None:
    """The digest of the plan.json that lies on this host; None where there is none."""
    try:
        return plan_digest(folder.plan.read_text(encoding="utf-8"))
    except OSError:
        return None


def keep_plan(folder: RunFolder, control: ControlClient, rank: int) -> None:
    """Lay the plan that the supervisor sent into this host's run folder, where the rank reads it.

    Raises:
        DstrainError: there is none; or this is rank 0, and what it writes would not be seen where the run is watched.
    """
    if rank == 0 and control.launch and not sees(folder.launch, control.launch):
        raise DstrainError(
            f"the first host of the run, {socket.gethostname()}, can't see the run folder {folder.path}"
            " on the machine where the run was started: metrics, result and checkpoints would stay there",
            hint="start the run on the first host; or use --set runs_dir=FOLDER on storage that both share",
        )
    if control.plan is not None:
        write_atomically(folder.plan, control.plan)
    elif not folder.plan.exists():
        raise DstrainError(
            f"{socket.gethostname()} has no {folder.plan}",
            hint="`dstrain run` and `dstrain resume` send the plan to every host; launch.sh, started"
            " manually, needs a run folder that all hosts share",
        )


def sees(path: Path, content: str) -> bool:
    """Whether this host reads ``content`` in a file that another one has just written, perhaps a little late."""
    deadline = time.monotonic() + LATE_SECONDS
    while True:
        try:
            # Listing the folder makes NFS ask its server, where it would answer from what it remembers.
            if any(path.parent.iterdir()) and path.read_text(encoding="utf-8").strip() == content:
                return True
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
