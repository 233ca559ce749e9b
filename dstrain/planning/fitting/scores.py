"""The score of a candidate: its partition, time and memory, as `make_plan` would find them."""

from __future__ import annotations

from collections.abc import Hashable

from dstrain.config.loader import ResolvedConfig
from dstrain.config.schema import RunConfig
from dstrain.estimate.device import Device
from dstrain.estimate.memory import USABLE, Memory, estimate, memory_needed, stage_memory
from dstrain.estimate.stage_time import attended_share, layer_times
from dstrain.estimate.time import StepTime, stages_waiting, step_time
from dstrain.planning.attention import with_chosen_attention
from dstrain.planning.batch import Batch
from dstrain.planning.buffer_sizes import loss_chunk
from dstrain.planning.deepspeed.composition import user_values
from dstrain.planning.fitting.candidates import Candidate
from dstrain.planning.layout import Layout, fill_hosts
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.partition import cut_as_asked, cut_by_time
from dstrain.planning.plan import Machines


class Scores:
    """Scores candidates of one model on the same machines. What several of them share is found once."""

    def __init__(
        self, resolved: ResolvedConfig, shape: ModelShape, machines: Machines, device: Device
    ) -> None:
        known = machines.memory_bytes is not None
        self.limit = USABLE * (machines.memory_bytes or 0) if known else None
        """Bytes that may be filled of a device, or of a host's memory on CPUs; None: not known."""
        # Ranks on CPUs share their host's memory, which another cut does not make larger.
        self._limit_of_cut = None if machines.accelerator == "cpu" else self.limit
        self._config = with_chosen_attention(resolved, shape, *machines.kernels).config
        self._deepspeed = user_values(resolved)
        self._shape = shape
        self._machines = machines
        self._device = device
        self.timed = 0
        """How many times were estimated, which takes a while."""
        self._attended = attended_share(self._config)
        self._times: dict[tuple[bool, bool], tuple[int, ...]] = {}
        self._fastest: dict[tuple[int, str, bool, bool], tuple[int, ...]] = {}

    def config(self, candidate: Candidate) -> RunConfig:
        return self._config.model_copy(update=candidate.flags)

    def batch(self, candidate: Candidate) -> Batch:
        replicas, size = candidate.layout.data_parallel, candidate.micro_batch
        total = self._config.global_batch
        return Batch(total, size, total // (replicas * size), replicas, self._config.seq_len)

    def layer_times(self, candidate: Candidate) -> tuple[int, ...]:
        """Of each layer, for one sample, in FLOPs."""
        key = (candidate.activation_checkpointing, self._in_chunks(candidate))
        if key not in self._times:
            self._times[key] = layer_times(
                self._shape,
                seq_len=self._config.seq_len,
                attended=self._attended,
                blocks_recomputed=key[0],
                head_recomputed=key[1],
            )
        return self._times[key]

    def fastest(self, candidate: Candidate) -> Layout:
        """With the cut that the user asked for, or the one that would be taken with memory without end."""
        choice = candidate.layout
        key = (
            choice.pipeline,
            choice.schedule,
            candidate.activation_checkpointing,
            self._in_chunks(candidate),
        )
        if key not in self._fastest:
            asked = cut_as_asked(self._config.partition, self._shape, choice.pipeline, choice.schedule)
            self._fastest[key] = asked or self._cut(candidate, None)
        return self._layout(candidate, self._fastest[key])

    def within_memory(self, candidate: Candidate) -> Layout:
        """With the fastest cut that fits, if one is found."""
        asked = cut_as_asked(
            self._config.partition, self._shape, candidate.layout.pipeline, candidate.layout.schedule
        )
        return self._layout(candidate, asked or self._cut(candidate, self._limit_of_cut))

    def time(self, candidate: Candidate, layout: Layout) -> StepTime:
        self.timed += 1
        return step_time(
            self.config(candidate),
            self._shape,
            layout,
            self.batch(candidate),
            self._device,
            deepspeed=self._deepspeed,
        )

    def memory(self, candidate: Candidate, layout: Layout) -> int:
        """Bytes needed of one device, or of one host of CPUs."""
        accelerator = self._machines.accelerator
        needs = stage_memory(
            self.config(candidate), self._shape, layout, self.batch(candidate), accelerator, self._deepspeed
        )
        return memory_needed(layout, needs, accelerator)[0]

    def alike_in_memory(self, candidate: Candidate) -> Hashable:
        """Candidates that need the more memory the larger their micro-batch is have this in common.

        With one micro-batch a step no gradients are accumulated, and with no more than stages fewer are in flight; a
        loss in chunks keeps no logits.
        """
        layout = candidate.layout
        flying = min(self.batch(candidate).accumulation, layout.pipeline + 1)
        return layout, candidate.activation_checkpointing, flying, self._in_chunks(candidate)

    def least_time(self, candidate: Candidate) -> float:
        """Less than `time`, and found at once: what the slowest stage computes and waits for, and nothing else."""
        choice, batch = candidate.layout, self.batch(candidate)
        times = self.layer_times(candidate)
        mean = batch.micro_batch * sum(times) / choice.pipeline
        on_cpu = self._device.kind == "cpu"
        sharing = max(host.slots for host in fill_hosts(self._machines.hosts, choice.ranks)) if on_cpu else 1
        rate = self._device.flops[self._config.precision] * self._device.utilisation / sharing
        waiting = stages_waiting(choice.pipeline, choice.schedule)
        if on_cpu and sharing > self._device.gpus_per_node:
            waiting = 0.0  # while one rank waits, others use its core
        return (batch.accumulation + waiting) * mean / rate

    def least_memory(self, candidate: Candidate) -> float:
        """No cut brings the fullest stage below this: the mean of the stages, and what the largest layer needs."""
        memory, stages = self._estimate(candidate), candidate.layout.pipeline
        flying = min(memory.in_flight)
        layers = [
            state + once + flying * kept
            for state, once, kept in zip(memory.states, memory.once, memory.kept, strict=True)
        ]
        return memory.working + flying * memory.boundary + max(sum(layers) / stages, max(layers))

    def may_fit(self, candidate: Candidate) -> bool:
        """Whether there may be a cut that fits: found much faster than the cut. For 1f1b without a doubt."""
        limit = self._limit_of_cut
        if limit is None:
            return True
        if candidate.layout.schedule != "1f1b":
            return self.least_memory(candidate) <= limit
        # Each stage takes as many layers as fit: if these are too few for all, no other way to share them helps.
        memory, count, start = self._estimate(candidate), len(self._shape.layers), 0
        for stage in range(candidate.layout.pipeline):
            end = start
            while end < count and memory.of_stage(stage, (range(start, end + 1),)) <= limit:
                end += 1
            if end == start:
                break
            start = end
        return start == count

    def _estimate(self, candidate: Candidate) -> Memory:
        batch = self.batch(candidate)
        return estimate(
            self.config(candidate),
            self._shape,
            replicas=batch.data_parallel,
            micro_batch=batch.micro_batch,
            accumulation=batch.accumulation,
            device_is_host=self._machines.accelerator == "cpu",
        )

    def _cut(self, candidate: Candidate, limit: float | None) -> tuple[int, ...]:
        choice = candidate.layout
        return cut_by_time(
            self.layer_times(candidate), choice.pipeline, choice.schedule, self._estimate(candidate), limit
        )

    def _layout(self, candidate: Candidate, cut: tuple[int, ...]) -> Layout:
        choice = candidate.layout
        hosts = fill_hosts(self._machines.hosts, choice.ranks)
        return Layout(hosts, choice.pipeline, choice.data_parallel, cut, choice.schedule)

    def _in_chunks(self, candidate: Candidate) -> bool:
        return bool(
            loss_chunk(
                candidate.micro_batch,
                self._config.seq_len,
                self._shape.vocab_size,
                tokenwise=self._shape.tokenwise_head,
            )
        )
