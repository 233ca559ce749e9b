"""Ranks for tests: over gloo on CPUs, over NCCL on GPUs (``DS_ACCELERATOR=cuda``). Every job gets fresh processes.

A fork server imports torch, DeepSpeed and transformers a single time (6-12 s for four interpreters
otherwise); forking a world from it takes milliseconds, and no job sees another's global state.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Read once by the libraries when the fork server imports them.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("DS_LOG_LEVEL", "warning")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("PYTHONWARNINGS", "ignore")

# Python 3.11's fork server does not take over sys.path, and passes over what it can't import.
_ROOT = str(Path(__file__).resolve().parents[3])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.support.distributed.preload"])


class WorkerError(AssertionError):
    """A rank raised; the message holds its traceback."""


def run(
    world_size: int,
    job: Callable[..., Any],
    *args: Any,
    timeout: float = 240.0,
    patience: float | None = None,
) -> list[Any]:
    """Run ``job(rank, *args)`` in a world of processes; its results in the order of ranks.

    Args:
        patience: seconds that a rank waits in a collective of the default group; None: as long as torch does.

    Raises:
        WorkerError: a rank raised, died, or said nothing for ``timeout`` seconds.
    """
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        workers = []
        for rank in range(world_size):
            here, there = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_main, args=(there, rank, world_size, store, patience, job, args), daemon=True
            )
            process.start()
            there.close()
            workers.append((process, here))
        try:
            return _collect([connection for _, connection in workers], timeout)
        finally:
            for process, _ in workers:
                process.kill()
                process.join()


def _collect(connections: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = [connection for rank, connection in enumerate(connections) if rank not in results]
        ready = wait(waiting, timeout)
        if not ready:
            raise WorkerError(f"no word from ranks {sorted(set(range(len(connections))) - set(results))}")
        for connection in ready:
            rank = connections.index(connection)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                raise WorkerError(f"rank {rank} died") from None
            if not ok:
                raise WorkerError(f"rank {rank}:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _main(
    connection: Connection,
    rank: int,
    world_size: int,
    store: str,
    patience: float | None,
    job: Callable[..., Any],
    args: tuple,
) -> None:
    try:
        import torch
        import torch.distributed

        torch.set_num_threads(1)
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        on_gpus = os.environ["DS_ACCELERATOR"] == "cuda"
        if on_gpus:
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group(
            "nccl" if on_gpus else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=None if patience is None else timedelta(seconds=patience),
        )
        _send(connection, (True, job(rank, *args)))
    except BaseException:
        _send(connection, (False, traceback.format_exc()))


def _send(connection: Connection, message: tuple[bool, Any]) -> None:
    """By value: a connection's own pickler would hand out tensors as files of a process that ends."""
    connection.send_bytes(pickle.dumps(message))
