"""Somebody else starts the ranks: a person who types the command, or Kubernetes on every node (``none``)."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dstrain.cli.planning import Planned
from dstrain.cli.running.attempt import launch_request, locked, prepare
from dstrain.cli.running.starting import refuse_full_disk, refuse_other_training
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.plan.run_folder import RunFolder


def node_of(resolved: ResolvedConfig, node_rank: int | None) -> int | None:
    """The number of this node, or None where none was given.

    Raises:
        DstrainError: the launcher has no use for it, there are fewer nodes, or each would name the run by itself.
    """
    config = resolved.config
    if config.launcher == "none" and config.name is None:
        raise DstrainError(
            "every node must call the run by the same name", where="--launcher none", hint="--name NAME"
        )
    if node_rank is None:
        return None
    if config.launcher != "none":
        raise DstrainError(
            "a node's number is for --launcher none, where dstrain is typed on every node",
            where="--node-rank",
            hint="leave it out, or say --launcher none --nodes N",
        )
    nodes = config.nodes or 1
    if node_rank >= nodes:
        raise DstrainError(
            f"there is no node {node_rank} among {nodes}",
            where="--node-rank",
            hint="they are counted from 0; --nodes N says how many there are",
        )
    return node_rank


def prepare_to_be_typed(
    planned: Planned, resolved: ResolvedConfig, folder: RunFolder, console: Console
) -> None:
    """Fill the run folder, and say what starts it.

    Raises:
        DstrainError: another training lies in the folder, or goes on in it; it can't be written; the disk is full.
    """
    refuse_other_training(planned.plan, folder, console)
    refuse_full_disk(planned.plan, folder)
    request = launch_request(planned, folder)
    with locked(folder):
        prepare(request, planned, resolved, folder)
    which = [str(folder.node)] if request.launcher == "none" else []
    ways = {"type     ": ["bash", str(folder.launch_script), *which]}
    if request.launcher == "pdsh":
        alone = ["--force_multi"] if len(request.hosts) == 1 else []
        address = ["--master_addr", request.master_addr] if resolved.config.master_addr else []
        place = ["--hostfile", str(folder.hostfile), *alone, *address]
        ways["or here  "] = ["deepspeed", *place, "--module", *request.worker]
    for beginning, way in ways.items():
        console.print(Text.assemble((beginning, "bold"), shlex.join(way)), soft_wrap=True)
    console.print(
        Text(
            "Nobody watches these ranks: a lost one may leave the others waiting. `dstrain resume"
            f" {folder.path}` starts them and watches."
        ),
        soft_wrap=True,
    )


def prepare_for_nodes(
    planned: Planned, resolved: ResolvedConfig, folder: RunFolder, console: Console, *, dry_run: bool
) -> None:
    """Fill the run folder, and say what to type on each node. Raises DstrainError where it can't be written."""
    if not dry_run:
        prepare(launch_request(planned, folder), planned, resolved, folder)
    place = shlex.quote(str(Path.cwd()))
    for node in range(len(planned.site.hosts)):
        command = shlex.join(["dstrain", "resume", str(folder.path), "--node-rank", str(node)])
        console.print(Text.assemble((f"node {node}  ", "bold"), f"cd {place} && {command}"), soft_wrap=True)
    console.print(
        "The order does not matter: node 0 waits ten minutes for the others. Each watches its own ranks.",
        soft_wrap=True,
    )
