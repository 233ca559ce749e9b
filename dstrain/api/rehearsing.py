"""``rehearse``: runs the ranks of a plan on GPUs that are not there, each in a process of its own."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dstrain.api.events import SILENT, Events
from dstrain.api.machines import elsewhere, is_installed
from dstrain.api.planning import Planned, plan_for
from dstrain.child_process import run_module
from dstrain.config.loader import ResolvedConfig
from dstrain.errors import DstrainError
from dstrain.estimate.traffic import stage_traffic
from dstrain.planning.attention import FLASH_PACKAGES
from dstrain.planning.plan import Plan
from dstrain.report.rehearsal import LIMITS, RehearsedStage, compare
from dstrain.strict_json import to_json

_MEMORY = 80_000_000_000
"""Of a GPU whose memory is not known."""


@dataclass(frozen=True)
class RehearsalResult:
    """Rehearsed stages of a plan, held against it.

    Attributes:
        plan: what was rehearsed.
        stages: one rank of each stage.
        limits: what a rehearsal does not show.
    """

    plan: Plan
    stages: tuple[RehearsedStage, ...]
    limits: tuple[str, ...] = LIMITS

    @property
    def differences(self) -> tuple[str, ...]:
        """What is not as planned, in words."""
        return tuple(
            f"stage {stage.stage}: {difference}" for stage in self.stages for difference in stage.differences
        )

    @property
    def agrees(self) -> bool:
        """Whether memory and traffic are within 5 % of the plan, and nothing fails or lies on a wrong device."""
        return not self.differences

    def to_record(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "agrees": self.agrees,
            "differences": list(self.differences),
            "stages": [stage.to_record() for stage in self.stages],
            "layout": asdict(self.plan.layout),
            "limits": list(self.limits),
        }


def rehearse(
    config: ResolvedConfig,
    *,
    device: str | None = None,
    gpus_per_node: int | None = None,
    stages: Sequence[int] | Literal["all"] | None = None,
    traced: bool = False,
    events: Events = SILENT,
) -> RehearsalResult:
    """Let ranks of a plan do on fake GPUs what they would do in a run, and compare it with the plan.

    No GPU is needed, and little memory: tensors have shapes and devices, and no values. With a torch that was built
    without CUDA a small library is compiled once.

    Args:
        config: from `load_config`.
        device: for GPUs that are not here: as of `plan`.
        gpus_per_node: as of `plan`.
        stages: which, or ``all``; by default the one that needs the most memory.
        traced: let each stage say what is there at its fullest moment.
        events: told of the plan and of the progress.

    Raises:
        DstrainError: the config can't be trained, the plan is for CPUs, there is no such stage, or the fake GPU can't
            be made here.
    """
    planned = plan_for(config, elsewhere(device, gpus_per_node), events)
    plan = planned.plan
    events.planned(plan)
    _refuse_what_cannot_be_rehearsed(plan)
    found = []
    for stage in _chosen(plan, stages):
        if plan.layout.pipeline > 1:
            events.note(f"stage {stage}:", "progress")
        sent = stage_traffic(plan.run_config, planned.shape, plan.layout, plan.batch, stage, plan.deepspeed)
        found.append(compare(plan.stage_memory[stage], sent, _rehearsed(planned, stage, traced, events)))
    return RehearsalResult(plan, tuple(found))


def _chosen(plan: Plan, stages: Sequence[int] | Literal["all"] | None) -> Sequence[int]:
    """Raises DstrainError for a stage that there is none of."""
    if stages is None:
        return [max(range(plan.layout.pipeline), key=lambda stage: plan.stage_memory[stage].total)]
    if stages == "all":
        return range(plan.layout.pipeline)
    for stage in stages:
        if not isinstance(stage, int) or not 0 <= stage < plan.layout.pipeline:
            raise DstrainError(
                f"there is no stage {stage}",
                where="--stage",
                hint=f"0 to {plan.layout.pipeline - 1}" if plan.layout.pipeline > 1 else "0 is the only one",
            )
    return stages


def _refuse_what_cannot_be_rehearsed(plan: Plan) -> None:
    if plan.accelerator != "cuda":
        raise DstrainError(
            "the plan is for CPUs, and only GPUs are rehearsed",
            where="--device",
            hint="add --device NAME, for example h100-80g, to rehearse GPUs that are not here",
        )
    if plan.model.bits is not None:
        raise DstrainError(
            "weights that bitsandbytes holds have no form without values, and can't be rehearsed",
            where="adapter.base",
            hint="rehearse without adapter.base; `dstrain plan` counts its memory",
        )
    attention = plan.config["attention"]
    package = FLASH_PACKAGES.get(attention)
    if package is not None and not is_installed(package):
        raise DstrainError(
            f"{attention} is rehearsed with the Python package {package}, which is not installed here",
            where=plan.origins["attention"],
            hint="rehearse with --set attention=auto",
        )


def _rehearsed(planned: Planned, stage: int, traced: bool, events: Events) -> dict[str, Any]:
    """What the rank of this stage in the first replica did. Raises DstrainError where it could not begin."""
    plan = planned.plan
    request = {
        "plan": plan.to_record(),
        "rank": plan.layout.rank(stage, 0),
        "vocabulary": planned.shape.vocab_size,
        "gpu": {
            "name": plan.device,
            "memory_bytes": plan.memory_bytes or _MEMORY,
            "capability": (8, 0) if "bf16" in planned.devices.precisions else (7, 0),
            "devices": max(plan.layout.slots),
        },
        "traced": traced,
    }
    with tempfile.TemporaryDirectory() as aside:
        asked, answered = Path(aside) / "request.json", Path(aside) / "answer.json"
        asked.write_text(to_json(request), encoding="utf-8")
        run_module(
            "dstrain.rehearsal.rank_process",
            str(asked),
            str(answered),
            say=lambda text: events.note(text, "progress"),
        )
        answer: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
        return answer
