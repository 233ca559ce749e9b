"""torch's rendezvous store for ranks of one host: rank 0 listens on the loopback interface alone.

``env://``, torch's own way to meet, listens on all addresses, also where the master's is 127.0.0.1. Whoever reaches the
store reads and writes in it without a word of who he is.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.constants import default_pg_timeout
from torch.distributed.rendezvous import register_rendezvous_handler

from dstrain.runs.this_machine import is_loopback, loopback_address

_SCHEME = "dstrain-loopback"


def init_method(environ: Mapping[str, str] = os.environ) -> str | None:
    """What `torch.distributed.init_process_group` is given; None, torch's own way, where the ranks are on several
    hosts, or torchrun's agent holds the store."""
    if environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return None
    return f"{_SCHEME}://" if is_loopback(environ.get("MASTER_ADDR", "")) else None


def _meet(url: str, timeout: timedelta = default_pg_timeout, **_: Any) -> Iterator[tuple[Store, int, int]]:
    """A rendezvous handler. Raises OSError in rank 0 where the port is taken."""
    rank, world_size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    address = os.environ["MASTER_ADDR"]
    if address.lower() == "localhost":  # which may be either
        address = loopback_address()
    descriptor = None
    if rank == 0:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        descriptor = socket.create_server((address, port), family=family, backlog=world_size).detach()
    # The store closes what it is given to listen on.
    yield (
        TCPStore(address, port, world_size, rank == 0, timeout, master_listen_fd=descriptor),
        rank,
        world_size,
    )


register_rendezvous_handler(_SCHEME, _meet)
