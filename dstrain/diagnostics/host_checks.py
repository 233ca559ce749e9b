"""Checks all hosts of a run at once, in full or quickly before a run; a fault of one host does not hide another's."""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from dstrain.diagnostics import network
from dstrain.diagnostics.diagnosis import (
    FAILED,
    OK,
    Check,
    judge_clock,
    judge_facts,
    judge_folders,
    judge_names,
)
from dstrain.diagnostics.host_facts import facts as facts_here
from dstrain.diagnostics.network import HERE
from dstrain.diagnostics.remote_session import Conversation, NoAnswerError, ask_all
from dstrain.errors import DstrainError
from dstrain.launch.gpus import DRIVER_SECONDS, ON_CPU
from dstrain.launch.hosts import is_this_host, numbered_hosts
from dstrain.launch.launch_spec import LaunchSpec
from dstrain.launch.ssh_reachability import Trouble
from dstrain.planning.layout import Host
from dstrain.runs.this_machine import port_taken

# Python and the modules may lie on a slow shared disk; ssh itself gives up sooner. A driver may take its time, too.
_FACTS_SECONDS = 30.0 + DRIVER_SECONDS
_TIME_SECONDS = 5.0
_TIMES = 5


def examine_hosts(
    hosts: Sequence[Host],
    *,
    environment: Mapping[str, str],
    runs: Path,
    python: str = sys.executable,
    thorough: bool = True,
    here_without_ssh: Callable[[str], bool] = lambda host: False,
    master_port: int | None = None,
    cpu_for_want_of_gpus: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[Check]:
    """Look at several machines, or at one that is not this one.

    Args:
        hosts: with the slots that the hostfile gives them.
        environment: what ranks would have there.
        runs: the folder that holds run folders; it need not exist yet.
        python: the interpreter that ranks are started with, at the same path on all hosts.
        thorough: try all pairs, and an exchange through torch.distributed; without it this takes a second or two.
        here_without_ssh: whether a host is this machine, and its ranks start without ssh.
        master_port: where the ranks are to meet on the first host, if that is known.
        cpu_for_want_of_gpus: the run is planned for CPUs since this machine has nothing else, and nobody asked for it:
            a host with GPUs is no fit then.
        say: gets a line now and then while an exchange lasts.

    Returns:
        What was found, host after host; what concerns this machine first.
    """
    slots = {host.name: host.slots for host in hosts}
    directory = os.getcwd()
    with ExitStack() as stack:
        folder, token, checks = stack.enter_context(_token_in(runs))
        questions = {"directory": directory, "runs": str(folder), "token": token}
        begun = []
        for name in slots:
            over_ssh = not here_without_ssh(name)
            talk = Conversation(
                name, environment=environment, directory=directory, python=python, over_ssh=over_ssh
            )
            begun.append(stack.enter_context(talk))
        here = facts_here(**questions)
        facts: dict[str, dict[str, Any]] = {}
        answers = ask_all(begun, "facts", seconds=_FACTS_SECONDS, **questions)
        for name, answer in zip(slots, answers, strict=True):
            if isinstance(answer, Trouble):
                checks.append(Check(name, "ssh", FAILED, answer.message, answer.fix))
            else:
                facts[name] = answer
        there = [talk for talk in begun if talk.host in facts]
        differ = [talk for talk in there if _source(facts[talk.host]) != _source(here)]
        if differ:  # on a shared disk a file may have been saved between two answers: once more, together
            here = facts_here(**questions)
            answers = ask_all(differ, "facts", seconds=_FACTS_SECONDS, **questions)
            for talk, answer in zip(differ, answers, strict=True):
                if not isinstance(answer, Trouble):
                    facts[talk.host] = answer
        here["driver"] = next((one["driver"] for one in (here, *facts.values()) if one["driver"]), None)
        gpus = any(one["devices"] and one["devices"]["kind"] == "cuda" for one in facts.values())
        for name, found in facts.items():
            checks.append(Check(name, "ssh", OK, "answers"))
            if cpu_for_want_of_gpus and found["devices"] and found["devices"]["kind"] == "cuda":
                checks.append(_unused_gpus(name, found["devices"]["count"]))
                continue
            checks += judge_facts(name, slots[name], found, here, gpus=gpus and not cpu_for_want_of_gpus)
            checks += judge_folders(name, directory, str(folder), found)
        checks += judge_names({name: found["machine"] for name, found in facts.items()})
        checks += _clocks(there)
        if master_port is not None and there and there[0].host == next(iter(slots)):
            checks += _master_port(there[0], master_port)
        ports = network.check_ports(there, all_pairs=thorough)
        checks += ports
        if thorough and len(there) > 1 and all(check.status == OK for check in ports):
            checks += network.exchange(there, "cuda" if gpus else "cpu", say=say)
    places = {name: place for place, name in enumerate(slots)}
    return sorted(checks, key=lambda check: places.get(check.host, -1))


def examine_this_machine(
    *,
    environment: Mapping[str, str],
    runs: Path,
    slots: int = 0,
    thorough: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Check]:
    """Look at this machine alone; ``thorough``: with an exchange between its GPUs, or two processes of it. ``say``
    gets a line now and then while that lasts."""
    name, directory = socket.gethostname(), os.getcwd()
    with ExitStack() as stack:
        folder, token, checks = stack.enter_context(_token_in(runs))
        here = facts_here(directory, str(folder), token)
        found = judge_facts(name, slots, here, here, gpus=False)
        # Ranks of one host talk through the loopback device, whatever the host is called.
        checks += [check for check in found if check.check != "own name"]
        devices = here["devices"] or {"kind": "cpu", "count": 0}
        ranks = devices["count"] if devices["kind"] == "cuda" else 2
        if not thorough:
            return checks
        talks = []
        for _ in range(ranks):
            talk = Conversation(name, environment=environment, directory=directory, over_ssh=False)
            talks.append(stack.enter_context(talk))
        if ranks > 1:
            checks += network.exchange(talks, devices["kind"], on_one_machine=True, say=say)
    return checks


def _unused_gpus(host: str, count: int) -> Check:
    message = f"it has {count} GPUs, but the plan is for CPUs: it was made on this machine, which has no GPU"
    return Check(host, "devices", FAILED, message, f"start the run on a machine with such GPUs; {ON_CPU}")


def _source(facts: Mapping[str, Any]) -> str:
    return str(facts["versions"]["dstrain"])


def _clocks(talks: Sequence[Conversation]) -> list[Check]:
    with ThreadPoolExecutor(max_workers=max(1, len(talks))) as pool:
        return [check for check in pool.map(_clock, talks) if check is not None]


def _clock(talk: Conversation) -> Check | None:
    """From the quickest of a few questions: the clock there stood at the answer somewhere between two of ours."""
    trips = []
    for _ in range(_TIMES):
        before, started = time.time(), time.monotonic()
        try:
            there = float(talk.ask("time", seconds=_TIME_SECONDS)["time"])
        except NoAnswerError:
            return None  # the next question tells why
        half = (time.monotonic() - started) / 2
        trips.append((half, there - (before + half)))
    half, offset = min(trips)
    return judge_clock(talk.host, offset, half)


def _master_port(first: Conversation, port: int) -> list[Check]:
    """Whether the ranks can meet at this port of the first host."""
    try:
        why = first.ask("port_taken", seconds=_TIME_SECONDS, port=port)["why"]
    except NoAnswerError:
        return []  # the next question tells why
    if why is None:
        return []
    fix = "choose another --master-port, or leave it out to take a free one"
    return [Check(first.host, "master port", FAILED, str(why), fix)]


@contextmanager
def _token_in(runs: Path) -> Iterator[tuple[Path, str, list[Check]]]:
    """A file in the folder of the runs, or in the nearest one above it that is there: who sees it shares the disk.

    Yields that folder, the file's name, and what failed.
    """
    runs = runs.absolute()
    folder = next(one for one in (runs, *runs.parents) if one.is_dir())
    token = f".dstrain-doctor-{secrets.token_hex(8)}"
    checks = []
    try:
        (folder / token).touch()
    except OSError as error:
        message = f"{folder} can't be written here: {error.strerror}"
        checks.append(
            Check(HERE, "run folder", FAILED, message, "choose another folder with --set runs_dir=FOLDER")
        )
    try:
        yield folder, token, checks
    finally:
        with suppress(OSError):  # on a read-only disk also for what is not there
            (folder / token).unlink(missing_ok=True)


# Shown one by one; a mistake that all hosts share is one mistake.
_SHOWN = 8


def refuse_taken_port(request: LaunchSpec, where: str) -> None:
    """Refuse a port for the ranks to meet at that this machine does not have, where rank 0 starts on it.

    Raises:
        DstrainError: who holds it, and the way out.
    """
    by_hand = request.launcher == "none"
    if request.node != 0 if by_hand else not request.runs_here or request.launcher == "slurm":
        return
    taken = port_taken(request.master_port, only_here=not by_hand)
    if taken is not None:
        way = "" if by_hand else ", or leave it out: a free one is taken then"
        raise DstrainError(
            f"{taken}, and the ranks are to meet there",
            where=where,
            hint=f"choose another --master-port{' on all nodes' if by_hand else way}",
        )


def refuse_unfit_hosts(request: LaunchSpec, hostfile: str | None, master_port: int | None = None) -> None:
    """Look at the hosts that are started over ssh, all at once; nothing where there are none.

    Args:
        master_port: of the user's choice, on the first host.

    Raises:
        DstrainError: some can't take part: which, why, and how to fix it. Within 15 s for hosts that are silent.
    """
    if not request.ssh_hosts:
        return
    if request.launcher == "pdsh" and shutil.which("pdsh") is None:
        raise DstrainError(
            "pdsh, which starts the ranks on other hosts, is not installed here",
            where="--launcher",
            hint="install it (Debian: apt-get install pdsh), or see `dstrain run --help` for other launchers",
        )
    lines = {host.name: (host, line) for host, line in numbered_hosts(hostfile).items()} if hostfile else {}
    # With all slots that the hostfile gives it, though the run may use fewer: they are said to be there.
    hosts = [lines[host.name][0] if host.name in lines else host for host in request.ssh_hosts]
    cpu_for_want_of_gpus = request.accelerator == "cpu" and not os.environ.get("DS_ACCELERATOR")
    environment = dict(request.environment)
    if cpu_for_want_of_gpus:
        environment.pop("DS_ACCELERATOR", None)  # each host says what it has
    checks = examine_hosts(
        hosts,
        environment=environment,
        runs=Path(request.run_folder).parent,
        python=request.python,
        thorough=False,
        # mpirun starts what belongs to its own machine by itself; pdsh logs in here as well.
        here_without_ssh=is_this_host if request.launcher == "openmpi" else lambda host: False,
        master_port=master_port,
        cpu_for_want_of_gpus=cpu_for_want_of_gpus,
    )
    failed = [check for check in checks if check.status == FAILED]
    if not failed:
        return
    first = failed[0].host
    look = f"; `dstrain doctor --hostfile {shlex.quote(hostfile)}` checks everything" if hostfile else ""
    raise DstrainError(
        _describe(failed, len(hosts)),
        hint=f"fix this, or remove the host{look}",
        where=f"{hostfile}:{lines[first][1]}" if first in lines else hostfile,
    )


def _describe(failed: list[Check], number: int) -> str:
    names = dict.fromkeys(check.host for check in failed)
    can = f"{len(names)} of {number} hosts can't take part in this run"
    told = [
        f"  {check.host}: {check.check}: {check.message}\n    fix: {check.fix}" for check in failed[:_SHOWN]
    ]
    more = [f"  and {len(failed) - _SHOWN} more"] if len(failed) > _SHOWN else []
    return "\n".join([can, *told, *more])
