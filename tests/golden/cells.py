"""The choices whose plans and DeepSpeed JSONs are kept."""

from __future__ import annotations

from dataclasses import dataclass

DATA = ("--data", "text.jsonl")


@dataclass(frozen=True)
class Cell:
    """One set of choices.

    Attributes:
        choices: flags that `plan` and `config show` both take.
        devices: those that tell `plan` on what: an H100 of the catalogue, and never this machine.
        replicas: those that tell `config show` the same; its DeepSpeed JSON is that for CPUs. Where a cut would
            follow from this machine's speed, it is named.
    """

    name: str
    choices: str
    devices: str
    replicas: str

    @property
    def plan(self) -> list[str]:
        # On GPUs `auto` takes another kernel than in 0.1, whose estimates are those of sdpa.
        attention = () if "attention" in self.choices else ("--set", "attention=sdpa")
        return ["plan", "--json", *DATA, *self.choices.split(), *self.devices.split(), *attention]

    @property
    def config_show(self) -> list[str]:
        return ["config", "show", *DATA, *self.choices.split(), *self.replicas.split()]


ONE_NODE = "--device h100-80g --nodes 1"
TWO_NODES = "--device h100-80g --nodes 2"

CELLS = (
    Cell("quickstart", "--micro-batch 2", ONE_NODE, "--data-parallel 8"),
    Cell("zero-0", "--zero 0 --micro-batch 4", f"{ONE_NODE} --gpus-per-node 4", "--data-parallel 4"),
    Cell(
        "zero-0-pipeline-8",
        "--model llama-1b --zero 0 --pipeline 8 --partition parameters --micro-batch 2 --global-batch 64",
        TWO_NODES,
        "--data-parallel 2",
    ),
    Cell(
        "zero-1-pipeline-4-bf16",
        "--model llama-1b --zero 1 --pipeline 4 --precision bf16 --micro-batch 1",
        ONE_NODE,
        "--data-parallel 2 --partition uniform",
    ),
    Cell(
        "zero-2-pipeline-2-two-nodes",
        "--model llama-1b --zero 2 --pipeline 2 --micro-batch 1",
        TWO_NODES,
        "--data-parallel 8 --partition uniform",
    ),
    Cell(
        "zero-3-activation-checkpointing",
        "--model llama-8b --zero 3 --precision bf16 --micro-batch 1 --activation-checkpointing",
        TWO_NODES,
        "--data-parallel 16",
    ),
    Cell(
        "offload-cpu",
        "--model llama-8b --zero 2 --precision bf16 --micro-batch 1 --offload cpu",
        ONE_NODE,
        "--data-parallel 8",
    ),
    Cell(
        "dualpipev",
        "--model llama-1b --zero 1 --pipeline 4 --precision bf16 --schedule dualpipev --micro-batch 1",
        ONE_NODE,
        "--data-parallel 2 --partition uniform",
    ),
    Cell(
        "fp16",
        "--zero 2 --micro-batch 1 --set attention=eager",
        f"{ONE_NODE} --precision fp16",
        "--data-parallel 8 --precision fp32",  # few processors have fp16
    ),
    Cell(
        "partition-by-hand",
        "--model llama-8b --zero 1 --precision bf16 --pipeline 4 --partition 9,8,8,7 --micro-batch 1",
        ONE_NODE,
        "--data-parallel 2",
    ),
    Cell(
        "no-pack",
        "--no-pack --set held_out=0 --micro-batch 2 --deterministic --save-every never",
        ONE_NODE,
        "--data-parallel 8",
    ),
    Cell(
        "hostfile",
        "--model llama-1b --hostfile hosts --pipeline 2 --zero 1 --partition uniform --micro-batch 2",
        "--device h100-80g",
        "",
    ),
    Cell(
        "config-file-freeze",
        "--config choices.yaml --ds-config overlay.json --micro-batch 2 --elastic"
        " --set deepspeed.zero_optimization.allgather_bucket_size=1000",
        ONE_NODE,
        "--data-parallel 8",
    ),
)
