"""docs/rehearsed.md: every cell of tests/support/rehearsed_cells.py, rehearsed, beside its plan.

``python -m tools.rehearsed_page [--rows FILE] > docs/rehearsed.md`` takes half an hour. Rows that FILE holds are kept.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dstrain import __version__
from dstrain.formatting import format_bytes
from dstrain.report.rehearsal import waits_in_a_step
from tests.support.rehearsed_cells import CELLS, RehearsedCell, rehearse_cell

_HEAD = """<!-- Written by tools/rehearsed_page.py: do not edit. -->

# Rehearsed plans

`dstrain rehearse` ran these ranks on GPUs that are not there, and held them against their plans: the peak memory of a
step, and the bytes that the rank sends in it. All are planned for H100 GPUs with 80 GB, eight a node, in bf16 where the
name says no other precision; none has run on a real GPU. [Rehearse](rehearse.md) says what a rehearsal shows, and what
it does not.

Rehearsed on {date} with dstrain {dstrain}, PyTorch {torch}, DeepSpeed {deepspeed} and transformers {transformers}.
{count} stages of {cells} plans; the plan's memory is off by {mean:.1f} % on average, and by {most:.1f} % at most.
"Waits" are places in a step where the host waits for the GPU. Names say model, ZeRO stage and pipeline stages.

| Plan | Stage | Memory planned | Rehearsed | Off by | Sent planned | Rehearsed | Waits |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=Path, help="keep what is done in this file")
    parser.add_argument("--only", nargs="*", help="rehearse these cells alone, and write no page")
    asked = parser.parse_args(arguments)
    rows = _kept(asked.rows)
    with tempfile.TemporaryDirectory() as folder:
        for cell in CELLS:
            if any(row["cell"] == cell.name for row in rows) or (asked.only and cell.name not in asked.only):
                continue
            print(cell.name, file=sys.stderr, flush=True)
            new = list(_rows(cell, Path(folder)))
            rows += new
            if asked.rows:
                with asked.rows.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
    if not asked.only:
        print(page(rows), end="")
    return 0


def _kept(file: Path | None) -> list[dict[str, Any]]:
    if file is None or not file.exists():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _rows(cell: RehearsedCell, folder: Path) -> Iterator[dict[str, Any]]:
    for stage in rehearse_cell(cell, folder).stages:
        yield {
            "cell": cell.name,
            "stage": stage.stage,
            "memory": [stage.total.planned, stage.total.rehearsed],
            "sent": [
                sum(part.planned for part in stage.traffic),
                sum(part.rehearsed for part in stage.traffic),
            ],
            "waits": waits_in_a_step(stage),
            "differences": list(stage.differences),
        }


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The page, with the cells in the order of their list."""
    order = [cell.name for cell in CELLS]
    lines, off = [], []
    for row in sorted(rows, key=lambda row: (order.index(row["cell"]), row["stage"])):
        planned, rehearsed = row["memory"]
        off.append(planned / rehearsed - 1)
        cells = [
            f"`{row['cell']}`",
            str(row["stage"]),
            *map(format_bytes, (planned, rehearsed)),
            f"{off[-1]:+.1%}",
            *map(format_bytes, row["sent"]),
            str(row["waits"]),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    head = _HEAD.format(
        date=datetime.date.today().isoformat(),
        dstrain=__version__,
        count=len(rows),
        cells=len({row["cell"] for row in rows}),
        mean=100 * sum(map(abs, off)) / len(off),
        most=100 * max(map(abs, off)),
        **{name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "transformers")},
    )
    differences = [
        f"- `{row['cell']}`, stage {row['stage']}: {difference}\n"
        for row in rows
        for difference in row["differences"]
    ]
    known = "\nNot within 5 %:\n\n" + "".join(differences) if differences else ""
    return head + "".join(lines) + known


if __name__ == "__main__":
    sys.exit(main())
