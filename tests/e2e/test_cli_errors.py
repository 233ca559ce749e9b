"""How errors are shown; which there are stands in tests/support/bad_inputs."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.bad_inputs.row import GOOD
from tests.support.e2e import Said


def test_what_is_right_is_planned(place: Path, dstrain_here: Callable[..., Said]) -> None:
    """The arguments that each bad input adds to are themselves no mistake."""
    said = dstrain_here("plan", *GOOD)
    assert said.code == 0 and "4 layers" in said.out and not said.err
    assert not (place / "runs").exists()


@pytest.mark.parametrize("arguments", [["--debug", "run"], ["run", "--debug"]], ids=["first", "last"])
def test_debug_shows_the_traceback(arguments: list[str], place: Path, dstrain: Callable[..., Said]) -> None:
    said = dstrain(*arguments, "--set", "stpes=1")
    assert said.code != 0 and "Traceback" in said.err and "stpes" in said.err


def test_a_reader_that_goes_away_is_no_error(place: Path, dstrain: Callable[..., Said]) -> None:
    """``dstrain config show | head -1``"""
    argv = [sys.executable, "-m", "dstrain.cli.main", "plan", *GOOD, "--json"]
    command = f"set -o pipefail; {shlex.join(argv)} | head -1"
    done = subprocess.run(["bash", "-c", command], cwd=place, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n" and "Traceback" not in done.stderr
