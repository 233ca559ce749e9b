"""Plans and DeepSpeed JSONs: how they are asked for, and where those of 0.1 lie."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.golden.cells import Cell
from tests.golden.commands import DATA, Said

_ORIGIN = re.compile(r"(?P<key>\S+)\s{2,}(?P<value>\S.*?)\s{2,}(?P<origin>\S.*?)\s*")


def plan_file(cell: Cell) -> Path:
    return DATA / "plan" / f"{cell.name}.json"


def config_file(cell: Cell) -> Path:
    return DATA / "config_show" / f"{cell.name}.json"


def plan_of(cell: Cell, dstrain: Callable[..., Said]) -> Any:
    said = dstrain(*cell.plan)
    assert said.code == 0, said
    return json.loads(said.out)


def config_of(cell: Cell, dstrain: Callable[..., Said]) -> Any:
    """``deepspeed``: the JSON; ``origins``: where the value of each dotted key comes from."""
    shown, table = dstrain(*cell.config_show), dstrain(*cell.config_show, "--origins")
    assert shown.code == table.code == 0, (shown, table)
    rows = [match for line in table.out.splitlines() if (match := _ORIGIN.fullmatch(line))]
    deepspeed = json.loads(shown.out)
    values = {row["key"]: json.loads(row["value"]) for row in rows}
    assert values == flat(deepspeed), "the table has the same keys and values as the JSON"
    return {"deepspeed": deepspeed, "origins": {row["key"]: row["origin"] for row in rows}}


def flat(value: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Nested objects by dotted key."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{above}{key}.") if isinstance(item, dict) and item else {f"{above}{key}": item}
    return found
