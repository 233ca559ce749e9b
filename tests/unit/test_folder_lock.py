"""The lock of a run folder: with locks and without, on one host and two, and what becomes of it while a run trains."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dstrain.api import folder_lock
from dstrain.api.folder_lock import FolderLock, locked
from dstrain.errors import DstrainError
from dstrain.runs.run_folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from dstrain.api import folder_lock
from dstrain.runs.run_folder import RunFolder
if sys.argv[3]:
    def flock(*arguments):
        raise OSError(int(sys.argv[3]), "no locks")
    folder_lock.fcntl.flock = flock
with folder_lock.locked(RunFolder(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def hold(folder: RunFolder) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another process that holds the lock; with an errno, where the file system has none."""
    started = []

    def start(no_locks: int | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(ROOT), str(folder.path), str(no_locks or "")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)


def is_held(folder: RunFolder) -> str | None:
    """What is said to the next one who wants the lock."""
    try:
        with locked(folder):
            return None
    except DstrainError as error:
        return error.message


@pytest.mark.parametrize(
    ("others", "mine"),
    [(None, None), *((number, number) for number in NO_LOCKS), (None, NO_LOCKS[0]), (NO_LOCKS[0], None)],
)
def test_two_processes(
    others: int | None,
    mine: int | None,
    folder: RunFolder,
    hold: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever either of the two can do; and how the first one ends does not matter."""
    if mine is not None:
        without_locks(monkeypatch, mine)
    process = hold(others)
    message = is_held(folder)
    assert message is not None and f"using this run folder (process {process.pid} on " in message
    process.kill()
    process.wait()
    assert is_held(folder) is None
    second = hold(others)
    assert is_held(folder) is not None
    assert second.stdin is not None
    second.stdin.close()
    second.wait()
    assert is_held(folder) is None
    assert not folder.lock_claim.exists()


def test_it_is_not_truncated_and_says_who_holds_it(folder: RunFolder) -> None:
    folder.make("private")
    folder.lock.write_text("what an older dstrain or somebody else has written\n")
    inode = folder.lock.stat().st_ino
    with locked(folder):
        record = json.loads(folder.lock.read_text())
        assert (record["pid"], record["released"]) == (os.getpid(), False)
        assert is_held(folder), "also in one process"
    assert json.loads(folder.lock.read_text())["released"] and folder.lock.stat().st_ino == inode


def test_a_link_in_its_place_is_refused(folder: RunFolder, tmp_path: Path) -> None:
    folder.make("private")
    target = tmp_path / "target"
    target.write_text("keep")
    folder.lock.symlink_to(target)
    assert "it is a link" in str(is_held(folder))
    assert target.read_text() == "keep"


class OnAnotherHost:
    """Keeps a lock as a process of another machine does, whose kernel lock is not seen here."""

    def __init__(self, folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        with monkeypatch.context() as there:
            there.setattr(folder_lock, "_machine", lambda: "another machine")
            there.setattr(folder_lock.socket, "gethostname", lambda: "n2")
            self.lock = FolderLock(folder, print)
        fcntl.flock(self.lock._descriptor, fcntl.LOCK_UN)
        self.lives = True
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def beat(self) -> None:
        while self.lives:
            time.sleep(0.1)
            self.lock._write(self.lock._holder)

    def die(self) -> None:
        self.lives = False
        self.thread.join()


@pytest.mark.parametrize("number", [None, errno.ENOLCK])
def test_two_hosts(
    number: int | None, folder: RunFolder, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "_LOOK_SECONDS", 0.2)
    monkeypatch.setattr(folder_lock, "WATCH_SECONDS", 2.0)
    folder.make("private")
    other = OnAnotherHost(folder, monkeypatch)
    if number is not None:
        without_locks(monkeypatch, number)
    assert f"(process {os.getpid()} on n2, since " in str(is_held(folder))
    other.die()
    with locked(folder, say=said.append) as mine:
        assert "looking whether it still is" in said[0]
        mine.check(now=True)


def test_two_hosts_that_have_no_locks_at_the_same_moment(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked, and seen nobody."""
    without_locks(monkeypatch, errno.ENOLCK)
    folder.make("private")
    barrier, found = threading.Barrier(8), []
    make_claim = FolderLock._make_claim

    def all_at_once(self: FolderLock, dead: int | None) -> int:
        barrier.wait()
        return make_claim(self, dead)

    monkeypatch.setattr(FolderLock, "_make_claim", all_at_once)

    def take() -> None:
        with suppress(DstrainError):
            found.append(FolderLock(folder, lambda line: None))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1
    found[0].check(now=True)


def test_a_claim_that_was_left_half_made_holds_nobody_up_for_long(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, errno.ENOLCK)
    folder.make("private")
    folder.lock_claim.touch()
    assert is_held(folder) is not None
    os.utime(folder.lock_claim, (time.time() - 60, time.time() - 60))
    assert is_held(folder) is None


def test_what_was_shown_long_ago_is_not_waited_for(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.make("private")
    OnAnotherHost(folder, monkeypatch).die()
    record = json.loads(folder.lock.read_text())
    folder.lock.write_text(json.dumps(record | {"shown_at": time.time() - folder_lock.LONG_AGO - 1}))
    began = time.monotonic()
    assert is_held(folder) is None and time.monotonic() - began < 5


@pytest.mark.parametrize("text", ["", "[" * 4000, "{}", "\x00" * 5000, '{"host": "a\\u001b[2J"}'])
def test_what_no_dstrain_has_written_says_nothing(text: str, folder: RunFolder) -> None:
    folder.make("private")
    folder.lock.write_text(text)
    assert is_held(folder) is None


@pytest.mark.parametrize("number", [None, errno.ENOLCK])
@pytest.mark.parametrize("name", [".lock", ".lock-claim"])
def test_a_lock_that_is_removed_is_made_again(
    name: str, number: int | None, folder: RunFolder, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if number is not None:
        without_locks(monkeypatch, number)
    with locked(folder, say=said.append) as lock:
        (folder.path / name).unlink(missing_ok=True)
        lock.check(now=True)
        lock.check(now=True)
        assert is_held(folder) is not None
    watched = ".lock" if number is None else ".lock-claim"
    assert [line for line in said if "was removed" in line] == (
        [f"{name} of the run folder was removed while the run trained, and was made again"]
        if name == watched
        else []
    )


@pytest.mark.parametrize("others", [None, errno.ENOLCK])
def test_a_lock_that_another_has_taken_ends_the_run(
    others: int | None, folder: RunFolder, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    with locked(folder) as lock:
        folder.lock.unlink()
        process = hold(others)
        before = folder.lock.read_text()
        with pytest.raises(
            DstrainError, match=f"was removed while it trained, and .*process {process.pid} on"
        ) as end:
            lock.check(now=True)
        assert end.value.exit_code == 1
    assert folder.lock.read_text() == before, "it is the other's"


def remove(folder: RunFolder) -> None:
    shutil.rmtree(folder.path)


def move(folder: RunFolder) -> None:
    folder.path.rename(folder.path.with_name("moved"))


def replace(folder: RunFolder) -> None:
    move(folder)
    folder.path.mkdir()


@pytest.mark.parametrize("change", [remove, move, replace])
def test_a_folder_that_is_lost_ends_the_run(change: Callable[[RunFolder], None], folder: RunFolder) -> None:
    with (
        pytest.raises(DstrainError, match="its folder was deleted, moved or replaced") as end,
        locked(folder) as lock,
    ):
        lock.check(now=True)
        change(folder)
        began = time.monotonic()
        while time.monotonic() - began < 10:
            time.sleep(0.1)
            lock.check()
    assert end.value.exit_code == 1 and time.monotonic() - began < 5
    assert not folder.path.exists() or not list(folder.path.iterdir())


def test_a_run_that_ends_just_then_ends_for_that(folder: RunFolder) -> None:
    """Its ranks have failed for want of the folder, in the second in which it was waited for."""
    with pytest.raises(DstrainError, match="its folder was deleted"), locked(folder) as lock:
        remove(folder)
        lock._looked_at = 0.0
        lock.check()
        lock.check(now=True)


def test_a_folder_that_is_out_of_sight_for_a_moment_is_not_lost(folder: RunFolder) -> None:
    with locked(folder) as lock:
        move(folder)
        lock._looked_at = 0.0
        lock.check()
        folder.path.with_name("moved").rename(folder.path)
        time.sleep(1.2)
        lock.check(now=True)
