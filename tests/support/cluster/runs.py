"""What the runs of these tests have in common: their materials, their numbers, and how soon a failure ends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dstrain.runs.run_folder import RunFolder, read_metrics

END_SECONDS = 30
"""The end of a run after a fault, on every host: what the user is promised."""

# What must be the same wherever the ranks are; seconds and memory may differ.
_SAME = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss")


def lay_out(materials: Path, place: Path) -> None:
    """Put the model and the text where a run finds them."""
    for name in ("model", "text.jsonl"):
        (place / name).symlink_to(materials / name)


def numbers(folder: RunFolder) -> list[dict[str, Any]]:
    """Of each step, all that must not depend on hosts, launchers and failures."""
    return [{key: record.get(key) for key in _SAME} for record in read_metrics(folder.metrics)]
