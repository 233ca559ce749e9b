"""The table of config values in a plan, each with its origin."""

from __future__ import annotations

from dstrain.cli.showing.tables import Column, FoldingTable
from dstrain.planning.plan import Plan

_SHOWN = (
    "model", "init", "tokenizer", "data", "zero", "pipeline", "partition", "data_parallel", "schedule", "precision",
    "offload", "micro_batch", "global_batch", "seq_len", "steps", "optimizer", "lr",
    "gradient_clipping", "activation_checkpointing", "seed",
)  # fmt: skip


def choices(plan: Plan) -> FoldingTable:
    """Key, value and origin of what decides most."""
    table = FoldingTable(
        Column("choice", style="bold"), Column("value", gives=True), Column("from", gives=True, style="dim")
    )
    separate = () if plan.config["pack"] else ("pack",)
    beside = [
        key
        for key in ("data_options", "optimizer_options", "trackers", "profile", "hooks")
        if plan.config.get(key)
    ]
    for key in (*_SHOWN, *separate, *beside):
        value = plan.config[key]
        if key == "data_parallel" and value is None:
            table.add_row(key, str(plan.layout.data_parallel), "as many as the devices allow")
        elif key == "micro_batch" and value is None:
            table.add_row(key, str(plan.batch.micro_batch), "derived from the global batch")
        elif key == "tokenizer" and value == "auto":
            table.add_row(key, str(plan.data.tokenizer), f"auto ({plan.origins[key]})")
        elif key in ("init", "partition") and plan.origins[key] == "default":
            continue
        else:
            table.add_row(key, str(value), plan.origins[key])
    return table
