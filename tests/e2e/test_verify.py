"""`dstrain verify` with real, launched runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.heavy
@pytest.mark.timeout(900)
def test_verify_finds_zero2_and_zero3_with_a_pipeline_equal(tmp_path: Path, repository: Path) -> None:
    layouts = "zero2-pp2,zero3-pp2,zero1-pp2-dualpipev"
    arguments = ["--tiny", "--steps", "4", "--layouts", layouts, "--set", "micro_batch=2"]
    done = subprocess.run(
        [sys.executable, "-m", "dstrain.cli.main", "verify", *arguments],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(repository), "DS_ACCELERATOR": "cpu", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [table] = tmp_path.glob("runs/verify-*/verify.json")
    rows = json.loads(table.read_text())["layouts"]
    assert [(row["layout"], row["verdict"]) for row in rows] == [
        ("zero2-pp2-dp1", "equal"),
        ("zero3-pp2-dp1", "equal"),
        ("zero1-pp2-dp1-dualpipev", "equal"),
    ]
