"""Supervises a run from start to end: one cause, one line, nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType

from dstrain.files import open_to_write, umask_in
from dstrain.runs.protocol import Stop
from dstrain.runs.run_folder import RunFolder
from dstrain.stop_signals import AT_ONCE, STOPS, handled
from dstrain.supervise.control_server import ControlServer
from dstrain.supervise.failure_cause import Cause, LauncherLogWatch, Outcome, judge
from dstrain.supervise.hang_detection import HangWatch, Progress
from dstrain.supervise.process_tree import family, kill
from dstrain.supervise.rank_watch import RankWatch
from dstrain.supervise.silent_ranks import kill_silent
from dstrain.supervise.subreaper import guarded

__all__ = ["Cause", "Outcome", "supervise"]

# For ranks to end after a failure: shorter than for a user's stop, since there is nothing left to save.
_FAILURE_GRACE_SECONDS = 10.0
# And after a second stop: the launcher may tell other hosts.
_AT_ONCE_SECONDS = 2.0
# For ranks to end after their connections have.
_CONNECTION_SECONDS = 5.0
_KILL_SECONDS = 10.0
# Wrappers pass a signal on that the terminal has sent to all.
_SAME_STOP_SECONDS = 0.3
_LOOKS_A_POLL = 4


def supervise(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    folder: RunFolder,
    control: ControlServer,
    world_size: int,
    first_rank: int = 0,
    hosts: Sequence[str] = (),
    on_tick: Callable[[], None],
    hang_seconds: float | None = None,
    terminate: bool = True,
    poll_seconds: float = 0.2,
    leave_seconds: float = float("inf"),
    grace_seconds: float = 30.0,
    settle_seconds: float = 5.0,
) -> Outcome:
    """Run the launcher until it and all ranks have ended. Nothing that it started runs on when this returns
    or raises, nor (through the subreaper) when this process is killed.

    Args:
        command: the launcher's argv, as ``["bash", str(folder.launch_script)]``.
        environment: set on top of this process's own.
        folder: its earlier rank statuses are removed first; the launcher's output is appended to its log.
        control: whose address the environment tells. It is closed in the end: no rank outlives it, on any host.
        world_size: how many ranks must say ``done``, from ``first_rank`` on.
        hosts: the host of each rank that ssh may be used to, by rank.
        hang_seconds: so long without a step is a hang (`progress.Progress`).
        terminate: whether SIGTERM may be sent to what doesn't end by itself. Not to DeepSpeed's launcher of several
            hosts: it would end every process on them that bears its command's name, ours or not.
        on_tick: called at each poll (the live display). What it raises ends the run and is passed on.
        leave_seconds: how long ranks may take to end their step and save, after the first of `STOPS` to this process;
            a second signal cuts it short, and so does SIGQUIT.
        grace_seconds: how long they may take to end after the SIGTERM that follows.
        settle_seconds: how long the launcher may take to end by itself after the first failure, and how late
            a rank's last word may arrive (over NFS) after the launcher's end.
    """
    folder.make("private")
    ranks = range(first_rank, first_rank + world_size)
    folder.clear_statuses(ranks)
    folder.stop_request.unlink(missing_ok=True)
    log_start = folder.launcher_log.stat().st_size if folder.launcher_log.exists() else 0
    with _stop_signals() as stops:
        launcher = _Launcher(command, environment, folder, terminate)
        watch = RankWatch(folder, ranks, lambda: launcher.pid, control.ranks)
        log = LauncherLogWatch(folder.launcher_log, log_start)
        hang = HangWatch(control, Progress(hang_seconds), folder)

        def wait(seconds: float, until: Callable[[], bool]) -> bool:
            deadline = time.monotonic() + seconds
            while not until():
                if time.monotonic() >= deadline:
                    return False
                for _ in range(_LOOKS_A_POLL):
                    time.sleep(poll_seconds / _LOOKS_A_POLL)
                    watch.look()
                    control.poll()
                watch.update()
                on_tick()
            return True

        def stopped() -> bool:
            return bool(stops.numbers) or launcher.ended()

        def failed() -> bool:
            sign = hang.look()
            if sign is not None:
                watch.blame(sign)
            # The ranks that lost a host without a farewell wait for it in a collective: nothing ends by itself. With
            # every rank connected, an ssh that was lost carried no more than the launcher's output.
            return watch.first_failure() is not None or (log.lost_host() and watch.has_missing_rank())

        try:
            wait(float("inf"), lambda: stopped() or failed())
            if stops.numbers and not launcher.ended():
                _ask_to_stop(folder)
                control.broadcast(Stop())
                wait(leave_seconds, lambda: launcher.ended() or failed() or len(stops.numbers) > 1)
            first = watch.first_failure()
            if not stopped() and not (first is not None and first.quiet):
                wait(settle_seconds, stopped)
            own_end = launcher.ended()
            if not own_end:
                watch.stop()
                if failed():
                    grace_seconds = min(grace_seconds, _FAILURE_GRACE_SECONDS)
                if len(stops.numbers) > 1:
                    grace_seconds = min(grace_seconds, _AT_ONCE_SECONDS)
                # Every rank ends with its connection, on whatever host, and each node's launcher with its ranks.
                control.close()
                far = [rank for rank in hang.silent if watch.is_far(rank)]
                kill_silent({rank: control.ranks[rank].status.pid for rank in far}, hosts, folder)
                if not wait(min(grace_seconds, _CONNECTION_SECONDS), launcher.ended) and terminate:
                    launcher.terminate()
                    wait(grace_seconds, launcher.ended)
        finally:
            control.poll()
            watch.update(force=True)
            watch.stop()  # what is killed now is no sign
            code = launcher.kill_everything(watch)
            with suppress(OSError):  # the folder is gone, or what stands in its place
                folder.stop_request.unlink(missing_ok=True)
        control.poll()
        watch.update(force=True)
        if own_end and code == 0:
            wait(settle_seconds, lambda: not watch.unfinished() or watch.first_failure() is not None)
            watch.update(force=True)
        control.close()
    on_tick()
    return judge(folder, watch, log_start, code, own_end, stops.numbers)


def _ask_to_stop(folder: RunFolder) -> None:
    """For ranks that have no connection: they look for this file. A full disk takes none."""
    with suppress(OSError):
        os.close(open_to_write(folder.stop_request, os.O_WRONLY | os.O_CREAT))


class _Launcher:
    """The launcher under its subreaper, which leads the session of the whole run."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: RunFolder, terminate: bool
    ) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with open(open_to_write(folder.launcher_log, flags, below=folder.path), "ab") as output:
            self._subreaper = subprocess.Popen(
                guarded(list(command), terminate=terminate),
                env={**os.environ, **environment},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=umask_in(folder.path),
            )
        self.pid = self._subreaper.pid

    def ended(self) -> bool:
        """Whether the subreaper has ended, and with it all that it looked after. It is left unreaped, so that its
        number can't be given to a stranger while it still serves to find our processes."""
        if self._subreaper.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def terminate(self) -> None:
        """One SIGTERM for all processes of the launcher's group."""
        if not self.ended():
            os.killpg(self.pid, signal.SIGTERM)

    def kill_everything(self, watch: RankWatch) -> int:
        """SIGKILL what is left here, wait until it is gone, and return the launcher's exit code."""
        deadline = time.monotonic() + _KILL_SECONDS
        while time.monotonic() < deadline:
            left = family(self.pid)
            for process in [*left, *watch.local_processes()]:
                kill(process, signal.SIGKILL)
            if not left and self.ended():
                break
            time.sleep(0.05)
        else:
            # Only a process inside the kernel (a dead disk or driver) outlives SIGKILL.
            self._subreaper.kill()
        if self._subreaper.stdin is not None:
            self._subreaper.stdin.close()
        return self._subreaper.wait()


@dataclass
class _Stops:
    """The signals that asked the run to end, in their order. What one cause sends twice counts once."""

    numbers: list[int] = field(default_factory=list)
    _at: float = 0.0

    def note(self, number: int, frame: FrameType | None) -> None:
        again = bool(self.numbers) and (
            # A terminal that is closed tells it by itself and through the shell; nobody asks so twice.
            number == signal.SIGHUP or time.monotonic() < self._at + _SAME_STOP_SECONDS
        )
        if not again:
            self.numbers += [number] * (2 if number == AT_ONCE else 1)
            self._at = time.monotonic()


@contextmanager
def _stop_signals() -> Iterator[_Stops]:
    """Note a signal that asks to end, instead of dying of it; what the caller has ignored stays ignored.

    Only the main thread may set handlers; in another one they stay as they are, and the subreaper ends the run
    if they end this process.
    """
    stops = _Stops()
    with handled(stops.note, (*STOPS, AT_ONCE)):
        yield stops
