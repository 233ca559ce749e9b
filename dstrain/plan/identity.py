"""What a checkpoint must agree on with the run that goes on from it, and what may change in between.

Both are described by `Plan.identity`; a checkpoint's manifest holds that of the run that saved it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError
from dstrain.plan.layout_choice import LayoutChoice
from dstrain.plan.manifest import read_manifest

_NAMED = ("zero", "pipeline", "data_parallel", "schedule", "offload")
_LAYOUT = (*_NAMED, "cut")
_MAY_CHANGE = (*_LAYOUT, "micro_batch")


def refuse_other(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another training: another model, data, optimizer or precision.

    Another layout is none, but where DeepSpeed keeps states in files of its own. Raises DstrainError.
    """
    saved = _identity_of(checkpoint)
    for key, value in identity.items():
        if key not in _MAY_CHANGE and saved.get(key) != value:
            raise DstrainError(
                f"the checkpoint was made with {key} = {saved.get(key)}, and this run has {value}",
                where=str(checkpoint),
                hint=f"resume with the same {key}, or start a new run under another --name",
            )
    if is_other_layout(checkpoint, identity) and "nvme" in (saved.get("offload"), identity.get("offload")):
        raise DstrainError(
            f"a run can't go from {_name(saved)} to {_name(identity)}: with `offload: nvme` the weights lie in swap"
            " files of DeepSpeed, which only the ranks that wrote them can read",
            where=str(checkpoint),
            hint="resume in the layout that the checkpoint was made with, or start a new run under another --name",
        )


def is_other_layout(checkpoint: Path, identity: Mapping[str, Any]) -> bool:
    """Whether another layout than this run's has saved the checkpoint, so that its ranks' files are not ours."""
    saved = _identity_of(checkpoint)
    return any(key in identity and saved.get(key) != identity[key] for key in _LAYOUT)


def what_changes(checkpoint: Path, identity: Mapping[str, Any]) -> list[str]:
    """In a line each, what of the layout is another than the checkpoint's. Empty where nothing is."""
    saved = _identity_of(checkpoint)
    lines = []
    if is_other_layout(checkpoint, identity):
        before, after = _name(saved), _name(identity)
        if before == after:
            before, after = f"{before} cut at {_cut(saved)}", f"at {_cut(identity)}"
        lines.append(
            f"{before} -> {after}: each rank reads what it needs from the files of {checkpoint.name}"
        )
    old, new = saved.get("micro_batch"), identity.get("micro_batch")
    if old is not None and new is not None and old != new:
        lines.append(
            f"micro-batches of {old} -> {new}: the same sums, but for the router loss of a mixture of experts,"
            " which is not the same over other micro-batches"
        )
    return lines


def _identity_of(checkpoint: Path) -> dict[str, Any]:
    return read_manifest(checkpoint)["identity"]


def _name(identity: Mapping[str, Any]) -> str:
    """A layout's name, as ``zero1-pp2-dp2``."""
    if any(key not in identity for key in _NAMED):
        return "a layout of an earlier dstrain"
    return LayoutChoice(**{key: identity[key] for key in _NAMED}).name


def _cut(identity: Mapping[str, Any]) -> str:
    """The first layers of the stages behind the first."""
    return ",".join(str(layer) for layer in identity.get("cut", ())[1:-1])
