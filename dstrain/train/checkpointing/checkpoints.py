"""Saves checkpoints: written aside, flushed, verified, published by one rename; complete or invisible."""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import distributed

from dstrain.config.schema import RunConfig
from dstrain.control_group import barrier
from dstrain.engine.async_checkpoint import AsyncCheckpointStage, Staging
from dstrain.engine.interface import Engine
from dstrain.errors import DstrainError
from dstrain.json_collectives import all_gather_json, broadcast_json
from dstrain.runs.checkpoint.identity import is_other_layout, refuse_other
from dstrain.runs.checkpoint.manifest import FileRecord, file_sizes, newest_complete, share_out
from dstrain.train.checkpointing.background_writer import (
    WORDS,
    BackgroundWriter,
    Failure,
    record,
    room_for_copy,
)
from dstrain.train.checkpointing.checkpoint_folder import (
    aside_of,
    begin,
    give_name,
    named,
    prune,
    why_not_written,
    write_manifest,
)
from dstrain.train.checkpointing.newest_usable import find_newest_usable


class Checkpoints:
    """The checkpoints of one run folder.

    ``save``, ``finish``, ``newest_usable`` and ``load_newest`` are collective. As a context it ends what is being
    written: with all ranks together, or by itself where an error is on its way.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        identity: Mapping[str, Any],
        run: str,
        config: Mapping[str, Any],
        keep_every: int = 0,
        background: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        """
        Args:
            folder: ``checkpoints/`` of the run folder.
            keep: how many of the newest are kept.
            identity: what a checkpoint must agree with to be loaded (model, data), and the layout.
            run: the run's id, the same on all ranks.
            config: the run config.
            keep_every: those whose step is a multiple of it are kept for good; 0 for none.
            background: ``save`` copies to host memory where there is room, and returns before the disk is written.
            say: takes a line for the user; called on rank 0 alone.
        """
        self.folder = folder
        self.keep = keep
        self.keep_every = keep_every
        self.identity = dict(identity)
        self.run = run
        self.background = background
        self.streams: Sequence[Any] | None = None
        """What was saved as ``streams`` of `save` with the state that was loaded."""
        self._config = dict(config)
        self._say = say
        self._rank = distributed.get_rank()
        self._staging = Staging()
        self._damaged: dict[str, str] = {}
        self._writing: tuple[int, BackgroundWriter] | None = None
        self._said_no_room = False
        self._completed: deque[tuple[int, Path]] = deque()

    def save(self, engine: Engine, step: int, streams: Sequence[Any] | None = None) -> Path:
        """Save the state after ``step``; returns the folder that the checkpoint has, or will have, when it is complete.

        ``streams`` says how to go on with data that is streamed.

        In the background only the copy to host memory is made now; an earlier checkpoint is complete before.

        Raises:
            DstrainError: it, or the one before it, could not be written (a full disk, for one). What was written
                of it is removed.
        """
        self.finish()
        aside = aside_of(self.folder, step)
        # What the last one was copied to is free again.
        room = room_for_copy() + self._staging.bytes if self.background else 0
        held = AsyncCheckpointStage(room, self._staging)
        try:
            if self._rank == 0:
                begin(self.folder, step, keep=self.keep, keep_every=self.keep_every, damaged=self._damaged)
                (aside / WORDS).mkdir()
            barrier()
            state = {"step": step, "run": self.run}
            if streams is not None:
                state["streams"] = list(streams)
            engine.save(aside, state, held if self.background else None)
            self._staging.free_unused()
            written = self._share_of_written(aside)
        except Exception as error:
            reason = why_not_written(error, aside)
            shutil.rmtree(aside, ignore_errors=True)
            if reason is None:
                raise
            raise self._not_written(step, reason) from error
        writer = BackgroundWriter(
            aside,
            held=held,
            written=written,
            rank=self._rank,
            ranks=distributed.get_world_size(),
            complete=lambda files: self._complete(aside, step, files),
        )
        self._writing = step, writer
        if not self.background:
            self.finish()
        elif held.found_no_room:
            self._say_no_room(held.found_no_room)
        return named(self.folder, step)

    def raise_if_failed(self) -> None:
        """To be called at every step; not collective.

        Raises:
            DstrainError: this rank could not write its part of the last checkpoint.
        """
        if self._writing is not None:
            step, writer = self._writing
            if writer.failure is not None:
                raise self._error(step, writer.failure)

    def take_completed(self) -> list[tuple[int, Path]]:
        """Step and folder of the checkpoints that have become complete since the last call; on rank 0 alone."""
        return [self._completed.popleft() for _ in range(len(self._completed))]

    def finish(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            DstrainError: a rank could not write its part; on all ranks.
        """
        if self._writing is None:
            return
        (step, writer), self._writing = self._writing, None
        # A rank that is gone is found here, by the collective. So no rank waits for a word that never comes.
        reason = _first_of_all_ranks(writer.wait_for_part()) or _first_of_all_ranks(writer.wait())
        if reason is not None:
            if self._rank == 0:
                writer.abandon()
            barrier()
            raise self._error(step, writer.failure or Failure(reason))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        elif self._writing is not None:
            # The last state that was saved is worth keeping. Other ranks may be gone: nothing is collective here.
            self._writing[1].wait_without_others()

    def load_newest(self, engine: Engine) -> int:
        """Load the newest usable checkpoint and return its step; 0 where no checkpoint was made yet.

        Raises:
            DstrainError: none is usable, or it belongs to another model, data, optimizer or precision.
        """
        folder = self.newest_usable()
        if folder is None:
            return 0
        refuse_other(folder, self.identity)
        other_layout = is_other_layout(folder, self.identity)
        state = engine.load(folder, other_layout=other_layout, say=self._say)
        self.streams = state.get("streams")
        return int(state["step"])

    def newest_usable(self) -> Path | None:
        """As `find_newest_usable`, in this run's folder."""
        return find_newest_usable(self.folder, self.run, self._damaged, self._say)

    def _share_of_written(self, aside: Path) -> list[str]:
        """Which of the files that are there already this rank flushes and reads back."""
        barrier()
        listed = broadcast_json(file_sizes(aside) if self._rank == 0 else None)
        return share_out(listed, distributed.get_world_size())[self._rank]

    def _complete(self, aside: Path, step: int, files: Mapping[str, FileRecord]) -> None:
        """Rank 0's thread: every file of the folder gets into the manifest, and the folder its name."""
        shutil.rmtree(aside / WORDS)
        unread = {name: record(aside / name) for name in file_sizes(aside) if name not in files}
        write_manifest(
            aside,
            step=step,
            run=self.run,
            identity=self.identity,
            config=self._config,
            files={**files, **unread},
        )
        final = named(self.folder, step)
        give_name(aside, final)
        self._damaged.pop(final.name, None)
        self._completed.append((step, final))
        prune(self.folder, keep=self.keep, keep_every=self.keep_every, damaged=self._damaged)

    def _say_no_room(self, size: int) -> None:
        if self._rank == 0 and not self._said_no_room:
            self._said_no_room = True
            self._say(
                f"host memory has no room for a copy of {size / 1e9:.1f} GB: checkpoints are written"
                " while training waits"
            )

    def _error(self, step: int, failure: Failure) -> Exception:
        return failure.error or self._not_written(step, failure.reason)

    def _not_written(self, step: int, reason: str) -> DstrainError:
        usable = newest_complete(self.folder)
        kept = (
            f"{usable.name} is complete and can be resumed from" if usable else "no checkpoint was made yet"
        )
        return DstrainError(
            f"the checkpoint of step {step} could not be written: {reason}",
            where=str(self.folder),
            hint=f"{kept}; make room on this disk, or keep fewer checkpoints (--keep, --keep-every)",
            exit_code=1,
        )


def _first_of_all_ranks(failure: Failure | None) -> str | None:
    """The reason of the first rank that failed, on every rank; None where none did."""
    reasons = all_gather_json(failure.reason if failure else None)
    return next((reason for reason in reasons if reason is not None), None)


class SaveSchedule:
    """Asked after each step, by all ranks together.

    The last step is always due, and so is every multiple of ``keep_every``: what is to be kept for good must
    be saved. With a length of time the clock restarts at each save. With ``never`` no step is due.
    """

    def __init__(self, config: RunConfig, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: seconds; rank 0's decides."""
        self._saves = config.saves
        self._last = config.steps
        self._keep_every = config.keep_every
        self._steps = config.save_every if isinstance(config.save_every, int) else 0
        self._seconds = config.save_every_seconds
        self._clock = clock
        self._saved_at = clock()

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` is saved. The same on all ranks; collective with a length of time."""
        if not self._saves:
            return False
        due = step == self._last or any(n > 0 and step % n == 0 for n in (self._steps, self._keep_every))
        return due or (self._seconds is not None and self._time_is_up())

    def saved(self) -> None:
        """Restart the clock: a save has ended."""
        self._saved_at = self._clock()

    def _time_is_up(self) -> bool:
        assert self._seconds is not None
        return bool(broadcast_json(self._clock() - self._saved_at >= self._seconds))
