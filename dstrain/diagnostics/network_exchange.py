"""One rank of the communication test: ``python -m dstrain.diagnostics.network_exchange cpu|cuda``.

Rank and master address come from the environment.

All ranks sum a tensor, then each pair sends one to and fro; what arrives is checked, and how fast it went is said.
Before each part it says what it is about to do, so that the one in which it hangs is known.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dstrain.diagnostics.host import MARK
from dstrain.engine.loopback_store import init_method
from dstrain.strict_json import to_json
from dstrain.train.rank_environment import network_variables

WAIT_SECONDS = {"cpu": 20, "cuda": 180}
"""So long each part may take. On GPUs the first one holds NCCL's start: it looks for the links of every host, connects
all to all, and waits for the last host to have loaded CUDA's libraries."""
_BYTES = 16 * 2**20
_TIMES = 3


def main(device: str) -> None:
    """Take part. Raises RuntimeError where something other arrives than was sent; torch's errors pass."""
    os.environ.update(network_variables(os.environ))
    _say(doing="meeting", card=os.environ.get("GLOO_SOCKET_IFNAME"))
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        backend, init_method=init_method(), timeout=timedelta(seconds=WAIT_SECONDS[device])
    )
    rank, world = dist.get_rank(), dist.get_world_size()
    _say(doing="all-reduce")
    tensor = torch.empty(_BYTES // 4, device=device)
    seconds = _fastest(partial(_all_reduce, tensor, rank, world))
    # What crosses each host's network card: a ring moves 2 (n-1)/n of the tensor (nccl-tests, PERFORMANCE.md).
    _say(done="all-reduce", bytes_per_second=2 * (world - 1) / world * _BYTES / seconds)
    for peer in _peers(rank, world):
        _say(doing="send", peer=peer)
        seconds = _fastest(partial(_to_and_fro, tensor, rank, peer))
        _say(done="send", peer=peer, bytes_per_second=2 * _BYTES / seconds)
    dist.barrier()
    dist.destroy_process_group()


def _all_reduce(tensor: torch.Tensor, rank: int, world: int) -> float:
    """How many seconds it took."""
    tensor.fill_(rank + 1)
    started = _now(tensor)
    dist.all_reduce(tensor)
    seconds = _now(tensor) - started
    _check(tensor, world * (world + 1) / 2)
    return seconds


def _to_and_fro(tensor: torch.Tensor, rank: int, peer: int) -> float:
    """How many seconds it took. The tensor of the lower rank goes to the other one and comes back."""
    tensor.fill_(rank)
    started = _now(tensor)
    if rank < peer:
        dist.send(tensor, peer)
        tensor.fill_(-1)
        dist.recv(tensor, peer)
    else:
        dist.recv(tensor, peer)
        dist.send(tensor, peer)
    seconds = _now(tensor) - started
    _check(tensor, min(rank, peer))
    return seconds


def _now(tensor: torch.Tensor) -> float:
    """The time when all that was asked of the tensor's device is done."""
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def _check(tensor: torch.Tensor, value: float) -> None:
    if not bool((tensor == value).all()):
        wrong = tensor[tensor != value][:5].tolist()
        raise RuntimeError(f"received {wrong} instead of {value}")


def _fastest(do: Callable[[], float]) -> float:
    """The seconds of the fastest of a few times; the first one, which opens connections, is not counted."""
    do()
    return min(do() for _ in range(_TIMES))


def _peers(rank: int, world: int) -> Iterator[int]:
    """Whom this rank meets, one after the other, so that all pairs of a round are apart: the circle method of
    tournaments. With an odd number, the one that would meet nobody waits a round."""
    seats = world + world % 2
    last = seats - 1
    for turn in range(last):
        if rank == last:
            peer = turn
        elif rank == turn:
            peer = last
        else:
            peer = (2 * turn - rank) % last
        if peer < world and peer != rank:
            yield peer


def _say(**what: Any) -> None:
    print(f"{MARK}{to_json(what)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
