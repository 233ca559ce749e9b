"""What a command costs before it works: none of the heavy libraries for help, an error, or a plan."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dstrain.config
import dstrain.launch
import dstrain.planning
import dstrain.runs.checkpoint
import dstrain.supervise

HEAVY = {"torch", "deepspeed", "transformers", "datasets", "numpy", "pyarrow"}
FOR_HELP = {"click", "dstrain"}
LIGHT = sorted(
    f"{package.__name__}.{module.name}"
    for package in (
        dstrain.config,
        dstrain.planning,
        dstrain.runs.checkpoint,
        dstrain.launch,
        dstrain.supervise,
    )
    for module in pkgutil.iter_modules(package.__path__)
)
TELL = "import json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


def loaded_by(code: str, repository: Path) -> set[str]:
    """The top-level modules that a fresh interpreter holds after ``code``."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{TELL}"],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_check_sees_what_is_imported(repository: Path) -> None:
    assert {"numpy"} <= loaded_by("import numpy", repository)


def test_there_is_something_to_check() -> None:
    assert {"dstrain.config.loader", "dstrain.planning.plan", "dstrain.supervise.supervisor"} <= set(LIGHT)


@pytest.mark.parametrize("module", LIGHT)
def test_these_rooms_are_light(module: str, repository: Path) -> None:
    assert not loaded_by(f"import {module}", repository) & HEAVY


def test_what_the_api_knows_of_the_data_is_light(repository: Path) -> None:
    """The readers of tables are loaded where a table is read."""
    assert (
        not loaded_by("import dstrain.api.prepare_data, dstrain.data.reading.documents", repository) & HEAVY
    )


def test_launch_and_supervise_know_no_pydantic_either(repository: Path) -> None:
    modules = (
        "dstrain.launch.hosts, dstrain.launch.devices, dstrain.launch.command, dstrain.launch.environment"
    )
    code = f"import {modules}, dstrain.supervise.supervisor, dstrain.supervise.subreaper"
    assert not loaded_by(code, repository) & (HEAVY | {"pydantic"})


def test_the_command_line_imports_no_more_than_click(repository: Path) -> None:
    loaded = loaded_by("import dstrain.cli.main", repository)
    assert "click" in loaded
    assert not loaded & (HEAVY | {"pydantic", "rich", "yaml"})


@pytest.mark.parametrize(
    "arguments", [["--help"], ["-h"], ["--version"], ["run", "--help"], ["plan", "--help"], ["nonsense"]]
)
def test_help_is_light(arguments: list[str], repository: Path) -> None:
    code = f"""
import sys
from dstrain.cli.main import main
sys.argv = ["dstrain", *{arguments!r}]
try:
    main()
except SystemExit as end:
    assert end.code == {2 if arguments == ["nonsense"] else 0}, end.code
"""
    libraries = loaded_by(code, repository) - loaded_by("", repository) - sys.stdlib_module_names
    if arguments[0] in ("run", "plan"):  # their flags are made from the config's schema
        assert not libraries & (HEAVY | {"rich"})
    else:
        assert libraries == FOR_HELP


def test_a_config_error_is_light(repository: Path) -> None:
    code = """
import sys
from dstrain.cli.main import main
sys.argv = ["dstrain", "run", "--set", "stpes=3"]
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
"""
    assert not loaded_by(code, repository) & HEAVY
