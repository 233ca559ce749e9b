"""The scheduler block of a DeepSpeed JSON whose parameters are all "auto", as the keys of the run config.

The Hugging Face Trainer fills such a block in from its own arguments; its documentation shows it in every example.
Source: `deepspeed.runtime.lr_schedules`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_DECIDABLE = ("default", "recipe")


@dataclass(frozen=True)
class Scheduler:
    """One of DeepSpeed's schedulers.

    Attributes:
        lr_schedule: the built-in schedule of the same shape after the warm-up.
        lr_final: where it ends, as a fraction of the learning rate; None where it does not fall.
    """

    lr_schedule: str
    lr_final: float | None = None


SCHEDULERS = {
    "WarmupLR": Scheduler("constant"),
    "WarmupDecayLR": Scheduler("linear", lr_final=0.0),
    "WarmupCosineLR": Scheduler("cosine", lr_final=0.0001),
}
"""By the name in ``scheduler.type``."""


def keys_of_scheduler(block: Any, kinds: Mapping[str, str]) -> dict[str, Any]:
    """The run config's keys for a scheduler block whose parameters are all "auto"; none for any other block.

    Args:
        block: what stands under ``scheduler``.
        kinds: the kind of origin (`dstrain.config.origins.Origin`) of ``lr_schedule`` and ``lr_final``. What the user
            has set himself stays.
    """
    if not isinstance(block, Mapping):
        return {}
    parameters = block.get("params")
    found = SCHEDULERS.get(str(block.get("type")))
    if found is None or not isinstance(parameters, Mapping) or not parameters:
        return {}
    if any(value != "auto" for value in parameters.values()):
        return {}
    keys: dict[str, Any] = {"lr_schedule": found.lr_schedule}
    if found.lr_final is not None:
        keys["lr_final"] = found.lr_final
    return {key: value for key, value in keys.items() if kinds[key] in _DECIDABLE}
