"""How `data/` was written, by the last commit of 0.1: ``python -m tests.golden.make_data [plans] [losses] ...``.

A later version writes nothing of it anew, but for a cell that is added: all else that changes on purpose goes into the
tables of `compare.py`. Commands are new interpreters here, as a user's are.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.golden.cells import CELLS
from tests.golden.commands import DATA, Said, environment, make_place, start
from tests.golden.compare import normalised
from tests.golden.make_run_folder import make_run_folder
from tests.golden.plans import config_file, config_of, plan_file, plan_of
from tests.golden.processor import fingerprint
from tests.golden.runs import IN_DETAIL, LAYOUTS, LOSSES, RUN_FOLDER, losses_of, run_folder_of, train


def main(parts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as aside:
        place = make_place(Path(aside))
        environ = environment(Path(aside) / "home", Path(aside) / "cache")

        def dstrain(*arguments: str) -> Said:
            return start(place, environ, *arguments, real=True).said()

        if "plans" in parts:
            for cell in CELLS:
                _write(plan_file(cell), normalised(plan_of(cell, dstrain), place))
                _write(config_file(cell), normalised(config_of(cell, dstrain), place))
        if "losses" in parts:
            runs = {layout: train(layout, place, dstrain) for layout in LAYOUTS}
            numbers = {layout: losses_of(folder) for layout, folder in runs.items()}
            _write(LOSSES, {"made_on": fingerprint(), "losses": numbers})
            _write(RUN_FOLDER, run_folder_of(runs[IN_DETAIL]))
    if "run-folder" in parts:
        make_run_folder()


def _write(path: Path, value: Any) -> None:
    """A line for each key of the outermost object: short, and a difference of two versions can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(key)}: {json.dumps(item, separators=(',', ':'))}" for key, item in value.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(path.relative_to(DATA), path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:] or ["plans", "losses", "run-folder"])
