"""Weights & Biases tracker: online if rank 0's host has an API key, else offline in the run folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from dstrain.hooks.trackers import Record, State, Tracker, flat_config, numbers_in, origins_of
from dstrain.train.hooks import StartInfo

SECONDS_TO_BEGIN = 30.0
"""So long the server may take to answer at the beginning; then the run is kept offline."""
_SECONDS_TO_WRITE = 2.0


class WandbTracker(Tracker):
    """One W&B run for all launches of a run: its id is the run's own.

    Args:
        project, entity, group, tags: as wandb.init takes them; else WANDB_PROJECT ("dstrain"), WANDB_ENTITY, none.
        mode: ``online`` or ``offline``; else WANDB_MODE, else online where there is an API key.
    """

    name = "wandb"

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
        mode: Any = None,
    ) -> None:
        self._place: dict[str, Any] = {
            "project": project or os.environ.get("WANDB_PROJECT") or "dstrain",
            "entity": entity,
            "group": group,
            "tags": list(tags) or None,
        }
        self._mode = mode or os.environ.get("WANDB_MODE")
        self._tracked: Any = None
        super().__init__()

    def load(self) -> None:
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # nothing is sent but what was asked for
        import wandb  # noqa: F401

    def open(self, info: StartInfo) -> None:
        import wandb

        if self._mode not in (None, "online"):
            return self._begin(info, self._mode)
        try:
            self._begin(info, "online")
        except (wandb.errors.UsageError, wandb.errors.CommError) as error:  # no API key; no server
            wandb.teardown(exit_code=1)  # else it takes the id for one that is in use
            self._begin(info, "offline")
            why = " ".join(str(error).split()).rstrip(".")
            later = f"`wandb sync {Path(info.folder) / 'wandb'}/offline-run-*` sends it"
            self.tell(f"is offline: {why}; {later}")

    def write(self, records: Sequence[Record]) -> None:
        for when, record in records:
            # Committed: else it would wait for the next step, and the last one for the end.
            self._tracked.log(numbers_in(record) | {"_timestamp": when}, step=record["step"], commit=True)

    def close(self, state: State) -> None:
        import wandb

        self._tracked.finish(exit_code=1 if state == "failed" else 0)
        wandb.teardown()

    def abandon(self) -> None:
        cores = [child for child in psutil.Process().children() if child.name().startswith("wandb-")]
        for core in cores:
            core.terminate()  # it brings to the disk what it holds
        for core in psutil.wait_procs(cores, timeout=_SECONDS_TO_WRITE)[1]:
            core.kill()

    def _begin(self, info: StartInfo, mode: Any) -> None:
        import wandb

        self._tracked = wandb.init(
            **self._place,
            mode=mode,
            id=info.run_id,
            name=info.run,
            resume="allow",
            dir=info.folder,
            config=flat_config(info) | origins_of(info),
            allow_val_change=True,  # a resumed run may have another config
            # The rank's log stays where it is; git's address of a repository may hold a token.
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, save_code=False, init_timeout=SECONDS_TO_BEGIN
            ),
        )
