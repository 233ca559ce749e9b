"""Workers: results in the order of their jobs, errors in their place, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dstrain.data.tokenizing.worker_pool import WorkerPool, available_cores
from dstrain.errors import DstrainError
from tests.support.worker_jobs import Work


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_the_jobs(workers: int) -> None:
    jobs = ["sleep 0.3", *(f"job {number}" for number in range(40)), "sleep 0.1", "last"]
    with WorkerPool(Work(), workers) as pool:
        found = list(pool.map(iter(jobs)))
        again = list(pool.map(["once more"]))
    assert [job for job, _ in found] == [result[0] for _, result in found] == jobs
    assert again[0][1][0] == "once more"
    processes = {result[2] for _, result in found}
    assert processes == {os.getpid()} if workers == 0 else os.getpid() not in processes
    assert len(processes) <= max(1, workers)


def test_no_more_jobs_are_taken_than_are_worked_on() -> None:
    taken = 0

    def jobs() -> Iterator[str]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield f"job {number}"

    with WorkerPool(Work(), 2) as pool:
        for number, _ in enumerate(pool.map(jobs())):
            assert taken <= number + 1 + 8
            if number == 50:
                break


def test_large_jobs_and_results_do_not_wait_for_each_other() -> None:
    """Both sides write more than a socket holds, at the same time."""
    with WorkerPool(Work(), 1) as pool:
        found = list(pool.map("large " + letter * 20 for letter in "abcdef"))
    assert [result[0][0] for _, result in found] == list("abcdef")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("bad", "error"), [("refuse it", DstrainError), ("break it", KeyError)])
def test_an_error_comes_in_its_place(workers: int, bad: str, error: type[Exception]) -> None:
    given = []
    with WorkerPool(Work(), workers) as pool:
        with pytest.raises(error, match="it") as caught:
            for job, _ in pool.map(["sleep 0.2", "b", bad, "refuse later", "c"]):
                given.append(job)
        assert given == ["sleep 0.2", "b"]
        assert [job for job, _ in pool.map(["d", "e"])] == ["d", "e"]
    if error is DstrainError:
        assert (caught.value.hint, caught.value.where) == ("a hint", "a place")


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_reader_comes_behind_what_was_read(workers: int) -> None:
    def jobs() -> Iterator[str]:
        yield from ("sleep 0.2", "b")
        raise DstrainError("cut off")

    given = []
    with WorkerPool(Work(), workers) as pool, pytest.raises(DstrainError, match="cut off"):
        for job, _ in pool.map(jobs()):
            given.append(job)
    assert given == ["sleep 0.2", "b"]


def test_an_error_of_an_earlier_record_is_told_first() -> None:
    def jobs() -> Iterator[str]:
        yield "refuse this"
        raise DstrainError("cut off")

    with WorkerPool(Work(), 2) as pool, pytest.raises(DstrainError, match="this"):
        list(pool.map(jobs()))


def test_a_worker_that_dies_is_an_error_with_a_way_out() -> None:
    before = set(psutil.Process().children())  # of other tests, such as the fork server
    with WorkerPool(Work(), 2) as pool:
        with pytest.raises(DstrainError, match="was ended by SIGKILL") as caught:
            list(pool.map(["a", "die", "sleep 0.1", "b"]))
        assert "memory" in (caught.value.hint or "") and caught.value.exit_code == 1
        assert [job for job, _ in pool.map(["c"])] == ["c"]  # with new ones
    assert set(psutil.Process().children()) <= before


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests.support.worker_jobs import Work
from dstrain.data.tokenizing.worker_pool import WorkerPool
with WorkerPool(Work(), 2) as pool:
    for job, result in pool.map(["a", "b", "c", "sleep 100", "sleep 100"]):
        print(result[2], flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_none_is_left_when_the_parent_ends(number: signal.Signals) -> None:
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", SCRIPT.format(root=root)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        for _ in range(3):
            assert parent.stdout.readline()
        workers = psutil.Process(parent.pid).children()
        assert len(workers) == 2
        os.kill(parent.pid, number)
        parent.wait(timeout=30)
        _, alive = psutil.wait_procs(workers, timeout=30)
        assert not alive


def test_cores_that_may_be_used() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)
