"""What is accepted, but may not be what was meant: said with the plan, each with its reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dstrain.config.schema import RunConfig
from dstrain.plan.batch import Batch
from dstrain.plan.layout import Layout
from dstrain.plan.shape import ModelShape


def warnings_about(
    config: RunConfig, layout: Layout, batch: Batch, data: Mapping[str, Any], shape: ModelShape
) -> list[str]:
    """What is accepted, but may not be what was meant."""
    found = []
    if layout.pipeline > 1:
        waiting = (layout.pipeline - 1) / (2 if layout.schedule == "dualpipev" else 1)
        bubble = waiting / (batch.accumulation + waiting)
        if bubble > 0.3:
            found.append(
                f"{batch.accumulation} micro-batches for {layout.pipeline} stages leave each stage idle for"
                f" {bubble:.0%} of the time; a smaller --micro-batch or a larger --global-batch helps"
            )
        if config.zero == 2 and layout.data_parallel > 1:
            found.append(
                f"ZeRO-2 with a pipeline reduces the gradients of each of the {batch.accumulation}"
                " micro-batches; --zero 1 reduces them once a step and needs little more memory"
            )
        if config.zero == 3:
            found.append(
                f"ZeRO-3 with a pipeline gathers each stage's parameters for each of the {batch.accumulation}"
                " micro-batches, forward and backward; --zero 2 gathers none, and a stage's weights are"
                f" 1/{layout.pipeline} of the model's already"
            )
        for host in layout.hosts:
            if len(layout.hosts) > 1 and host.slots % layout.pipeline:
                found.append(
                    f"a pipeline crosses from {host.name} to another host ({host.slots} ranks there)"
                )
    if config.deterministic:
        found.append(
            "deterministic: kernels that add in one order take the place of faster ones (attention's and the"
            " embedding's backward pass, matrix products), memory is filled before it is used, and what has no such"
            " kernel stops the run with its name"
        )
    if config.warmup_steps >= config.steps:
        found.append(
            f"the warm-up ({config.warmup_steps} steps) is as long as the run ({config.steps}): lr never falls"
        )
    if config.zero and layout.data_parallel == 1:
        found.append(f"ZeRO-{config.zero} shares memory between replicas, and there is only one")
    if shape.dropout:
        found.append(
            f"the model drops activations at random (up to {shape.dropout:g}): which ones depends on the layout,"
            " so that layouts agree on average only; dropout 0 in its config.json makes them equal"
        )
    if shape.router_loss and config.micro_batch is None:
        found.append(
            "the router loss of its experts is taken over a micro-batch: set --micro-batch to compare layouts"
            f" (here {batch.micro_batch}, which follows from the layout)"
        )
    if data.get("padding", 0.0) >= 0.005:
        found.append(
            f"{data['padding']:.0%} of the tokens are padding: with --no-pack a sample holds one document, and the"
            " rest of it costs time but teaches nothing"
        )
    epochs = config.steps * config.global_batch / data["train_rows"]
    if epochs > 1:
        found.append(f"the data's {data['train_rows']:,} samples are seen {epochs:.1f} times")
    return found


def warnings_about_memory(config: RunConfig, stage_memory: Sequence[int], limit: float | None) -> list[str]:
    """Whether a stage is estimated to need more than ``limit`` bytes, and by how much."""
    fullest = max(stage_memory)
    if limit is None or fullest <= limit:
        return []
    which = f"a rank of stage {stage_memory.index(fullest)}" if config.pipeline > 1 else "a rank"
    if config.pipeline == 1:
        why = ""
    elif config.partition == "auto":
        why = "; no cut that fits was found"
    else:
        why = "; --partition auto looks for a cut that fits"
    return [
        f"{which} may not fit: about {fullest / 1e9:.1f} GB estimated, {(fullest - limit) / 1e9:.1f} GB more than"
        f" the {limit / 1e9:.1f} GB that it can count on{why}"
    ]
