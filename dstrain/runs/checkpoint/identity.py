"""What must match between a checkpoint and the run that resumes from it, and what may change.

Both are described by `Plan.identity`; a checkpoint's manifest holds that of the run that saved it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError, way_out
from dstrain.planning.layout_names import LayoutChoice
from dstrain.runs.checkpoint.manifest import MANIFEST, WHOLE, read_manifest

_NAMED = ("zero", "pipeline", "data_parallel", "schedule", "offload")
_LAYOUT = (*_NAMED, "cut")
_MAY_CHANGE = (*_LAYOUT, "micro_batch")

# They stand in an identity only where they are the user's own, or there is one.
_OWN_ALONE = ("loss", "loss_options", "adapter", "base")

_WHY = {
    "base": " (the pretrained weights that the adapter is for, which no checkpoint holds)",
    "global_batch": " (the next samples and the learning rate are counted in its steps)",
    "data": " (the same files, tokenizer and validation split; of several sources the same weights and phases)",
}


def refuse_other_batch(checkpoint: Path, *, global_batch: int, data_parallel: int | None) -> None:
    """Refuse what needs another global batch than the checkpoint's, in words that do not propose to change it.

    What the plan says of a batch that can't be shared is meant for a run that begins. Raises DstrainError.
    """
    _refuse_another("global_batch", global_batch, identity_of(checkpoint), checkpoint)
    if data_parallel is None or global_batch % data_parallel == 0:
        return
    fitting = [number for number in range(1, global_batch + 1) if global_batch % number == 0]
    below = [number for number in fitting if number < data_parallel][-1:]
    above = [number for number in fitting if number > data_parallel][:1]
    raise DstrainError(
        f"the run's global batch of {global_batch} can't be divided evenly among {data_parallel}"
        " replicas, and can't change on resume",
        where="--data-parallel",
        hint=f"--data-parallel {' or '.join(map(str, below + above))}",
    )


def refuse_other(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another training: another model, data, optimizer or precision.

    Another layout is none, but where DeepSpeed keeps states in files of its own. Raises DstrainError.
    """
    saved = identity_of(checkpoint)
    own = (key for key in _OWN_ALONE if key in saved or key in identity)  # others follow from these
    for key in dict.fromkeys((*own, *identity)):
        if key not in _MAY_CHANGE:
            _refuse_another(key, identity.get(key), saved, checkpoint)
    if _another_layout(saved, identity) and "nvme" in (saved.get("offload"), identity.get("offload")):
        raise DstrainError(
            f"a run can't go from {_name(saved)} to {_name(identity)}: with `offload: nvme` the weights"
            " are in DeepSpeed swap files, which only the ranks that wrote them can read",
            where=str(checkpoint),
            hint="resume in the layout that the checkpoint was made with, or start a new run under another --name",
        )


def _refuse_another(key: str, value: Any, saved: Mapping[str, Any], checkpoint: Path) -> None:
    if saved.get(key) != value:
        absent = "none" if key == "adapter" else "built-in"
        before, now = (absent if v is None and key in _OWN_ALONE else v for v in (saved.get(key), value))
        raise DstrainError(
            f"the checkpoint was made with {key} = {before}, but this run has {now}",
            where=str(checkpoint),
            hint=f"resume with the same {key}{_WHY.get(key, '')}, or start a new run under another --name",
        )


def is_other_layout(checkpoint: Path, identity: Mapping[str, Any]) -> bool:
    """Whether another layout than this run's has saved the checkpoint, so that its ranks' files are not ours."""
    return _another_layout(identity_of(checkpoint), identity)


def what_changes(checkpoint: Path, identity: Mapping[str, Any]) -> list[str]:
    """In a line each, what of the layout is another than the checkpoint's. Empty where nothing is."""
    saved = identity_of(checkpoint)
    lines = []
    if _another_layout(saved, identity):
        before, after = _name(saved), _name(identity)
        if before == after:
            before, after = f"{before} cut at {_cut(saved)}", f"at {_cut(identity)}"
        lines.append(
            f"{before} -> {after}: the same training continues; each rank reads its part of {checkpoint.name}"
        )
    old, new = saved.get("micro_batch"), identity.get("micro_batch")
    if old is not None and new is not None and old != new:
        lines.append(
            f"micro-batches of {old} -> {new}: only the router loss of a mixture of experts depends on it"
        )
    return lines


def _another_layout(saved: Mapping[str, Any], identity: Mapping[str, Any]) -> bool:
    return any(key in identity and saved.get(key) != identity[key] for key in _LAYOUT)


def identity_of(checkpoint: Path) -> dict[str, Any]:
    """`Plan.identity` of the run that saved a checkpoint. Raises DstrainError where its manifest can't be read."""
    try:
        identity: dict[str, Any] = read_manifest(checkpoint)["identity"]
    except (OSError, ValueError, KeyError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        reason = f"{error} is missing" if isinstance(error, KeyError) else reason
        raise DstrainError(
            f"this checkpoint's manifest can't be read: {reason}",
            where=str(checkpoint / MANIFEST),
            hint=way_out(error, WHOLE) if isinstance(error, OSError) else WHOLE,
        ) from error
    return identity


def _name(identity: Mapping[str, Any]) -> str:
    """A layout's name, as ``zero1-pp2-dp2``."""
    if any(key not in identity for key in _NAMED):
        return "a layout of an older dstrain"
    return LayoutChoice(**{key: identity[key] for key in _NAMED}).name


def _cut(identity: Mapping[str, Any]) -> str:
    """The first layers of the stages behind the first."""
    return ",".join(str(layer) for layer in identity.get("cut", ())[1:-1])
