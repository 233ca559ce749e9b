"""A pipeline's step over the time without a bubble: ``python -m benchmarks.pipeline [--quick] --json OUT``.

dstrain's schedules beside DeepSpeed's own engine and torch.distributed.pipelining, in one process a rank, a step of
each in turn. Layers sleep instead of computing (20 ms forward, 20 ms for the gradient of the input, 20 ms for that of
the weights), so that two cores serve all ranks: what is measured is who waits for whom.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

MS = 20.0
SMALL, LARGE = (64, 64), (512, 16384)  # of bf16: 8 kB and 16 MB
WITH_LARGE = ("dstrain 1f1b", "dstrain zb-h1", "torch 1F1B")
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="four ranks and small messages only, three rounds"
    )
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(json.loads(arguments.worker))
        return
    rounds = 3 if arguments.quick else 5
    parts: list[tuple[str, int, list[int], tuple[int, int]]] = [("sleep", 4, [4, 8, 16], SMALL)]
    if not arguments.quick:
        parts += [("sleep_8_ranks", 8, [16], SMALL), ("sleep_16_mb", 4, [16], LARGE)]
    found: dict[str, Any] = {}
    for name, ranks, micro_batches, shape in parts:
        found[name] = launched(ranks, micro_batches, shape, rounds)
        print(table({name: found[name]}), flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")


def launched(ranks: int, micro_batches: list[int], shape: tuple[int, int], rounds: int) -> dict[str, Any]:
    """``m4`` and so on -> figures of each engine, and of the best of dstrain's and of torch's."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        job = {"micro_batches": micro_batches, "shape": shape, "rounds": rounds, "out": str(out)}
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [
                *(
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    "--standalone",
                    "--nproc_per_node",
                    str(ranks),
                ),
                *("-m", "benchmarks.pipeline", "--worker", json.dumps(job)),
            ],
            env=environment,
            check=True,
        )
        return json.loads(out.read_text())


def table(found: dict[str, Any]) -> str:
    names = {"sleep": "4 ranks", "sleep_8_ranks": "8 ranks", "sleep_16_mb": "4 ranks, 16 MB"}
    engines = list(next(iter(next(iter(found.values())).values()))["engines"])
    lines = [f"| | micro-batches | {' | '.join(engines)} |", "| --- | ---: |" + " ---: |" * len(engines)]
    for what, rows in found.items():
        for number, row in rows.items():
            cells = [f"{row['engines'][name]:.3f}" for name in engines]
            lines.append(f"| {names[what]} | {number.removeprefix('m')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def work(job: dict[str, Any]) -> None:
    """One rank of all engines."""
    import deepspeed
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    shape, found = tuple(job["shape"]), {}
    for count in job["micro_batches"]:
        makers: dict[str, Callable[[], Step]] = {
            "dstrain 1f1b": partial(of_dstrain, "1f1b", count, shape),
            "dstrain zb-h1": partial(of_dstrain, "zb-h1", count, shape),
            "DeepSpeed 1f1b": partial(of_deepspeed, count, shape),
            "torch 1F1B": partial(of_torch, "Schedule1F1B", count, shape),
            "torch interleaved zero-bubble": partial(of_torch, "ScheduleInterleavedZeroBubble", count, shape),
            "torch ZBV": partial(of_torch, "ScheduleZBVZeroBubble", count, shape),
        }
        if shape == LARGE:  # what all of them hold is more than a small machine has
            makers = {name: make for name, make in makers.items() if name in WITH_LARGE}
        steps: dict[str, Step] = {name: make() for name, make in makers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(job["rounds"] + 1):
            for name, step in steps.items():
                distributed.barrier()
                start = time.perf_counter()
                step()
                distributed.barrier()
                if number:  # the first step meets
                    seconds[name].append(time.perf_counter() - start)
        ratios = {
            name: round(statistics.median(each) / (3 * MS / 1e3 * count), 3) for name, each in seconds.items()
        }
        found[f"m{count}"] = {
            "best": min(ratio for name, ratio in ratios.items() if name.startswith("dstrain")),
            "1f1b": ratios["dstrain 1f1b"],
            "torch_best": min(ratio for name, ratio in ratios.items() if name.startswith("torch")),
            "torch_1f1b": ratios["torch 1F1B"],
            "engines": ratios,
        }
    if distributed.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(found))
    distributed.barrier()


def sleepers() -> Any:
    """The class of layers that sleep: ``Sleeper(ms)`` takes so long forward, and twice that backward."""
    import torch
    from torch import Tensor, nn

    from dstrain.engine.weight_gradients import where_to_put

    class Inputs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, ms: float, later: Any) -> Tensor:
            ctx.ms, ctx.later = ms, later
            time.sleep(ms / 1e3)
            return hidden * 1.0

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            time.sleep(ctx.ms / 1e3)
            if ctx.later is not None:
                gradients, weight = ctx.later
                gradients.add(weight, lambda: slept(weight, ctx.ms))
            return gradient, None, None

    class Weights(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor, ms: float) -> Tensor:
            ctx.ms = ms
            ctx.save_for_backward(weight)
            return weight.sum() * 0.0

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Any:
            return slept(ctx.saved_tensors[0], ctx.ms), None

    def slept(weight: Tensor, ms: float) -> Tensor:
        time.sleep(ms / 1e3)
        return torch.zeros_like(weight)

    class Sleeper(nn.Module):
        def __init__(self, ms: float) -> None:
            super().__init__()
            self.ms, self.weight = ms, nn.Parameter(torch.zeros(8))

        def forward(self, hidden: Tensor) -> Tensor:
            gradients = where_to_put()
            if gradients is not None and hidden.requires_grad:
                return Inputs.apply(hidden, self.ms, (gradients, self.weight))
            return Inputs.apply(hidden, self.ms, None) + Weights.apply(self.weight, self.ms)

    return Sleeper


def deepspeed_json(count: int) -> dict[str, Any]:
    return {
        "train_batch_size": count,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": count,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.0, "torch_adam": True}},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 100000, "allgather_bucket_size": 100000},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "pipeline": {
            "activation_checkpoint_interval": 0,
            "use_reentrant": False,
            "pipe_partitioned": False,
            "grad_partitioned": False,
        },
    }


def of_dstrain(schedule: str, count: int, shape: tuple[int, ...]) -> Step:
    import torch
    from torch import distributed

    from dstrain.engine.build import build_engine
    from dstrain.engine.interface import MicroBatch
    from dstrain.model.layers import HeadLayer, Layer
    from dstrain.model.pipeline_model import PipelineModel

    ranks, sleeper = distributed.get_world_size(), sleepers()

    class First(Layer):
        def forward(self, state: Any) -> Any:
            return self.sleeper(torch.zeros(1, *shape, dtype=torch.bfloat16, requires_grad=True)), state[1]

    class Middle(Layer):
        def forward(self, state: Any) -> Any:
            return self.sleeper(state[0]), state[1]

    class Last(HeadLayer):
        def __init__(self, modules: Any) -> None:
            Layer.__init__(self, modules)

        def forward(self, state: Any) -> Any:
            return self.sleeper(state[0]).float().mean()

    class Sleeping(PipelineModel):
        num_layers, tied, after_build = ranks, (), staticmethod(lambda layer: None)

        def __init__(self) -> None:
            pass

        def to(self, device: Any) -> None:
            pass

        def build(self, index: int) -> Any:
            kind = First if index == 0 else Last if index == ranks - 1 else Middle
            return kind({"sleeper": sleeper(MS)}).to(torch.bfloat16)

    engine = build_engine(
        Sleeping(),
        deepspeed=deepspeed_json(count),
        cut=list(range(ranks + 1)),
        pipeline=ranks,
        data_parallel=1,
        device=torch.device("cpu"),
        schedule=schedule,
    )
    ids = torch.zeros(1, shape[0], dtype=torch.int64)
    batch = [MicroBatch(ids, ids, ids, torch.ones(1)) for _ in range(count)]
    return lambda: engine.train_batch(batch, 1e-3)


def of_deepspeed(count: int, shape: tuple[int, ...]) -> Step:
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from torch import distributed

    ranks, sleeper = distributed.get_world_size(), sleepers()
    module = PipelineModule(
        [sleeper(MS) for _ in range(ranks)],
        num_stages=ranks,
        loss_fn=lambda output, labels: output.float().mean(),
        seed_layers=False,
        partition_method="uniform",
    )
    engine, *_ = deepspeed.initialize(
        model=module, model_parameters=list(module.parameters()), config=deepspeed_json(count)
    )
    hidden = torch.zeros(1, *shape, dtype=torch.bfloat16)
    return lambda: engine.train_batch(iter([(hidden, hidden)] * count))


def of_torch(name: str, count: int, shape: tuple[int, ...]) -> Step:
    import torch
    from torch import distributed
    from torch.distributed.pipelining import PipelineStage, schedules

    rank, ranks, sleeper = distributed.get_rank(), distributed.get_world_size(), sleepers()
    chunks = 1 if name == "Schedule1F1B" else 2
    all_stages = ranks * chunks
    mine = [rank] if chunks == 1 else [rank, all_stages - 1 - rank if "ZBV" in name else rank + ranks]
    modules = [sleeper(MS / chunks).to(torch.bfloat16) for _ in mine]
    stages = [
        PipelineStage(module, number, all_stages, torch.device("cpu"))
        for module, number in zip(modules, mine, strict=True)
    ]
    made = getattr(schedules, name)
    schedule = made(
        stages[0] if chunks == 1 else stages, count, loss_fn=lambda output, target: output.float().mean()
    )
    optimizer = torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=1e-3)
    hidden = torch.zeros(1, *shape, dtype=torch.bfloat16).expand(count, *shape)

    def step() -> None:
        target = {"target": hidden} if all_stages - 1 in mine else {}
        schedule.step(*([hidden] if 0 in mine else []), **target)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()
