"""Whether the layout that `dstrain plan --fit` would take is as fast as it says: python -m benchmarks.fit

For ten small cases it measures this machine's CPU, lets fit choose, then trains fit's choice and a thinned list of the
other layouts that are accepted, all of them in turn, a step each, so that what else the machine does falls on all
alike. The choice is good where at most one layout is faster by more than fit's own 2 %, within which it takes the
simpler one. Ten minutes on two cores. ``--speed h100-80g`` instead times the search for 1,000 GPUs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.device import measure
from dstrain.config.loader import load_config, override
from dstrain.estimate.device import Device, find_device
from dstrain.planning.fitting.candidates import Candidate, find_candidates
from dstrain.planning.fitting.scores import Scores
from dstrain.planning.fitting.search import NEAR, fit
from dstrain.planning.layout import Host
from dstrain.planning.make_plan import make_plan
from dstrain.planning.model_shape import Layer, ModelShape
from dstrain.planning.plan import Machines, PlannedData
from tests.support.distributed.timed import TrainedLayout

WARM_UP, STEPS = 2, 7
DATA = PlannedData(train_rows=10**6, vocab_size=100)


@dataclass(frozen=True)
class Case:
    """A model and what is trained with it, on so many ranks."""

    name: str
    hidden: int
    layers: int
    vocabulary: int
    seq_len: int
    global_batch: int
    ranks: int = 2
    precision: str = "fp32"
    tied: bool = True
    optimizer: str = "adamw"

    def model(self) -> Any:
        from transformers import LlamaConfig

        heads = max(2, self.hidden // 64)
        return LlamaConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, intermediate_size=4 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=1024, tie_word_embeddings=self.tied, bos_token_id=None, eos_token_id=None,
            attn_implementation="sdpa",
        )  # fmt: skip


CASES = (
    Case("deep", 128, 16, 512, 128, 16),
    Case("wide", 512, 2, 512, 128, 16),
    Case("long samples", 128, 4, 512, 512, 8),
    Case("large vocabulary", 256, 4, 16_384, 64, 8, tied=False),
    Case("small batch", 384, 6, 512, 64, 4),
    Case("batch that two replicas can't share", 256, 6, 512, 128, 9),
    Case("16 bits", 256, 4, 512, 128, 8, precision="bf16"),
    Case("sgd", 256, 6, 2048, 64, 8, optimizer="sgd"),
    Case("one rank", 256, 4, 512, 64, 16, ranks=1),
    Case("one rank, 16 bits", 128, 8, 2048, 64, 16, ranks=1, precision="bf16"),
)


@dataclass(frozen=True)
class Measured:
    """A case's layouts: seconds of a step as predicted and as measured, by name, and which of them is fit's choice.

    ``measured`` has the fastest step of each: what takes longer is what else the machine did, as timeit's documentation
    says. ``medians`` says how much that was.
    """

    case: Case
    choice: str
    predicted: dict[str, float]
    measured: dict[str, float]
    medians: dict[str, float]

    @property
    def faster(self) -> int:
        """How many layouts are faster than fit's choice by more than it cares for."""
        own = self.measured[self.choice]
        return sum(NEAR * seconds < own for seconds in self.measured.values())

    @property
    def rank(self) -> int:
        """Place of the choice in the order of measured times, from 1 on."""
        return 1 + sum(seconds < self.measured[self.choice] for seconds in self.measured.values())

    def __str__(self) -> str:
        lines = [f"{self.case.name}: the choice is number {self.rank} of {len(self.measured)} measured"]
        for name, seconds in sorted(self.measured.items(), key=lambda item: item[1]):
            mark = "<- fit" if name == self.choice else ""
            lines.append(
                f"  {name:34} {1e3 * seconds:8.0f} ms measured (median {1e3 * self.medians[name]:6.0f})"
                f" {1e3 * self.predicted[name]:8.0f} predicted {mark}"
            )
        return "\n".join(lines)


def compare(case: Case, device: Device, steps: int = STEPS) -> Measured:
    """Train the layouts of a case in turn."""
    model = case.model()
    shape = _shape(model)
    machines = Machines((Host("localhost", case.ranks),), "cpu")
    resolved = load_config(
        flags={
            "seq_len": case.seq_len, "global_batch": case.global_batch, "precision": case.precision,
            "optimizer": case.optimizer,
        }
    )  # fmt: skip
    choice = fit(resolved, shape, machines, device, wanted=1).best[0].candidate
    candidates = find_candidates(resolved, shape, machines.hosts, device_is_host=True).accepted
    scores = Scores(resolved, shape, machines, device)
    predicted, trained = {}, {}
    for candidate in thinned(candidates, choice):
        plan = make_plan(override(resolved, candidate.flags), machines, shape, DATA, "none")
        predicted[_name(candidate)] = scores.time(candidate, plan.layout).total
        trained[_name(candidate)] = TrainedLayout(plan, model, case.ranks // plan.layout.world_size)
    times: dict[str, list[float]] = {name: [] for name in trained}
    try:
        for step in range(WARM_UP + steps):
            for name, layout in trained.items():
                seconds = layout.step()
                if step >= WARM_UP:
                    times[name].append(seconds)
    finally:
        for layout in trained.values():
            layout.close()
    return Measured(
        case,
        _name(choice),
        predicted,
        measured={name: min(seconds) for name, seconds in times.items()},
        medians={name: statistics.median(seconds) for name, seconds in times.items()},
    )


def thinned(candidates: Sequence[Candidate], choice: Candidate) -> list[Candidate]:
    """Fit's choice, and of each kind of layout a few: told apart by rule, not by what fit thinks of them.

    For each pipeline and schedule that uses all ranks: the lowest ZeRO stage with the smallest, a middle and the
    largest micro-batch, and with the middle one also recomputation and the other ZeRO stages, 2 left out.
    """
    most = max(candidate.layout.ranks for candidate in candidates)
    kept = [choice]
    kinds = sorted({(c.layout.pipeline, c.layout.schedule) for c in candidates if c.layout.ranks == most})
    for kind in kinds:
        alike = [c for c in candidates if (c.layout.pipeline, c.layout.schedule) == kind]
        lowest = min(c.layout.zero for c in alike)
        sizes = sorted({c.micro_batch for c in alike})
        middle = sizes[len(sizes) // 2]
        for candidate in alike:
            plain = not candidate.activation_checkpointing
            low = candidate.layout.zero == lowest
            size = candidate.micro_batch
            taken = (
                (low and plain and size in (sizes[0], middle, sizes[-1]))
                or (low and size == middle and kind[0] == 1)
                or (plain and size == middle and kind[0] == 1 and candidate.layout.zero != 2)
            )
            if taken and candidate not in kept:
                kept.append(candidate)
    return kept


def search_speed(name: str) -> None:
    """The search for 1,000 GPUs of this name: the limit is five seconds."""
    device = find_device(name, "--speed")
    machines = Machines(
        tuple(Host(f"node-{number}", 8) for number in range(125)),
        "cuda",
        memory_bytes=device.memory_bytes,
        precisions=device.precisions,
    )
    for model, shape in (("llama-8b", llama(32, 4096, 14336)), ("70B", llama(80, 8192, 28672))):
        for global_batch in (1000, 2000, 4096):
            resolved = load_config(flags={"precision": "bf16", "global_batch": global_batch, "seq_len": 8192})
            began, processor = time.perf_counter(), time.process_time()
            found = fit(resolved, shape, machines, device)
            seconds, processor = time.perf_counter() - began, time.process_time() - processor
            print(
                f"{model}, 125 x 8 {device.name}, {global_batch} samples a step: {seconds:.2f} s"
                f" ({processor:.2f} s of the processor) for {found.looked_at:,} candidates, {found.timed} of them"
                f" timed; best: {_name(found.best[0].candidate)}"
            )


def llama(blocks: int, hidden: int, intermediate: int) -> ModelShape:
    """A shape like Llama 3's, with 8 heads for keys and values of 128; the saved bytes are those of its blocks."""
    block = 2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * intermediate + 2 * hidden
    embedding = 128_256 * hidden
    saved = (28 * hidden + 8 * intermediate, 52 * hidden + 16 * intermediate)
    layers = (
        Layer("embed", "embed", embedding, 0),
        *(Layer(f"block {i}", "block", block, 2 * block, {}, 4.0 * hidden, saved) for i in range(blocks)),
        Layer("head", "head", embedding + hidden, 2 * embedding),
    )
    total = sum(layer.parameters for layer in layers)
    return ModelShape("llama", hidden, 128_256, 8192, layers, (), total, None)


def _shape(model: Any) -> ModelShape:
    from dstrain.model.measuring.measure import measure as measured

    return ModelShape.from_record(measured(model))


def _name(candidate: Candidate) -> str:
    again = " recomputed" if candidate.activation_checkpointing else ""
    return f"{candidate.layout.name} x{candidate.micro_batch}{again}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="names, or parts of them; default: all")
    parser.add_argument("--steps", type=int, default=STEPS, help="measured steps of each layout")
    parser.add_argument(
        "--speed", metavar="DEVICE", help="time the search for 1,000 of them (h100-80g, l4), and nothing else"
    )
    arguments = parser.parse_args()
    if arguments.speed:
        search_speed(arguments.speed)
        return
    chosen = [c for c in CASES if not arguments.cases or any(part in c.name for part in arguments.cases)]
    devices = {ranks: measure(ranks) for ranks in sorted({case.ranks for case in chosen})}
    for ranks, device in devices.items():
        print(f"{ranks} ranks: {device}", flush=True)
    good = 0
    for case in chosen:
        found = compare(case, devices[case.ranks], arguments.steps)
        good += found.faster < 2
        print(found, flush=True)
    print(f"among the best two in {good} of {len(chosen)} cases")
    sys.exit(good < 0.8 * len(chosen))


if __name__ == "__main__":
    main()
