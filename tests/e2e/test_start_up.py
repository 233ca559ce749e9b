"""What `dstrain plan` costs when all is known already: no process, and no library but a few."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.bad_inputs.row import GOOD
from tests.support.e2e import Said

# Each of them is paid for at every start; whoever adds one says what for (benchmarks/startup.py tells the price).
ALLOWED = {
    "dstrain",
    "click",  # the command line
    "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection",  # the run config
    "yaml",  # its file
    "rich", "pygments", "markdown_it", "mdurl",  # the tables
}  # fmt: skip
TELL = """
import json, sys
before = set(sys.modules)
started = []
def listen(event, arguments):
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system", "os.exec"):
        started.append(event)
sys.addaudithook(listen)
sys.argv = ["dstrain", *json.loads(sys.argv[1])]
from dstrain.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code
libraries = {
    name.partition(".")[0]
    for name in set(sys.modules) - before
    if getattr(sys.modules[name], "__file__", None) and not name.startswith("_sysconfigdata")
}
print(json.dumps([started, sorted(libraries - sys.stdlib_module_names)]))
"""


def test_a_warm_plan_is_light(place: Path, materials: Path, dstrain_here: Callable[..., Said]) -> None:
    arguments = ["plan", *[str(materials / "text.jsonl") if word == "text.jsonl" else word for word in GOOD]]
    assert dstrain_here(*arguments).code == 0  # the model is measured, and the data are prepared
    done = subprocess.run(
        [sys.executable, "-c", TELL, json.dumps(arguments)],
        cwd=place, env=dict(os.environ), capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    started, libraries = json.loads(done.stdout.splitlines()[-1])
    assert "4 layers" in done.stdout
    assert not started
    assert {"click", "pydantic", "yaml"} <= set(libraries) <= ALLOWED


def test_changed_data_are_looked_at_again(place: Path, dstrain_here: Callable[..., Said]) -> None:
    def tokens() -> int:
        said = dstrain_here("plan", *GOOD, "--data", "own.txt", "--set", "validation=0", "--json")
        return int(json.loads(said.out)["data"]["tokens"])

    (place / "own.txt").write_text("first words " * 100)
    before = tokens()
    assert tokens() == before
    (place / "own.txt").write_text("first words, and more " * 100)
    assert tokens() > before
