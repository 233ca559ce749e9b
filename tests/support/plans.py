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


def transformer(blocks: int, hidden: int, vocabulary: int, *, tied: bool, window: int = 0) -> ModelShape:
    """A decoder with four attention and three feed-forward matrices a block; FLOPs and bytes as of Llama's.

    Args:
        window: bytes a token and position that a block keeps: of eager attention's scores.
    """
    inner = 8 * hidden // 3
    matrices = {"q": hidden**2, "k": hidden**2, "v": hidden**2, "o": hidden**2, "norm": hidden}
    matrices |= {"up": hidden * inner, "gate": hidden * inner, "down": hidden * inner}
    block, embedding = sum(matrices.values()), vocabulary * hidden
    kept, working = 20 * hidden + 6 * inner, 8 * hidden + 4 * inner
    layers = (
        Layer("embed", "embed", embedding, 0, {"embed.weight": embedding}),
        *(
            Layer(
                f"block {i}", "block", block, 2 * block, {f"{i}.{name}": size for name, size in matrices.items()},
                4.0 * hidden, (kept, 2 * kept), (float(window), 2.0 * window), (working, 2 * working),
            )
            for i in range(blocks)
        ),
        Layer(
            "head", "head", embedding + hidden, 2 * embedding,
            {"head.weight": embedding, "head.norm": hidden}, 0.0, (6 * hidden, 12 * hidden),
        ),
    )  # fmt: skip
    ties = (
        (Tied("embed.weight", embedding, (0, blocks + 1), ("embed.weight", "head.weight")),) if tied else ()
    )
    total = sum(layer.parameters for layer in layers) - tied * embedding
    return ModelShape("llama", hidden, vocabulary, None, layers, ties, total, None)


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
