"""Layouts by name, such as ``zero2-pp2-dp2-dualpipev-cpu``, and the layouts possible for a number of ranks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dstrain.errors import DstrainError
from dstrain.planning.checks import Refusal, refusal_of

_NAME = re.compile(
    r"zero(?P<zero>[0-3])(-pp(?P<pp>[1-9]\d*))?(-dp(?P<dp>[1-9]\d*))?(-(?P<schedule>zb-h1|dualpipev))?(-(?P<offload>cpu))?"
)


@dataclass(frozen=True)
class LayoutChoice:
    """The choices that make up a layout."""

    zero: int
    pipeline: int = 1
    data_parallel: int = 1
    schedule: str = "1f1b"
    offload: str = "none"

    @classmethod
    def parse(cls, name: str) -> LayoutChoice:
        """Raises DstrainError for what is no such name."""
        match = _NAME.fullmatch(name.strip())
        if not match:
            raise DstrainError(
                f"{name!r} is not a layout",
                where="--layouts",
                hint="write zeroZ-ppP-dpD, for example zero2-pp4 or zero1-pp2-dp2-zb-h1",
            )
        return cls(
            zero=int(match["zero"]),
            pipeline=int(match["pp"] or 1),
            data_parallel=int(match["dp"] or 1),
            schedule=match["schedule"] or "1f1b",
            offload=match["offload"] or "none",
        )

    @property
    def name(self) -> str:
        parts = [f"zero{self.zero}", f"pp{self.pipeline}", f"dp{self.data_parallel}"]
        parts += [self.schedule] * (self.schedule != "1f1b") + [self.offload] * (self.offload != "none")
        return "-".join(parts)

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data_parallel

    def flags(self) -> dict[str, object]:
        """The run-config keys of this layout."""
        return {
            "zero": self.zero,
            "pipeline": self.pipeline,
            "data_parallel": self.data_parallel,
            "schedule": self.schedule,
            "offload": self.offload,
        }

    def refusal(self, precision: str) -> Refusal | None:
        return refusal_of(
            zero=self.zero,
            pipeline=self.pipeline,
            precision=precision,
            schedule=self.schedule,
            offload=self.offload,
        )


def layouts_for(ranks: int, precision: str) -> list[LayoutChoice]:
    """The accepted layouts that use all of ``ranks`` ranks, without offload."""
    found = []
    for pipeline in (size for size in range(1, ranks + 1) if ranks % size == 0):
        for zero in (0, 1, 2, 3):
            for schedule in ("1f1b", "dualpipev") if pipeline > 1 else ("1f1b",):
                choice = LayoutChoice(zero, pipeline, ranks // pipeline, schedule)
                if choice.refusal(precision) is None:
                    found.append(choice)
    return found
