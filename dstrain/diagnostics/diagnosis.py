"""Turns the facts about a machine into checks: ok, warning or failed, each with a fix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.diagnostics.host_facts import PACKAGES
from dstrain.formatting import format_bytes
from dstrain.runs.this_machine import is_loopback

OK, WARNING, FAILED = "ok", "warning", "failed"
# A rank holds this much before it has a model: torch, DeepSpeed and transformers.
_MEMORY_OF_A_RANK = 10**9
_DISK = 5 * 10**9
# NCCL passes through it what ranks of one host say to each other. A container has 64 MB where nobody asks for more.
_SHARED_MEMORY = 10**9
_CLOCK_SECONDS = 1.0
# The first driver of each major version of CUDA (CUDA Toolkit, Release Notes, "CUDA Driver").
_DRIVER_OF_CUDA = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. ``status`` is ok, warning or failed; ``fix`` is empty where there is none."""

    host: str
    check: str
    status: str
    message: str
    fix: str = ""


def judge_facts(
    host: str, slots: int, facts: Mapping[str, Any], here: Mapping[str, Any], *, gpus: bool
) -> list[Check]:
    """All that one host's facts tell.

    Args:
        slots: what the hostfile gives it; 0 where nobody asks for a number.
        facts: of `dstrain.diagnostics.host_facts`.
        here: those of the machine that asks, which the others must agree with.
        gpus: whether other hosts have GPUs.
    """
    return [
        *_versions(host, facts, here),
        _devices(host, slots, facts, gpus),
        *_room(host, slots, facts),
        _own_name(host, facts),
    ]


def judge_folders(host: str, directory: str, runs: str, facts: Mapping[str, Any]) -> list[Check]:
    """Whether another host sees the folders of the machine that asks."""
    checks = []
    if not facts["directory"]:
        message = f"{directory}, the folder where the run is started, does not exist: relative paths will not be found"
        checks.append(Check(host, "folder", WARNING, message, f"create it on {host}, or use absolute paths"))
    if facts["sees_runs"]:
        checks.append(Check(host, "run folder", OK, f"{runs} is shared"))
    else:
        message = f"{runs} is not shared with this machine: ranks there can't share checkpoints"
        fix = "--set runs_dir=FOLDER on a disk that all hosts share, or --save-every never"
        checks.append(Check(host, "run folder", WARNING, message, fix))
    return checks


def judge_clock(host: str, offset: float, uncertainty: float) -> Check:
    """Seconds by which a host's clock is ahead of ours, and how well that is known."""
    message = f"{offset:+.3f} s (± {max(uncertainty, 0.001):.3f})"
    if abs(offset) - uncertainty <= _CLOCK_SECONDS:
        return Check(host, "clock", OK, message)
    return Check(
        host,
        "clock",
        WARNING,
        f"{message}: times in logs and of files can't be compared",
        f"synchronise both with a time server: timedatectl set-ntp true (on {host})",
    )


def judge_names(machines: Mapping[str, str]) -> list[Check]:
    """Two names of the hostfile that mean one machine; ``machines`` is what each says that it is."""
    checks, first = [], dict[str, str]()
    for host, machine in machines.items():
        other = first.setdefault(machine, host)
        if other != host:
            message = f"this is the same machine as {other}"
            fix = "give each machine one line in the hostfile, with all of its slots"
            checks.append(Check(host, "name", FAILED, message, fix))
    return checks


def _versions(host: str, facts: Mapping[str, Any], here: Mapping[str, Any]) -> list[Check]:
    fix = f"install the same version on all hosts; {host} and this machine differ"
    python, ours = facts["python"], here["python"]
    if python == ours:
        checks = [Check(host, "python", OK, python)]
    else:
        small = python.split(".")[:2] == ours.split(".")[:2]
        message = f"{python}, and {ours} here"
        checks = [Check(host, "python", WARNING if small else FAILED, message, fix)]
    for name in ("dstrain", *PACKAGES):
        found, wanted = facts["versions"][name], here["versions"][name]
        if found is None:
            message = f"not installed; this machine has {wanted}"
            checks.append(Check(host, name, FAILED, message, f"install {name} {wanted} on {host}"))
        elif found == wanted:
            checks.append(Check(host, name, OK, found))
        else:
            checks.append(Check(host, name, FAILED, f"{found}, and {wanted} here", fix))
    driver, ours = facts["driver"], here["driver"]
    if driver == ours or ours is None:  # a machine without GPUs may start a run on others
        checks.append(Check(host, "driver", OK, driver or "no NVIDIA driver in use"))
    else:
        checks.append(Check(host, "driver", WARNING, f"{driver or 'none'}, and {ours} here", fix))
    return [*checks, *_cuda(host, facts)]


def _cuda(host: str, facts: Mapping[str, Any]) -> list[Check]:
    """Whether the driver has the CUDA that torch is built for. It also has each older one, and any minor version of its
    own major one (CUDA Compatibility, "Minor Version Compatibility")."""
    devices, built_for, has = facts["devices"], facts.get("torch_cuda"), facts.get("driver_cuda")
    if devices is None or devices["kind"] != "cuda" or built_for is None:
        return []
    if not built_for:
        message = "this torch is built for CPUs, and can't use the GPUs here"
        fix = f"install PyTorch for CUDA on {host} (pytorch.org/get-started); or DS_ACCELERATOR=cpu trains on the CPU"
        return [Check(host, "cuda", FAILED, message, fix)]
    if has is None:
        return []
    wanted, newest = int(built_for.split(".")[0]), int(has.split(".")[0])
    if newest >= wanted:
        return [Check(host, "cuda", OK, f"torch is built for CUDA {built_for}, the driver has {has}")]
    driver = _DRIVER_OF_CUDA.get(wanted)
    fix = f"install a driver for CUDA {wanted}{f' ({driver} or newer)' if driver else ''}, or PyTorch for CUDA {newest}"
    message = (
        f"torch is built for CUDA {built_for}, but the driver ({facts['driver']}) has CUDA {has} at most"
    )
    return [Check(host, "cuda", FAILED, message, f"{fix}, on {host}")]


def _devices(host: str, slots: int, facts: Mapping[str, Any], gpus: bool) -> Check:
    devices, cores = facts["devices"], facts["cores"]
    if devices is None:
        fix = "check `nvidia-smi` there; each rank needs its own device"
        return Check(host, "devices", FAILED, " ".join(facts["devices_error"].split()), fix)
    if devices["kind"] == "cpu" and gpus:
        return Check(
            host, "devices", FAILED, "no GPU found, but other hosts have GPUs", "check `nvidia-smi` there"
        )
    if devices["kind"] == "cpu":
        if slots <= cores:
            return Check(host, "devices", OK, f"CPU, {cores} cores")
        message = f"{slots} ranks share {cores} cores"
        return Check(host, "devices", WARNING, message, f"slots={cores} would be as fast")
    count, names = devices["count"], ", ".join(dict.fromkeys(devices["names"]))
    if count < slots:
        message = f"slots={slots}, but it has {count} GPUs ({names})"
        return Check(host, "devices", FAILED, message, f"`{host} slots={count}`, or check nvidia-smi there")
    return Check(host, "devices", OK, f"{count} GPUs ({names})")


def _room(host: str, slots: int, facts: Mapping[str, Any]) -> list[Check]:
    wanted = {"memory": _MEMORY_OF_A_RANK * max(1, slots), "disk": _DISK}
    fixes = {
        "memory": "stop other programs there, or use fewer slots",
        "disk": "free some space, or use --set runs_dir=FOLDER on another disk",
        "shared memory": "docker run --shm-size 8g; Kubernetes: an emptyDir with medium: Memory at /dev/shm",
    }
    if facts["devices"] is not None and facts["devices"]["kind"] == "cuda":
        wanted["shared memory"] = _SHARED_MEMORY
    checks = []
    for name, enough in wanted.items():
        free = facts[name.replace(" ", "_")]
        if free is None:
            checks.append(Check(host, name, WARNING, "not known"))
        elif free < enough:
            message = f"{format_bytes(free)} free: low for {slots or 1} ranks"
            checks.append(Check(host, name, WARNING, message, fixes[name]))
        else:
            checks.append(Check(host, name, OK, f"{format_bytes(free)} free"))
    return checks


def _own_name(host: str, facts: Mapping[str, Any]) -> Check:
    name, addresses = facts["hostname"], facts["own_addresses"]
    if addresses and not is_loopback(addresses[0]):
        return Check(host, "own name", OK, f"{name} is {addresses[0]}")
    message = (
        f"{name} resolves to {addresses[0]} on itself" if addresses else f"{name} does not resolve on itself"
    )
    return Check(
        host,
        "own name",
        WARNING,
        f"{message}: dstrain's ranks choose their network card themselves, but other programs may hang",
        f"in /etc/hosts of {host}, set {name} to the address at which others reach it",
    )
