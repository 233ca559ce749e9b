"""The streamed sources of a run: opened where a checkpoint says, and what the next one keeps of them."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import distributed

from dstrain.control_group import barrier
from dstrain.data.rows.mixture import Order
from dstrain.data.tokenizing.worker_pool import available_cores
from dstrain.data.training_data import TrainingData
from dstrain.errors import DstrainError
from dstrain.json_collectives import all_gather_json, broadcast_json
from dstrain.shared_caches import make_folder

_MOST_WORKERS = 8
"""Processes that tokenize for one stream: one of them keeps up with most models on a host."""

States = Sequence[dict[str, Any] | None]
"""Of each source; None for one that is not streamed."""


class Streams:
    """All streams of a run, as a context: at its end the processes that make the rows are gone.

    Args:
        order: which rows each step takes.
        folder: of this host's cache.
    """

    def __init__(self, data: TrainingData, order: Order, folder: Path) -> None:
        self._streams = data.streams
        self._sources = len(data.sources)
        self._order = order
        self._folder = folder

    def open(self, states: States | None) -> None:
        """Begin to make rows: one process a stream on each host. Collective; does nothing without streams.

        Args:
            states: of a checkpoint; None at the beginning of a run.

        Raises:
            DstrainError: they are none.
            OSError: the folder can't be written.
        """
        if not self._streams:
            return
        # One ring on a host has one state, which rank 0's is as good as any for.
        name, states = broadcast_json([secrets.token_hex(8), states])
        if states is not None and len(states) != self._sources:
            raise DstrainError(
                f"the checkpoint knows places in {len(states)} sources, and there are {self._sources}",
                hint="resume with the same data, or start a new run",
            )
        make_folder(self._folder)
        status = self._folder.stat()
        here = [_host(), status.st_dev, status.st_ino]
        rank = distributed.get_rank()
        local = [other for other, place in enumerate(all_gather_json(here)) if place == here]
        workers = max(1, min(_MOST_WORKERS, available_cores() // (2 * len(self._streams))))
        for number, rows in self._streams.items():
            rows.open(
                self._folder,
                f"{name}-{local[0]}-{number}",
                reader=local.index(rank),
                readers=len(local),
                state=None if states is None else states[number],
                workers=workers,
            )
        barrier()  # the first reader's stream is open before the others ask it for rows

    def states(self, step: int) -> States | None:
        """How to go on behind the step. Collective; None without streams.

        Raises:
            DstrainError: hosts have trained on different rows; or as of `StreamRows.rows`.
        """
        if not self._streams:
            return None
        given = self._order.given_before(step + 1)
        checks = [rows.check_before(given[number]) for number, rows in self._streams.items()]
        seen = all_gather_json([socket.gethostname(), checks])
        other = next((host for host, found in seen if found != seen[0][1]), None)
        if other is not None:
            raise DstrainError(
                f"{other} has made other rows of the data than {seen[0][0]}: the files or the tokenizer differ",
                hint="copy the same files to all hosts, with the same versions of transformers and tokenizers",
                exit_code=1,
            )
        found: list[dict[str, Any] | None] = [None] * self._sources
        for number, rows in self._streams.items():
            found[number] = rows.state_before(given[number])
        return found

    def waits_for(self) -> str:
        """What the rows that are waited for are made of just now, in words; empty where none are waited for."""
        places = [rows.waits_for() for rows in self._streams.values()]
        return ", ".join(f"data, which reads {place}" for place in places if place)

    def __enter__(self) -> Streams:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for rows in self._streams.values():
            rows.close()


def _host() -> str:
    """The same for all processes that share memory through a file, in containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:  # not Linux
        return f"{socket.gethostname()} {os.uname().version}"
