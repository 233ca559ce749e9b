"""Checks that all hosts agree on the plan, the initial weights and, where needed, a shared run folder."""

from __future__ import annotations

import secrets
import socket
from pathlib import Path
from typing import Any

from torch import distributed

from dstrain.errors import DstrainError
from dstrain.files import write_atomically
from dstrain.json_collectives import all_gather_json, broadcast_json
from dstrain.planning.plan import Plan
from dstrain.runs.checkpoint.manifest import named_checkpoints
from dstrain.runs.run_folder import RunFolder
from dstrain.train.local_run_folder import plan_seen, sees


def check_hosts_agree(folder: RunFolder, plan: Plan) -> None:
    """Refuse what would go wrong later, on all ranks alike. Collective; does nothing for a run on one host.

    Raises:
        DstrainError: the hosts have different plans or pretrained weights; or checkpoints or the last weights are
            wanted, and a host does not share the first one's run folder.
    """
    if len(plan.layout.hosts) < 2:
        return
    _refuse_other_plans(folder)
    if plan.run_config.init == "pretrained":
        _refuse_other_weights(plan.model.weights_folder)
    needed_for = _shared_for(folder, plan)
    if needed_for:
        _refuse_own_folders(folder, *needed_for)


def _refuse_other_plans(folder: RunFolder) -> None:
    seen = _of_all_ranks(plan_seen(folder))
    other = [rank for rank, (_, digest) in enumerate(seen) if digest != seen[0][1]]
    if other:
        hosts = ", ".join(dict.fromkeys(seen[rank][0] for rank in other))
        raise DstrainError(
            f"{hosts} has a different plan than {seen[0][0]} (rank {other[0]})",
            where=str(folder.plan),
            hint="start the run with `dstrain run` or `dstrain resume`, which send the plan to every"
            " host; with --launcher none, use the same arguments and data on every node",
        )


def _refuse_other_weights(model: str) -> None:
    """By the files' names and sizes: reading all bytes on every host would take longer than loading them."""
    files = [
        path for pattern in ("*.safetensors", "*.bin", "*.index.json") for path in Path(model).glob(pattern)
    ]
    seen = _of_all_ranks({path.name: path.stat().st_size for path in files})
    first_host, first = seen[0]
    for host, sizes in seen:
        other = sorted(name for name in first.keys() | sizes.keys() if first.get(name) != sizes.get(name))
        if other:
            shown = ", ".join(other[:4]) + (", ..." if len(other) > 4 else "")
            raise DstrainError(
                f"the model's weight files on {host} are missing or differ from those on {first_host}: {shown}",
                where=model,
                hint=f"copy the folder from {first_host} to the same place there, or name one that all hosts share",
            )


def _shared_for(folder: RunFolder, plan: Plan) -> tuple[str, str] | None:
    """What a shared folder is needed for, as rank 0 sees it, and how to do without; None for nothing."""
    told: tuple[str, str] | None = None
    if distributed.get_rank() == 0:
        if named_checkpoints(folder.checkpoints):
            told = "all ranks read the checkpoint to resume from", ""
        elif plan.run_config.saves:
            why = "all ranks write checkpoints and read them again"
            told = why, "; or --save-every never, which trains without checkpoints"
        elif plan.run_config.save_weights:
            told = "all stages write the final weights", "; or --set save_weights=false"
    of_rank_0 = broadcast_json(told)
    return None if of_rank_0 is None else (of_rank_0[0], of_rank_0[1])


def _refuse_own_folders(folder: RunFolder, needed_for: str, instead: str) -> None:
    """Rank 0 leaves a word that nobody can know; who does not find it has another folder at the same place."""
    mine = secrets.token_hex(8)
    rank = distributed.get_rank()
    if rank == 0:
        write_atomically(folder.shared, mine + "\n")
    word = broadcast_json(mine)
    seen = _of_all_ranks(sees(folder.shared, word))
    if rank == 0:
        folder.shared.unlink(missing_ok=True)
    blind = dict.fromkeys(host for host, sees_it in seen if not sees_it)
    if blind:
        raise DstrainError(
            f"{', '.join(blind)} {'does' if len(blind) == 1 else 'do'} not share the run folder of {seen[0][0]}"
            f" ({folder.path}), and {needed_for}",
            hint="--set runs_dir=FOLDER on storage that all hosts share" + instead,
        )


def _of_all_ranks(mine: Any) -> list[tuple[str, Any]]:
    """(host, value) of each rank."""
    return [(host, value) for host, value in all_gather_json([socket.gethostname(), mine])]
