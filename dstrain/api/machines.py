"""The machines of a plan: those that are here, or those described by ``--device``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from dstrain.api.calibration import calibrated
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.estimate.device import Device, cpu_device, device_like, find_device
from dstrain.launch.devices import Devices, has_async_io, local_devices, processor
from dstrain.launch.hosts import read_hostfile
from dstrain.launch.placement import Placement, find_placement
from dstrain.planning.attention import FLASH_PACKAGES
from dstrain.planning.layout import Host
from dstrain.planning.plan import Machines

_MOST_DEVICES = 100_000


@dataclass(frozen=True)
class Elsewhere:
    """What the flags of ``dstrain plan`` say of machines that are not here.

    Attributes:
        device: a name of ``ds_configs/devices``, or a file.
        gpus_per_node: of each node; None: as many as such machines usually have.
    """

    device: str
    gpus_per_node: int | None = None


def elsewhere(device: str | None, gpus_per_node: int | None) -> Elsewhere | None:
    """From the two flags; None where neither was given. Raises DstrainError for half of it."""
    if device is not None:
        return Elsewhere(device, gpus_per_node)
    if gpus_per_node is not None:
        raise DstrainError(
            "--gpus-per-node requires --device: this machine's own GPUs are counted automatically",
            where="--gpus-per-node",
            hint="add --device NAME, for example h100-80g, to plan for other machines",
        )
    return None


def find_machines(
    resolved: ResolvedConfig, described: Elsewhere | None = None
) -> tuple[Devices, Placement, Machines]:
    """What there is to run on: looked at, or as described; then no GPU is looked for.

    Raises:
        DstrainError: choices that contradict each other, or a device, a hostfile, an allocation that can't be used.
    """
    return _described(resolved, described) if described else _here(resolved)


def _here(resolved: ResolvedConfig) -> tuple[Devices, Placement, Machines]:
    config = resolved.config
    if config.offload == "nvme" and not has_async_io():
        raise DstrainError(
            "DeepSpeed needs libaio to write to the disk, and it is not installed",
            where=str(resolved.origin("offload")),
            hint="install it (Debian: apt-get install libaio-dev), or --offload cpu",
        )
    devices = local_devices()
    placement = find_placement(resolved, devices)
    device = _speed_of(devices)
    # Where each node plans for itself, all must come to the same plan.
    if device is not None and not (placement.launcher == "none" and len(placement.hosts) > 1):
        device = calibrated(device, config.precision)
    machines = Machines(
        hosts=placement.hosts or (Host("localhost", devices.count),),
        accelerator=devices.kind,
        device_names=devices.names,
        precisions=devices.precisions,
        memory_bytes=devices.memory_bytes,
        flash_packages=tuple(package for package in FLASH_PACKAGES.values() if is_installed(package)),
        device=device,
    )
    return devices, placement, machines


def is_installed(package: str) -> bool:
    """Whether a package can be imported here; or, of ``name>=1.2``, whether it has that version."""
    name, _, wanted = package.partition(">=")
    if not wanted:
        return find_spec(name) is not None
    try:
        found = version(name)
    except PackageNotFoundError:
        return False
    return [int(part) for part in re.findall(r"\d+", found)[:2]] >= [int(part) for part in wanted.split(".")]


def device_here() -> Device | None:
    """The device of this machine, by its data sheet; None where its speed is not known. Raises DstrainError."""
    return _speed_of(local_devices())


def _speed_of(devices: Devices) -> Device | None:
    if devices.kind == "cuda":
        return device_like(devices.names)
    found = processor(devices.precisions)
    return cpu_device(
        devices.names[0],
        cores=found.cores,
        hertz=found.hertz,
        flops_a_cycle=found.flops_a_cycle,
        memory_bytes=devices.memory_bytes,
    )


def _described(resolved: ResolvedConfig, described: Elsewhere) -> tuple[Devices, Placement, Machines]:
    if described.device == "cpu":
        raise DstrainError(
            "--device cpu is not supported: the speed of CPUs varies, and only this machine's is known",
            where="--device",
            hint="remove --device; on a machine with GPUs, DS_ACCELERATOR=cpu plans for its CPU",
        )
    device = find_device(described.device, "--device")
    hosts = _described_hosts(resolved, described, device.gpus_per_node)
    machines = Machines(
        hosts=hosts,
        accelerator=device.kind,
        device_names=(device.name,) * hosts[0].slots,
        precisions=device.precisions,
        memory_bytes=device.memory_bytes,
        # What is asked for is taken to be installed there.
        flash_packages=tuple(FLASH_PACKAGES.values()),
        device=device,
    )
    names = machines.device_names
    devices = Devices(device.kind, len(names), names, device.memory_bytes, precisions=device.precisions)
    return devices, Placement(hosts, resolved.config.launcher or "pdsh"), machines


def _described_hosts(resolved: ResolvedConfig, described: Elsewhere, usual: int) -> tuple[Host, ...]:
    """Those of the hostfile, or ``node-0``, ``node-1``, ..."""
    config = resolved.config
    if config.processes is not None:
        raise DstrainError(
            "processes can't be set with --device, which places one rank on each GPU",
            where=str(resolved.origin("processes")),
            hint="--gpus-per-node N",
        )
    if config.hostfile is None:
        nodes, slots = config.nodes or 1, described.gpus_per_node or usual
        if nodes * slots > _MOST_DEVICES:
            raise DstrainError(
                f"{nodes:,} nodes of {slots:,} devices exceed the limit of {_MOST_DEVICES:,} devices per plan",
                where=str(resolved.origin("nodes")) if slots <= _MOST_DEVICES else "--gpus-per-node",
                hint=f"at most {max(1, _MOST_DEVICES // slots):,} such nodes",
            )
        return tuple(Host(f"node-{number}", slots) for number in range(nodes))
    for flag, value, where in (
        ("--nodes", config.nodes, str(resolved.origin("nodes"))),
        ("--gpus-per-node", described.gpus_per_node, "--gpus-per-node"),
    ):
        if value is not None:
            raise DstrainError(
                f"the hostfile ({resolved.origin('hostfile')}) and {flag} {value} both set the hosts and their slots",
                where=where,
                hint="remove one of the two",
            )
    return read_hostfile(config.hostfile)
