"""docs/layouts.md: every combination of choices, "equal", or why it is refused and what to use.

``python -m tools.layouts_page > docs/layouts.md`` writes it; a test keeps it current, and another
one trains each accepted row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from dstrain.planning.checks import Refusal, refusal_of


@dataclass(frozen=True)
class Row:
    """One combination. ``stages`` is "one", or the schedule of several."""

    zero: int
    stages: str
    precision: str
    offload: str
    refusal: Refusal | None

    @property
    def pipeline(self) -> int:
        """The fewest stages that the row means."""
        return 1 if self.stages == "one" else 2

    @property
    def schedule(self) -> str:
        return "1f1b" if self.stages == "one" else self.stages


def rows() -> Iterator[Row]:
    """Every combination, accepted or not."""
    for zero, stages, offload, precision in product(
        (0, 1, 2, 3), ("one", "1f1b", "zb-h1", "dualpipev"), ("none", "cpu", "nvme"), ("fp32", "bf16", "fp16")
    ):
        refusal = refusal_of(
            zero=zero,
            pipeline=1 if stages == "one" else 2,
            precision=precision,
            schedule="1f1b" if stages == "one" else stages,
            offload=offload,
        )
        yield Row(zero, stages, precision, offload, refusal)


def markdown() -> str:
    """The page."""
    lines = [
        "# Layouts",
        "",
        "Written by `make docs` from the rules that the plan obeys; do not edit it.",
        "",
        "*equal*: trains the same model as one process, with any number of replicas, with and without",
        "activation checkpointing and tied weights: in fp32 to 1e-5 in each step's loss and gradient norm and",
        "in the final weights; in bf16 and fp16 within twice the spread of single-process runs that sum in other",
        "orders. Every such row is trained by `make test` or `make test-heavy` (states on disk where libaio is",
        "installed). A model with dropout or other noise is equal on average only: it depends on the layout.",
        "Numbers refer to the notes below the table.",
        "",
        "| ZeRO | stages | optimizer states | fp32 | bf16 | fp16 |",
        "|---|---|---|---|---|---|",
    ]
    notes: dict[tuple[str, str], int] = {}
    verdicts: dict[tuple[int, str, str], dict[str, str]] = {}
    for row in rows():
        if row.refusal is None:
            verdict = "equal"
        else:
            key = (row.refusal.reason, row.refusal.instead)
            verdict = f"refused ({notes.setdefault(key, len(notes) + 1)})"
        verdicts.setdefault((row.zero, row.stages, row.offload), {})[row.precision] = verdict
    places = {"none": "on the device", "cpu": "in host memory", "nvme": "on disk"}
    for (zero, stages, offload), by_precision in verdicts.items():
        name = stages if stages == "one" else f"several, {stages}"
        cells = [str(zero), name, places[offload], *by_precision.values()]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Why, and what to use instead", ""]
    lines += [f"{number}. {reason}. Use {instead}." for (reason, instead), number in notes.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
