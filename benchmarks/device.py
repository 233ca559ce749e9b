"""What this machine's CPU does for training ranks, measured: python -m benchmarks.device [--ranks N] FILE

Writes a device file for ``dstrain plan --device FILE``. All ranks work at the same time, one thread each, as they do in
a run. Takes about ten seconds. In place of data sheet numbers it has what was reached:

- the rate of a transformer block's forward and backward pass, from two sizes of a micro-batch;
- what such a pass costs however small it is, from a model of next to nothing;
- an all-reduce over gloo: of one number for the latency, of 16 MB for the bandwidth;
- an update by AdamW, for the memory bandwidth.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import yaml

from dstrain.estimate.device import Device, Link
from dstrain.estimate.time import REACHED
from dstrain.optimizers import OPTIMIZERS
from tests.support.distributed.workers import run

SEQ_LEN, HIDDEN, LAYERS, TINY_LAYERS = 128, 256, 4, 12
SAMPLES = (1, 8)
PARAMETERS, MESSAGE = 4_000_000, 16 * 2**20
ROUNDS = 7


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the YAML file to write")
    parser.add_argument("--ranks", type=int, default=os.cpu_count(), help="default: one a core")
    arguments = parser.parse_args()
    arguments.file.write_text(as_yaml(measure(arguments.ranks)), encoding="utf-8")
    print(f"written: {arguments.file}")


def measure(ranks: int) -> Device:
    """The CPU of this machine under so many ranks."""
    found = run(ranks, _measure)
    slowest: dict[str, float] = {key: max(rank[key] for rank in found) for key in found[0]}
    rates = {}
    for precision in ("fp32", "bf16"):
        few, many = (slowest[f"{precision} {samples}"] for samples in SAMPLES)
        flops = 3 * LAYERS * (SAMPLES[1] - SAMPLES[0]) * found[0]["flops"]
        rates[precision] = ranks * flops / (many - few)
    # A ring of n ranks sends 2 (n - 1) / n of the tensor from each, in 2 (n - 1) messages one after the other.
    link = Link(1e9, 1e-4)
    if ranks > 1:
        latency = slowest["short message"] / (2 * (ranks - 1))
        link = Link(
            2
            * (ranks - 1)
            / ranks
            * MESSAGE
            * ranks
            / (slowest["long message"] - slowest["short message"])
            / REACHED,
            latency,
        )
    memory = PARAMETERS * OPTIMIZERS["adamw"].update_bytes * ranks / slowest["update"] / REACHED
    return Device(
        name="measured",
        kind="cpu",
        memory_bytes=None,
        flops=rates,
        utilisation=1.0,
        memory_bandwidth=memory,
        host_link=Link(memory, 1e-6),
        inside=link,
        between=link,
        gpus_per_node=ranks,
        precisions=("fp32", "bf16"),
        layer_overhead=slowest["tiny"] / (3 * TINY_LAYERS),
        source=f"benchmarks/device.py with {ranks} ranks: what was reached, not what is possible",
        host_memory_bandwidth=memory,
    )


def as_yaml(device: Device) -> str:
    """The device as a file of the form of those in ``ds_configs/devices``."""

    def link(found: Link) -> dict[str, float]:
        return {
            "gigabytes_per_second": found.bandwidth / 1e9,
            "latency_microseconds": 1e6 * found.latency,
        }

    values = {
        "kind": device.kind,
        "names": [],
        "memory_mib": psutil.virtual_memory().total // 2**20,
        "teraflops": {precision: flops / 1e12 for precision, flops in device.flops.items()},
        "utilisation": device.utilisation,
        "memory_gigabytes_per_second": device.memory_bandwidth / 1e9,
        "host_link": link(device.host_link),
        "inside": link(device.inside),
        "between": link(device.between),
        "gpus_per_node": device.gpus_per_node,
        "layer_microseconds": 1e6 * device.layer_overhead,
        "host_memory_gigabytes_per_second": device.host_memory_bandwidth / 1e9,
        "disk_gigabytes_per_second": device.disk_bandwidth / 1e9,
        "source": device.source,
    }
    return yaml.safe_dump(values, sort_keys=False)


def _measure(rank: int) -> dict[str, float]:
    """Seconds of each part on this rank, and the FLOPs of a block's forward pass of one sample."""
    import torch
    from torch import distributed
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaModel

    from dstrain.model.measuring.measure import measure as measured
    from dstrain.planning.model_shape import ModelShape

    def llama(hidden: int, layers: int) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=64, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=4, num_key_value_heads=4, attn_implementation="sdpa",
        )  # fmt: skip

    def both_passes(model: LlamaModel, *size: int) -> float:
        hidden = torch.randn(*size, dtype=model.dtype, requires_grad=True)
        return _fastest(lambda: model(inputs_embeds=hidden, use_cache=False)[0].sum().backward())

    config = llama(HIDDEN, LAYERS)
    block = ModelShape.from_record(measured(config)).layers[1]
    found = {"flops": block.forward_flops(SEQ_LEN)}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = LlamaModel(config).to(dtype)
        for samples in SAMPLES:
            found[f"{precision} {samples}"] = both_passes(model, samples, SEQ_LEN, HIDDEN)
    found["tiny"] = both_passes(LlamaModel(llama(32, TINY_LAYERS)), 1, 8, 32)
    found["short message"] = _fastest(lambda: distributed.all_reduce(torch.zeros(1)), time.perf_counter)
    long = torch.zeros(MESSAGE // 4)
    found["long message"] = _fastest(lambda: distributed.all_reduce(long), time.perf_counter)
    weight = torch.nn.Parameter(torch.randn(PARAMETERS))
    weight.grad = torch.randn(PARAMETERS)
    found["update"] = _fastest(torch.optim.AdamW([weight]).step)
    return found


def _fastest(do: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of the fastest of a few rounds that all ranks begin together.

    One thread's work is counted in seconds of the processor: what else the machine does is left out.
    """
    from torch import distributed

    seconds = []
    for _ in range(ROUNDS + 1):
        distributed.barrier()
        began = clock()
        do()
        seconds.append(clock() - began)
    return min(seconds[1:])


if __name__ == "__main__":
    main()
