"""The assumptions behind a time estimate, as text."""

from __future__ import annotations

from dstrain.config.schema import RunConfig
from dstrain.estimate.device import Device
from dstrain.planning.layout import Layout


def assumptions_of(config: RunConfig, layout: Layout, device: Device, reached: float) -> tuple[str, ...]:
    """What the numbers of `dstrain.estimate.time` rest on, the weightiest first.

    Args:
        reached: fraction of their nominal bandwidth that links and memory give.
    """
    peak = device.flops[config.precision] / 1e12
    found = [
        f"layers compute at {device.utilisation:.0%} of {device.name}'s {peak:,.4g} TFLOP/s in {config.precision}"
        f" ({device.source})",
        f"links and memory reach {reached:.0%} of their nominal bandwidth, and nothing else uses them",
    ]
    if device.kind == "cpu":
        found.append("the ranks of a host share its cores, its memory and the loopback device evenly")
        most = max(host.slots for host in layout.hosts)
        if layout.pipeline > 1 and most > device.gpus_per_node:
            found.append(f"{most} ranks share {device.gpus_per_node} cores: while one waits, others compute")
    else:
        found.append(
            f"a layer launches its kernels in {device.layer_overhead * 1e6:.0f} us, ahead of the work"
        )
    if layout.data_parallel > 1:
        if config.zero == 3 and layout.pipeline == 1 and device.kind == "cuda":
            found.append("ZeRO-3 gathers and reduces while computing, except for the first layer of a pass")
        else:
            found.append("communication between replicas does not overlap with computation")
    if layout.pipeline > 1:
        found.append("a stage does not compute while it sends to or receives from adjacent stages")
        if layout.schedule == "dualpipev":
            found.append("with dualpipev, a simultaneous send and receive takes the time of one")
    if len(layout.hosts) > 1:
        found.append(
            f"each device has {device.between.bandwidth / 1e9:,.3g} GB/s of network bandwidth between hosts to itself"
        )
        if layout.data_parallel > 1 and layout.hosts[0].slots > 1:
            found.append("traffic of replicas between hosts uses the network cards of all ranks in parallel")
    if config.offload != "none" and device.kind == "cuda":
        found.append(
            f"the ranks of a host share its memory's {device.host_memory_bandwidth / 1e9:,.0f} GB/s for the"
            " offloaded update"
        )
    if config.offload == "nvme":
        found.append(f"they share a disk of {device.disk_bandwidth / 1e9:,.3g} GB/s")
    found.append("validation, checkpoints, and waiting for data or for slower machines are not included")
    return tuple(found)
