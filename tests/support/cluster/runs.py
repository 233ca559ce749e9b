"""What the runs of these tests have in common: their materials, their numbers, and how soon a failure ends them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.runs.run_folder import RunFolder, read_metrics
from tests.support.hooks.readers import from_metrics, from_tensorboard

END_SECONDS = 30
"""The end of a run after a fault, on every host: what the user is promised."""

OWN_CODE = Path(__file__).parents[1] / "own_code"
HOOKS = [
    *("--tracker", "tensorboard", "--set", "hooks=[watching_hosts:OnEveryRank]"),
    *("--set", f"code_dirs={json.dumps([str(OWN_CODE)])}"),
]
"""Arguments of a run whose hooks `check_hooks` looks at."""

# What must be the same wherever the ranks are; seconds and memory may differ.
_SAME = ("step", "loss", "lr", "grad_norm", "tokens", "validation_loss")


def lay_out(materials: Path, place: Path) -> None:
    """Put the model and the text where a run finds them."""
    for name in ("model", "text.jsonl"):
        (place / name).symlink_to(materials / name)


def numbers(folder: RunFolder) -> list[dict[str, Any]]:
    """Of each step, all that must not depend on hosts, launchers and failures."""
    return [{key: record.get(key) for key in _SAME} for record in read_metrics(folder.metrics)]


def check_hooks(folder: RunFolder, hosts: list[str], steps: int) -> None:
    """The hook was called on each rank, where it was; the tracker has every value that metrics.jsonl has."""
    seen = [json.loads((folder.path / f"watched-{rank}.json").read_text()) for rank in range(len(hosts))]
    assert seen == [{"host": host, "steps": list(range(1, steps + 1))} for host in hosts]
    told = from_tensorboard(folder.path / "tensorboard")
    for step, values in from_metrics(folder.metrics).items():
        assert {name: pytest.approx(value, rel=1e-6) for name, value in values.items()} == told[step]
