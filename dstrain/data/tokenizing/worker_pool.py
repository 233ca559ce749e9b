"""Worker processes that do the same work for many jobs, and give the results in the order of the jobs.

    with WorkerPool(TextEncoder(tokenizer), workers=4) as pool:
        for job, encoded in pool.map(batches_of(pieces)):
            ...

The work is any picklable callable; it is sent to each worker once, the jobs one by one. Workers are new interpreters
and no forks, since the threads of libraries do not survive one. They start with the first job.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

from dstrain.child_process import start_worker
from dstrain.errors import DstrainError

Job = TypeVar("Job")
Result = TypeVar("Result")

_AHEAD = 2
"""Jobs that a worker holds: the next one is there when it has done one."""
_WINDOW = 4
"""Jobs for each worker whose results are not taken yet; those behind a slow one wait in memory."""
_WORKS_ALONE = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


class WorkerPool(Generic[Job, Result]):
    """An ordered pool of processes for one kind of work.

    Nothing of it is left behind: workers end with the context, and with the thread that has started them, however that
    ends.

    Args:
        work: called with each job; picklable with all that it holds. What it changes of itself stays in its worker.
        workers: how many processes; 0: the work is done in this one, by the same calls.
    """

    def __init__(self, work: Callable[[Job], Result], workers: int) -> None:
        self._work = work
        self._count = workers
        self._workers: list[_Worker] = []

    def __enter__(self) -> WorkerPool[Job, Result]:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, whatever they are doing."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def map(self, jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
        """Each job with its result, in their order. Of the jobs no more are taken than are worked on.

        What a job raises, and what the iterable of jobs raises, comes in the place of that result: those before it are
        given first.

        Raises:
            WorkerEndedError: a worker has ended, as one that is killed.
        """
        if self._count == 0:
            for job in jobs:
                yield job, self._work(job)
            return
        if not self._workers:
            content = pickle.dumps(self._work, protocol=pickle.HIGHEST_PROTOCOL)
            for _ in range(self._count):
                self._workers.append(_Worker(content))
        finished = False
        try:
            yield from self._map(iter(jobs))
            finished = True
        finally:
            if not finished:  # results of this call would be taken for those of the next one
                self.close()

    def _map(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Result]]:
        asked: dict[int, Job] = {}  # not given yet, in their order
        found: dict[int, _Answer] = {}
        first = number = 0  # of the next one to give, and to ask for
        failure: BaseException | None = None
        more = True
        while True:
            self._receive(found, timeout=0)
            while more and number - first < _WINDOW * self._count:
                worker = min(self._workers, key=lambda worker: worker.jobs)
                if worker.jobs >= _AHEAD:
                    break
                try:
                    job = next(jobs)
                except StopIteration:
                    more = False
                except Exception as error:
                    failure, more = error, False
                else:
                    worker.send(number, job)
                    asked[number] = job
                    number += 1
            if first in found:
                answer = found.pop(first)
                if answer.error is not None:
                    raise answer.error from answer.cause
                yield asked.pop(first), answer.result
                first += 1
            elif first == number:
                if failure is not None:
                    raise failure
                return
            else:
                self._receive(found, timeout=None)

    def _receive(self, found: dict[int, _Answer], timeout: float | None) -> None:
        """Add the answers that are there, or that come first."""
        workers = {worker.connection: worker for worker in self._workers}
        for connection in wait(list(workers), timeout):
            assert isinstance(connection, Connection)
            number, answer = workers[connection].receive()
            found[number] = answer


class WorkerEndedError(DstrainError):
    """A worker was ended by somebody else: what was done before it is as good as ever."""


class _Answer:
    """A result, or what was raised and where."""

    def __init__(self, result: Any = None, error: BaseException | None = None, trace: str = "") -> None:
        self.result = result
        self.error = error
        self._trace = trace

    @property
    def cause(self) -> BaseException | None:
        return None if isinstance(self.error, DstrainError) else RuntimeError(f"in a worker:\n{self._trace}")


class _Worker:
    """A process, and the connection to it."""

    def __init__(self, work: bytes) -> None:
        ours, its = socket.socketpair()
        with ours, its:
            self._process = start_worker(__name__, [str(its.fileno())], its.fileno(), _WORKS_ALONE)
            self.connection = Connection(ours.detach())
        self.jobs = 0
        self._send(work)

    def send(self, number: int, job: Any) -> None:
        self.jobs += 1
        self._send(pickle.dumps((number, job), protocol=pickle.HIGHEST_PROTOCOL))

    def receive(self) -> tuple[int, _Answer]:
        try:
            number, answer = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        self.jobs -= 1
        return number, answer

    def close(self) -> None:
        self.connection.close()
        self._process.kill()
        self._process.wait()

    def _send(self, content: bytes) -> None:
        try:
            self.connection.send_bytes(content)
        except OSError:
            raise self._ended() from None

    def _ended(self) -> WorkerEndedError:
        with suppress(OSError):
            self.connection.close()
        try:
            code = self._process.wait(timeout=10)
            how = f"ended with exit code {code}"
        except Exception:  # it goes on
            code, how = 0, "closed its connection"
        if code < 0:
            known = -code in set(signal.Signals)
            how = f"was ended by {signal.Signals(-code).name if known else f'signal {-code}'}"
        return WorkerEndedError(
            f"a worker process {how} while it had work to do",
            hint="one that is killed has often run out of memory: fewer of them (--workers 1, or 0 for none), or"
            " more memory",
            exit_code=1,
        )


def available_cores() -> int:
    """How many cores this process may use at once: those that it is bound to, within the limit of its cgroup."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError, IndexError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()[:2]
        if quota != "max":
            cores = min(cores, -(-int(quota) // int(period)))
    return max(1, cores)


def main(argv: list[str]) -> int:
    """A worker: reads the work, then jobs, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; its parent ends it
    connection = Connection(int(argv[0]))
    jobs: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    content = connection.recv_bytes()
    work = None

    def read() -> None:
        # In a thread, so that neither side ever waits to write while the other one does.
        try:
            while True:
                jobs.put(connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # the parent needs no more, or is gone

    threading.Thread(target=read, daemon=True).start()
    while True:
        number, job = jobs.get()
        try:
            work = work or pickle.loads(content)
            answer = _Answer(work(job))
        except Exception as error:
            answer = _Answer(error=error, trace=traceback.format_exc())
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.send_bytes(_pickled(number, answer))


def _pickled(number: int, answer: _Answer) -> bytes:
    try:
        content = pickle.dumps((number, answer), protocol=pickle.HIGHEST_PROTOCOL)
        if answer.error is not None:
            pickle.loads(content)  # an exception whose constructor wants more can be written, but not read
        return content
    except Exception:
        error = RuntimeError(f"{type(answer.error or answer.result).__name__} can't be sent")
        return pickle.dumps((number, _Answer(error=error, trace=answer._trace or traceback.format_exc())))


if __name__ == "__main__":
    # Under its own name, so that what is pickled here has the classes that are read there.
    from dstrain.data.tokenizing import worker_pool

    sys.exit(worker_pool.main(sys.argv[1:]))
