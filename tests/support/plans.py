"""A model's shape, its data and a plan for tests of `dstrain.planning`: numbers only, nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dstrain.config.loader import load_config
from dstrain.planning.layout import Host
from dstrain.planning.make_plan import make_plan
from dstrain.planning.model_shape import Layer, ModelShape, Tied
from dstrain.planning.plan import Machines, Plan, PlannedData

MINIMAL = Path(__file__).parent / "minimal.yaml"
DATA = PlannedData(
    source="text.txt", files=1, bytes=1000, documents=10, validation_documents=1,
    tokens=100_000, seq_len=256, train_rows=390, validation_rows=10,
    tokenizer="bytes", vocab_size=257, fingerprint="f" * 32,
)  # fmt: skip
LAPTOP = Machines((Host("localhost", 0),), "cpu", ("a processor",))


def shape(blocks: int = 6, *, tied: bool = True, **changes: Any) -> ModelShape:
    """An embedding of 51,200 parameters, ``blocks`` blocks of 100,000, a head of 51,200 (tied) and a norm."""
    layers = (
        Layer("embed", "embed", 51_200, 0),
        *(Layer(f"block {i}", "block", 100_000, 200_000) for i in range(blocks)),
        Layer("head", "head", 51_400, 102_400),
    )
    ties = (Tied("lm_head.weight", 51_200, (0, blocks + 1)),) if tied else ()
    total = sum(layer.parameters for layer in layers) - (51_200 if tied else 0)
    values: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": 200,
        "vocab_size": 257,
        "max_positions": 512,
        "pipeline_refusal": None,
    }
    return ModelShape(layers=layers, tied=ties, total_parameters=total, **(values | changes))


def plan(
    *,
    machines: Machines = LAPTOP,
    model: ModelShape | None = None,
    data: PlannedData = DATA,
    settings: tuple[str, ...] = (),
    **flags: Any,
) -> Plan:
    """The plan of these run-config values over the defaults (not over the quickstart)."""
    resolved = load_config(config_file=str(MINIMAL), settings=settings, flags=flags)
    return make_plan(resolved, machines, model or shape(), data, "/models/tiny/config.json")
