"""What a checkpoint costs the training: python benchmarks/save_cost.py [LAYOUT ...]

For each layout a model of 37 M parameters is trained on this machine's CPU, one thread a rank, in the same processes:

- without saving: a usual step;
- with saves behind the training: the step that saves, and the steps that follow until the checkpoint is complete and
  a few more. What all these take beyond as many usual steps is the cost of a save;
- with saves in the step, likewise.

A run that saves every 100 steps pays the cost once in 100 steps: that share of its time is computed, not run.

Each figure is given by the clock and, behind a slash, in processor seconds of rank 0's process. The latter do not
depend on what else the machine does, and know nothing of waiting for the disk. Where the training keeps every core
busy, what a save takes of the processor is what it costs; where cores are idle, as beside GPUs, writing costs nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 10, "vocab_size": 8192}
SEQ_LEN = 256
USUAL, SAVES, AFTER = 6, 3, 2
"""Steps without saving, before; saves of each kind; the fewest steps after each that count as its own."""

LAYOUTS = {
    "zero1": {"zero": 1},
    "zero1-dp2": {"zero": 1, "data_parallel": 2},
    "zero1-pp2": {"zero": 1, "pipeline": 2},
    "zero3-dp2": {"zero": 3, "data_parallel": 2},
}


class Seconds(NamedTuple):
    """By the clock, and of the processor."""

    wall: float
    processor: float

    def __str__(self) -> str:
        return f"{self.wall:.2f} / {self.processor:.2f} s"


@dataclass
class Saves:
    """What the steps took that saved, and those that ran beside the writing; what a save took until it was complete,
    and what beyond usual steps: its cost."""

    saving: list[Seconds]
    beside: list[Seconds]
    complete: list[float]
    cost: list[Seconds]


def now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time())


def since(began: Seconds) -> Seconds:
    end = now()
    return Seconds(end.wall - began.wall, end.processor - began.processor)


def median(times: Sequence[Seconds]) -> Seconds:
    return Seconds(statistics.median(t.wall for t in times), statistics.median(t.processor for t in times))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "layouts", nargs="*", metavar="LAYOUT", help=f"of {', '.join(LAYOUTS)}; default: first three"
    )
    parser.add_argument("--folder", help="where to write; default: the system's folder for temporary files")
    parser.add_argument("--tokens", type=int, default=512, help="tokens a step")
    arguments = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DS_LOG_LEVEL": "warning"}
    print(
        "| layout | checkpoint | save | usual step | the step that saves | beside the writing | complete after",
        end="",
    )
    print(" | cost of a save | of the time at every 100 steps |")
    print("| --- |" + " ---: |" * 8)
    for layout in arguments.layouts or list(LAYOUTS)[:3]:
        measure_layout(layout, arguments.folder, arguments.tokens)


def measure_layout(layout: str, folder: str | None, tokens: int) -> None:
    """One fresh process a rank; rank 0 prints."""
    import torch.multiprocessing as multiprocessing

    flags = LAYOUTS[layout]
    ranks = flags.get("data_parallel", 1) * flags.get("pipeline", 1)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        multiprocessing.spawn(rank_main, (ranks, layout, place, tokens), nprocs=ranks)


def rank_main(rank: int, ranks: int, layout: str, place: str, tokens: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ.get("MASTER_PORT", "29533"),
    }
    log = os.open(Path(place) / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT)
    console = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(log, 1)  # DeepSpeed says a lot

    import torch

    from dstrain.engine.build import start_communication
    from dstrain.train.checkpointing.checkpoints import Checkpoints

    torch.set_num_threads(1)
    start_communication()
    engine, step_once = build(layout, tokens)
    for _ in range(3):
        step_once()
    usual = [step_once() for _ in range(USUAL)]
    measured = {}
    for kind, background in (("behind", True), ("in the step", False)):
        checkpoints = Checkpoints(
            Path(place) / kind / "checkpoints",
            keep=1,
            identity={},
            run="0" * 16,
            config={},
            background=background,
        )
        measured[kind] = measure_saves(engine, checkpoints, step_once, usual)
    if rank == 0:
        saved = checkpoints.folder.glob("step-*/state/*")
        size = sum(path.stat().st_size for path in saved)
        for kind, saves in measured.items():
            print(row(layout, kind, size, median(usual), saves), file=console)


def measure_saves(
    engine: Any, checkpoints: Any, step_once: Callable[[], Seconds], usual: list[Seconds]
) -> Saves:
    """Save a few times, and train on until each checkpoint is complete."""
    from torch import distributed

    saves = Saves([], [], [], [])
    for number in range(1, SAVES + 1):
        distributed.barrier()
        began = now()
        step_once()
        checkpoints.save(engine, number)
        saves.saving.append(since(began))
        named = checkpoints.folder / f"step-{number:06d}"
        complete = saves.saving[-1].wall if named.exists() else None
        steps = 1
        while steps <= AFTER or not agreed(complete is not None):
            step = step_once()
            steps += 1
            if complete is None:
                saves.beside.append(step)
                if named.exists():
                    complete = since(began).wall
        total, one = since(began), median(usual)
        saves.complete.append(complete or 0.0)
        saves.cost.append(Seconds(*(total[n] - steps * one[n] for n in range(2))))
        checkpoints.finish()
        # The machine's speed may change: what is usual is measured all along.
        usual += [step_once() for _ in range(2)]
    return saves


def agreed(done: bool) -> bool:
    """Whether all ranks say so."""
    import torch
    from torch import distributed

    word = torch.tensor([int(done)])
    distributed.all_reduce(word, op=distributed.ReduceOp.MIN)
    return bool(word)


def build(layout: str, tokens: int) -> tuple[Any, Callable[[], Seconds]]:
    """The engine of this rank, and a function that trains one step and tells its seconds."""
    import torch
    from transformers import LlamaConfig

    from dstrain.config.loader import load_config
    from dstrain.engine.build import build_engine
    from dstrain.engine.interface import MicroBatch
    from dstrain.model.measuring.measure import measure
    from dstrain.model.pipeline_model import PipelineModel
    from dstrain.planning.layout import Host
    from dstrain.planning.make_plan import make_plan
    from dstrain.planning.model_shape import ModelShape
    from dstrain.planning.plan import Machines, PlannedData

    model = LlamaConfig(**MODEL, num_attention_heads=8, tie_word_embeddings=True, attn_implementation="sdpa")
    batch = tokens // SEQ_LEN
    flags = {
        "data_parallel": 1,
        **LAYOUTS[layout],
        "seq_len": SEQ_LEN,
        "global_batch": batch,
        "micro_batch": 1,
    }
    data = PlannedData(train_rows=10_000, vocab_size=MODEL["vocab_size"])
    plan = make_plan(
        load_config(flags=flags),
        Machines((Host("localhost", 0),), "cpu"),
        ModelShape.from_record(measure(model)),
        data,
        "save-cost",
    )
    engine = build_engine(
        PipelineModel(model, seed=1),
        deepspeed=plan.deepspeed,
        cut=plan.layout.cut,
        pipeline=plan.layout.pipeline,
        data_parallel=plan.layout.data_parallel,
        device=torch.device("cpu"),
    )
    positions = torch.arange(SEQ_LEN)[None]
    weight = torch.tensor([1.0 / SEQ_LEN])

    def step_once() -> Seconds:
        began = now()
        rows = torch.randint(MODEL["vocab_size"], (batch // plan.layout.data_parallel, 1, SEQ_LEN))
        engine.train_batch([MicroBatch(row, positions, row, weight) for row in rows], 1e-4)
        return since(began)

    return engine, step_once


def row(layout: str, kind: str, size: int, usual: Seconds, saves: Saves) -> str:
    saving, cost = median(saves.saving), median(saves.cost)
    shares = [cost[n] / (100 * usual[n] + cost[n]) for n in range(2)]
    cells = [
        layout,
        f"{size / 1e6:.0f} MB",
        kind,
        str(usual),
        f"{saving} ({saving.wall / usual.wall:.2f} / {saving.processor / usual.processor:.2f} x)",
        str(median(saves.beside)) if saves.beside else "",
        f"{statistics.median(saves.complete):.1f} s",
        str(cost),
        f"{shares[0]:.2%} / {shares[1]:.2%}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
