"""What the kernel says of a process that it killed for want of memory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dstrain.runs import this_machine
from dstrain.runs.this_machine import OutOfMemory

LINE = "Out of memory: Killed process 77 (python) total-vm:9kB, anon-rss:8kB, file-rss:0kB, UID:0"


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for /dev/kmsg, in the first pid namespace; there is no control group."""
    monkeypatch.setattr(this_machine, "_kills_in_own_group", lambda: None)
    monkeypatch.setattr(this_machine, "_in_first_namespace", lambda: True)
    path = tmp_path / "kmsg"
    path.write_text("4,1,1,-;Killed process 78 (python) long ago\n")
    return path


def test_the_kernels_line_is_quoted(log: Path) -> None:
    asked = OutOfMemory(str(log))
    assert asked.words(77) is None
    with log.open("a") as file:
        file.write(f"3,2,2,-;{LINE}\n SUBSYSTEM=memory\n")
    assert asked.words(77) == f"the kernel says: {LINE}"
    assert asked.words(77) == f"the kernel says: {LINE}", "it is kept"
    assert asked.words(78) is None, "that was before"
    assert asked.words(5) is None, "that was another"


@pytest.mark.parametrize(
    ("name", "seconds_ago", "counts"),
    [("python", 0, True), ("postgres", 0, False), ("python", 3600, False)],
)
def test_a_container_has_other_numbers(
    log: Path, monkeypatch: pytest.MonkeyPatch, name: str, seconds_ago: int, counts: bool
) -> None:
    """The log tells of all containers: only what could be this death counts."""
    monkeypatch.setattr(this_machine, "_in_first_namespace", lambda: False)
    monkeypatch.setattr(this_machine, "_text", lambda path: "python\n")
    asked = OutOfMemory(str(log))
    with log.open("a") as file:
        at = max(0, int((time.monotonic() - seconds_ago) * 1e6))
        file.write(f"3,2,{at},-;{LINE.replace('python', name)}\n")
    assert (asked.words(5) is not None) is counts


def test_a_log_that_may_not_be_read_says_nothing(log: Path, tmp_path: Path) -> None:
    assert OutOfMemory(str(tmp_path / "none")).words(77) is None


@pytest.mark.parametrize(
    ("groups", "path", "text"),
    [
        ("0::/job", "/sys/fs/cgroup/job/memory.events", "low 0\noom 3\noom_kill {}\n"),
        (
            "9:name=systemd:/\n4:memory:/job\n0::/",
            "/sys/fs/cgroup/memory/job/memory.oom_control",
            "oom_kill_disable 0\noom_kill {}\n",
        ),
    ],
    ids=["version-2", "version-1"],
)
def test_the_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, path: str, text: str
) -> None:
    files = {"/proc/self/cgroup": groups, path: text.format(2)}
    monkeypatch.setattr(this_machine, "_text", lambda name: files.get(name, ""))
    asked = OutOfMemory(str(tmp_path / "none"))
    assert asked.words(77) is None
    files[path] = text.format(3)
    assert asked.words(77) == "its control group counts an out-of-memory kill"
