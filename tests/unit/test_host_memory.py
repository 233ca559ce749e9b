"""How much memory a copy of a checkpoint may take, read from folders like those of Linux."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.train.checkpointing.background_writer import available_memory, room_for_copy


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """4,000 kB are available, and there is no control group with a limit."""
    write(tmp_path / "proc/meminfo", "MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable: 4000 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    return tmp_path


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(text))


def limit(group: Path, most: object, used: int, reclaimable: int) -> None:
    write(group / "memory.max", most)
    write(group / "memory.current", used)
    write(group / "memory.stat", f"anon 5\ninactive_file {reclaimable}\nactive_file 7\n")


def test_what_the_machine_has(host: Path) -> None:
    assert available_memory(host) == 4_096_000


@pytest.mark.parametrize(
    ("most", "used", "reclaimable", "left"),
    [(1000, 700, 200, 500), ("max", 700, 200, 4_096_000), (1000, 1500, 0, 0), (10**12, 0, 0, 4_096_000)],
)
def test_within_a_container(host: Path, most: object, used: int, reclaimable: int, left: int) -> None:
    limit(host / "sys/fs/cgroup", most, used, reclaimable)
    assert available_memory(host) == left


def test_the_tightest_of_nested_groups_counts(host: Path) -> None:
    write(host / "proc/self/cgroup", "0::/slurm/job_7/step_0\n")
    limit(host / "sys/fs/cgroup/slurm/job_7/step_0", "max", 0, 0)
    limit(host / "sys/fs/cgroup/slurm/job_7", 3000, 1000, 0)
    limit(host / "sys/fs/cgroup/slurm", 100_000, 1000, 0)
    assert available_memory(host) == 2000


def test_the_first_version_of_control_groups(host: Path) -> None:
    write(host / "proc/self/cgroup", "4:memory,hugetlb:/job\n2:cpu:/job\n0::/\n")
    group = host / "sys/fs/cgroup/memory/job"
    write(group / "memory.limit_in_bytes", 5000)
    write(group / "memory.usage_in_bytes", 2000)
    write(group / "memory.stat", "inactive_file 1\ntotal_inactive_file 500\n")
    assert available_memory(host) == 3500


def test_unknown_is_none_at_all(tmp_path: Path) -> None:
    assert available_memory(tmp_path) == 0


def test_ranks_of_a_host_share_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.train.checkpointing.background_writer.available_memory", lambda: 8000)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert room_for_copy() == 4000
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert room_for_copy() == 500
    monkeypatch.setenv("LOCAL_SIZE", "2")
    assert room_for_copy() == 2000
