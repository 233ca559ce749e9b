"""What a rank reads from its environment and command line, and what it finds out itself."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, Sequence

import psutil

from dstrain.errors import DstrainError
from dstrain.planning.layout import HOSTS, STORE_PORT
from dstrain.runs.run_folder import DIRECTORY, QUOTED, RunFolder
from dstrain.runs.this_machine import (
    OUTSIDE,
    OUTSIDE_6,
    address_towards,
    is_loopback,
    loopback_address,
    loopback_card,
)

# RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE by other names. The launchers of DeepSpeed and torch set torch's.
_OTHERS = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_BY_HAND = "--local_rank="
# deepspeed.launcher.multinode_runner, add_export: what holds any but these signs.
_QUOTED = re.compile(r'"([^"]*[^\w@%+=:,./"-][^"]*)"')
_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def typed_by_hand(arguments: Sequence[str]) -> bool:
    """Whether ``deepspeed`` was typed instead of the run's launch.sh: then its launcher adds ``--local_rank=N``."""
    return any(word.startswith(_BY_HAND) for word in arguments)


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The arguments but that one: its number also stands in LOCAL_RANK."""
    return [word for word in arguments if not word.startswith(_BY_HAND)]


def launch_variables(folder: RunFolder) -> dict[str, str]:
    """What launch.sh would have brought: the run folder's ``environment``. Raises OSError where there is none."""
    lines = folder.environment.read_text(encoding="utf-8").splitlines()
    return dict(line.split("=", 1) for line in lines)


def enter_directory(environ: Mapping[str, str]) -> None:
    """Go to the folder that relative paths count from, where the launch named one. Raises OSError."""
    directory = environ.get(DIRECTORY)
    if directory:
        os.chdir(directory)


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torch wants them; those of one process where nobody says.

    Sources: Open MPI, "Environment variables for MPI processes"; Slurm, srun(1) "OUTPUT ENVIRONMENT VARIABLES".
    """
    if "RANK" in environ:
        return {name: environ[name] for name in _NAMES if name in environ}
    for names in _OTHERS:
        if names[0] in environ:
            return {ours: environ[name] for ours, name in zip(_NAMES, names, strict=True) if name in environ}
    return {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def without_quotes(environ: Mapping[str, str]) -> dict[str, str]:
    """What the launch hands on as it was before DeepSpeed put it in quotes for a remote shell, which Open MPI does not
    have: an IPv6 address in brackets, a path with a space."""
    if "OMPI_COMM_WORLD_RANK" not in environ:
        return {}
    handed_on = environ.get(QUOTED, "").split(",")
    quoted = {
        name: _QUOTED.fullmatch(value)
        for name, value in environ.items()
        if name.startswith("DSTRAIN_") or name in handed_on
    }
    return {name: match[1] for name, match in quoted.items() if match}


def loopback_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """MASTER_ADDR, and MASTER_PORT where the launcher has chosen another one than the launch, for ranks that are all
    on this host: they meet at its loopback address, whatever name the host has. Empty for others, and where the
    launcher's own process holds torch's store, at an address that only it knows.

    Args:
        environ: with `rank_variables`.
    """
    # The latter is by DeepSpeed's launcher.
    local = environ.get("LOCAL_WORLD_SIZE") or environ.get("LOCAL_SIZE")
    if local != environ["WORLD_SIZE"] or environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):
        return {}
    found = {"MASTER_ADDR": loopback_address()}
    return found | ({"MASTER_PORT": environ[STORE_PORT]} if STORE_PORT in environ else {})


def refuse_another_world(ranks: int, folder: RunFolder, environ: Mapping[str, str]) -> None:
    """Raises DstrainError where there are more or fewer ranks than the plan's: only a person can start those."""
    started = int(environ["WORLD_SIZE"])
    if started != ranks:
        raise DstrainError(
            f"the plan is for {ranks} ranks, but {started} were started",
            where=str(folder.plan),
            hint=f"`bash {folder.launch_script}` starts those of the plan; its last line shows how",
        )


def network_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The network card that the ranks of several hosts talk through, for gloo and NCCL; what is set already is kept.

    gloo listens at the address of the own host name. Debian writes 127.0.1.1 for that into /etc/hosts: no other
    host finds it there, and all wait (``connectFullMesh``). So each rank names the card behind which the master is;
    on the master's own host, the card that owns its address. Where that is a loopback address, only others know the
    master by the right one, and the card is that to the next host (``DSTRAIN_HOSTS``), or to the outside.

    The ranks of one host, whose master is a loopback address, talk through the loopback interface, and nobody reaches
    them from outside. Nothing is set where no card is found.
    """
    master = environ.get("MASTER_ADDR")
    if not master:
        return {}
    if is_loopback(master):
        card = loopback_card()
    elif environ.get(_GLOO):
        return {}
    else:
        places = [master, *environ.get(HOSTS, "").split(","), OUTSIDE, OUTSIDE_6]
        card = next((found for place in places if place and (found := card_towards(place))), None)
    if card is None:
        return {}
    # NCCL reads the beginning of a name, unless it is told that it is all of it.
    return {name: value for name, value in ((_GLOO, card), (_NCCL, f"={card}")) if not environ.get(name)}


def card_towards(place: str) -> str | None:
    """The network interface by which packets to ``place`` (name or address) leave, or that owns it.

    None where it has no address, no way leads there, or it is this machine under a loopback address.
    """
    try:
        found = socket.getaddrinfo(place, None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    for family, _, _, _, address in found:
        own = address_towards(family, str(address[0]))
        if own is not None and not is_loopback(own):
            return _owner(own)
    return None


def _owner(address: str) -> str | None:
    cards = psutil.net_if_addrs().items()
    # That of a link-local address stands behind a % as well.
    return next(
        (name for name, held in cards if any(one.address.partition("%")[0] == address for one in held)), None
    )
