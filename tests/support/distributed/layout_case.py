"""What is common to every training that a test runs in some layout: its choices, how many ranks it takes, its name."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dstrain.api.machines import is_installed
from dstrain.config.loader import load_config
from dstrain.planning.attention import FLASH_PACKAGES
from dstrain.planning.layout import Host
from dstrain.planning.make_plan import make_plan
from dstrain.planning.model_shape import ModelShape
from dstrain.planning.plan import Machines, Plan, PlannedData


@dataclass(frozen=True)
class LayoutCase:
    """One training in one layout. Subclasses add sizes, and what else they vary."""

    zero: int = 0
    pipeline: int = 1
    data_parallel: int = 1
    precision: str = "fp32"
    optimizer: str = "adamw"
    tied: bool = True
    accumulation: int = 4
    checkpointing: bool = False
    schedule: str = "1f1b"
    offload: str = "none"
    layers: int = 4
    freeze: tuple[str, ...] = ()
    loss_chunk: int = 0  # logits of so many tokens at a time; 0: as the plan says
    momentum: float = 0.0

    ALWAYS_NAMED: ClassVar[tuple[str, ...]] = (
        *("zero", "pipeline", "data_parallel", "precision", "optimizer", "tied", "accumulation"),
    )
    """In a name whatever they are; other fields only where they are not the default."""
    NEVER_NAMED: ClassVar[tuple[str, ...]] = ()

    @property
    def world_size(self) -> int:
        return self.pipeline * self.data_parallel

    def flags(self) -> dict[str, Any]:
        """The keys of a run config that stand for the fields above."""
        return {
            "zero": self.zero,
            "pipeline": self.pipeline,
            "data_parallel": self.data_parallel,
            "precision": self.precision,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            "offload": self.offload,
            "activation_checkpointing": self.checkpointing,
            "freeze": list(self.freeze),
        }

    def named(self, name: str) -> str:
        """What one field adds to the name."""
        value = getattr(self, name)
        short = {"zero": "zero", "pipeline": "pp", "data_parallel": "dp", "accumulation": "accum"}
        if name == "tied":
            return "tied" if value else "untied"
        if name in ("precision", "optimizer"):
            return str(value)
        return f"{short[name]}{value}" if name in short else f"{name}={value}"

    def __str__(self) -> str:
        """For example ``zero2-pp2-dp1-bf16-adamw-tied-accum4-layers=6``: the id of a test."""
        plain = type(self)()
        others = [
            field.name
            for field in fields(self)
            if field.name not in (*self.ALWAYS_NAMED, *self.NEVER_NAMED)
            and getattr(self, field.name) != getattr(plain, field.name)
        ]
        return "-".join(self.named(name) for name in (*self.ALWAYS_NAMED, *others))


def plan_on_this_machine(flags: dict[str, Any], shape: ModelShape, vocab_size: int) -> Plan:
    """The plan of a run config, made by the product's own way, for data that nobody reads."""
    data = PlannedData(train_rows=10_000, validation_rows=100, vocab_size=vocab_size, fingerprint="test")
    accelerator = os.environ["DS_ACCELERATOR"]
    slots = flags["pipeline"] * flags["data_parallel"] if accelerator == "cuda" else 0
    packages = tuple(each for each in FLASH_PACKAGES.values() if is_installed(each)) if slots else ()
    machines = Machines((Host("localhost", slots),), accelerator, flash_packages=packages)
    return make_plan(load_config(flags=flags), machines, shape, data, "test")
