"""Work for the pool of workers, in a module that they find."""

from __future__ import annotations

import os
import signal
import time

from dstrain.errors import DstrainError


class Work:
    """Sleeps, fails or ends as the job says; counts what it has done."""

    def __init__(self) -> None:
        self.done = 0

    def __call__(self, job: str) -> tuple[str, int, int]:
        self.done += 1
        kind, _, rest = job.partition(" ")
        if kind == "sleep":
            time.sleep(float(rest))
        elif kind == "refuse":
            raise DstrainError(rest, hint="a hint", where="a place")
        elif kind == "break":
            raise KeyError(rest)
        elif kind == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "large":
            return rest * 10_000_000, 0, os.getpid()
        return job, self.done, os.getpid()


class DyingWork:
    """Is killed with the first job, as by the kernel where memory is short."""

    def __call__(self, job: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)
