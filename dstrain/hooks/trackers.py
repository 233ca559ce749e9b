"""The base of all trackers: sends metrics to a library or server without delaying or ending a run.

The training's thread only puts records into a bounded queue. A thread of the tracker's own opens the library, writes
what has come, a batch at a time, and tries again after a failure. What hangs is left behind at the end.
"""

from __future__ import annotations

import os
import re
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

from dstrain.files import make_folder, read_json, write_json
from dstrain.runs.run_folder import RunFolder, read_metrics
from dstrain.train.hooks import EndInfo, FailureInfo, Hook, StartInfo, StepInfo, ValidationInfo

Record = tuple[float, dict[str, Any]]
"""When it came, in seconds since 1970, and a line of metrics.jsonl: ``step`` and the values of that step."""
State = Literal["finished", "stopped", "failed"]

LIMIT = 10_000
"""Records that wait at most; beyond, the oldest are dropped."""
BATCH = 50
"""Records that are written at once at most."""
SECONDS_BETWEEN_WRITES = 1.0
"""At least: a batch a second costs less than a write a step."""
SHARE_OF_TIME = 0.005
"""The training shares its interpreter with this thread, which pauses longer where writing takes more of it than this,
as long as few records wait."""
_FEW = 1000
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0  # seconds after a failure
_LONGEST_TEXT = 300

_SECRET_NAME = re.compile(r"(KEY|TOKEN|PASSWORD|SECRET)$")
_USER_IN_URL = re.compile(r"//[^/\s@]+@")


class Tracker(Hook):
    """A hook that sends metrics somewhere. A subclass opens, writes and closes; all in one thread of its own."""

    optional = True
    returns_at_once = True
    name: ClassVar[str]
    """As in the config."""

    def __init__(self) -> None:
        self._queue: deque[Record] = deque(maxlen=LIMIT)
        self._taken: list[Record] = []  # out of the queue, and not written yet
        self.last_step = -1  # that was written, in an earlier launch too
        self._dropped = 0
        self._start: StartInfo | None = None
        self._state: State | None = None  # once no more records come
        self._wake = threading.Event()
        self._ended = threading.Event()
        self._said_failure = False
        self._left_behind = False
        # A daemon: a library that hangs does not keep the rank from ending.
        self._thread = threading.Thread(target=self._run, name=f"tracker {self.name}", daemon=True)
        self._thread.start()

    @abstractmethod
    def load(self) -> None:
        """Import the library; while the model is being built, so that the first steps don't wait for it."""

    @abstractmethod
    def open(self, info: StartInfo) -> None:
        """Begin, or go on with what an earlier launch of this run began. Called again after it has raised."""

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Take in the records, in their order. Called again with the same ones after it has raised."""

    @abstractmethod
    def close(self, state: State) -> None:
        """All has been written: end."""

    def abandon(self) -> None:
        """The thread hangs and is left behind: end what would outlive this process."""

    def on_start(self, info: StartInfo) -> None:
        self._start = info
        self._wake.set()

    def on_step(self, info: StepInfo) -> None:
        self._put(info.metrics)

    def on_validation(self, info: ValidationInfo) -> None:
        if info.step == 0:  # later ones stand in the metrics of their step
            self._put({"step": 0, **info.losses, "tokens": info.tokens})

    def on_failure(self, info: FailureInfo) -> None:
        self._end("failed")

    def on_end(self, info: EndInfo) -> None:
        self._end("finished" if info.completed else "stopped")

    def wait(self, seconds: float) -> None:
        """Give the thread so long to write the rest; say what was not written."""
        self._end(self._state or "failed")
        if self._start is not None and not self._ended.wait(seconds):
            self._leave_behind(hangs=True)

    def tell(self, text: str) -> None:
        """Tell the user, without what could be a secret."""
        self.say(f"tracker {self.name} {without_secrets(text)}")

    def _put(self, record: Mapping[str, Any]) -> None:
        if len(self._queue) == LIMIT:
            self._dropped += 1
            if self._dropped == 1:
                self.tell(f"can't keep up: {LIMIT} steps are waiting, and from now on the oldest are dropped")
        self._queue.append((time.time(), dict(record)))

    def _end(self, state: State) -> None:
        self._state = self._state or state
        self._wake.set()

    def _run(self) -> None:
        """The thread: what fails is tried again after a pause, until the end has come."""
        pause = _FIRST_PAUSE
        opened = loaded = False
        try:
            while True:
                last_try = self._state is not None
                try:
                    if not loaded:
                        self.load()
                        loaded = True
                    start = self._wait_for_start()
                    if start is None:
                        return
                    if not opened:
                        self._open(start)
                        opened = True
                    computed = self._write_all(start)
                    pause = _FIRST_PAUSE
                    if last_try and self._state is not None and not self._queue:
                        self.close(self._state)
                        return
                    if len(self._queue) < _FEW:
                        self._pause(
                            max(SECONDS_BETWEEN_WRITES, min(computed / SHARE_OF_TIME, _LONGEST_PAUSE))
                        )
                except Exception as error:
                    self._failed(error)
                    if last_try:
                        return self._leave_behind(hangs=False)
                    self._pause(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)
        finally:
            self._ended.set()

    def _wait_for_start(self) -> StartInfo | None:
        """None where the launch ends before."""
        while self._start is None and self._state is None:
            self._wake.wait()
            self._wake.clear()
        return self._start

    def _open(self, start: StartInfo) -> None:
        """Open, and take what an earlier launch did not write: it had no time, or no such tracker."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            self.last_step = int(read_json(self._file(start))["last_step"])
        self.open(start)
        if start.first_step > 1:
            lines = read_metrics(RunFolder(start.folder).metrics)
            missed = [line for line in lines if self.last_step < line["step"] < start.first_step]
            self._taken = [(time.time(), line) for line in missed] + self._taken

    def _write_all(self, start: StartInfo) -> float:
        """Write what waits; the seconds that this thread computed for it."""
        began = time.thread_time()
        while self._taken or self._queue:
            while self._queue and len(self._taken) < BATCH:
                self._taken.append(self._queue.popleft())
            batch = self._taken[:BATCH]
            self.write(batch)
            self._taken = self._taken[len(batch) :]
            self.last_step = batch[-1][1]["step"]
            file = self._file(start)
            make_folder(file.parent, below=file.parent.parent)
            write_json(file, {"last_step": self.last_step}, below=file.parent.parent)
        return time.thread_time() - began

    def _file(self, start: StartInfo) -> Path:
        return Path(start.folder) / "trackers" / f"{self.name}.json"

    def _pause(self, seconds: float) -> None:
        """Until so much time has passed, or the end has come."""
        until = time.monotonic() + seconds
        while self._state is None and time.monotonic() < until:
            self._wake.clear()
            if self._state is None:
                self._wake.wait(until - time.monotonic())

    def _failed(self, error: Exception) -> None:
        if not self._said_failure:
            self._said_failure = True
            lines = str(error).strip().splitlines()
            reason = ": ".join([type(error).__name__, *(line[:_LONGEST_TEXT] for line in lines[:1])])
            self.tell(f"failed: {reason}; the run continues, and the tracker will be retried")

    def _leave_behind(self, *, hangs: bool) -> None:
        """Say what is not written, once, and end what would outlive this process."""
        if self._left_behind:
            return
        self._left_behind = self._said_failure = True
        left = len(self._queue) + len(self._taken)
        if left or hangs:
            self.tell(
                f"is left behind: {f'{left} steps are not written' if left else 'it did not end in time'}"
            )
        self.abandon()


def without_secrets(text: str) -> str:
    """``text`` without the values of environment variables that are called a key, token, password or secret."""
    secrets = [value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) >= 6]
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "***")
    return _USER_IN_URL.sub("//***@", text)


def numbers_in(record: Mapping[str, Any]) -> dict[str, float | int]:
    """The values of a record that a tracker can plot: all but the step, and but what a skipped step does not have."""
    return {
        key: int(value) if isinstance(value, bool) else value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


def flat_config(info: StartInfo) -> dict[str, Any]:
    """The run config and the plan in one level: ``lr``, ``plan.world_size``."""
    return info.config | {f"plan.{key}": value for key, value in info.plan.items()}


def origins_of(info: StartInfo) -> dict[str, str]:
    """``origin.lr`` and its like: where each value came from that is no default.

    A launch that goes on reads the run folder's own config, whose lines say nothing new: what was given to it counts.
    """
    told = {key: origin for key, origin in info.origins.items() if origin != "default"}
    if info.first_step > 1:
        told = {key: origin for key, origin in told.items() if origin.startswith("--")}
    return {f"origin.{key}": origin for key, origin in told.items()}
