"""A signal while a command works in a child process: nothing of it is left, neither processes nor files."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain.runs.this_machine import read_process
from dstrain.supervise.process_tree import family

DATA = """
import pathlib, time
def documents():
    pathlib.Path("reading").touch()
    time.sleep(600)
    yield "never"
"""
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 75}


@pytest.mark.parametrize("number", CODES)
def test_a_stop_while_data_are_tokenized(number: signal.Signals, place: Path) -> None:
    (place / "slow.py").write_text(DATA)
    temporary, cache = place / "tmp", place / "cache"
    temporary.mkdir()
    own = {"TMPDIR": str(temporary), "DSTRAIN_CACHE": str(cache)}
    arguments = [
        "plan",
        "--model",
        "model",
        "--tokenizer",
        "bytes",
        "--data",
        "slow:documents",
        "--seq-len",
        "32",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "dstrain.cli.main", *arguments],
        cwd=place, env=os.environ | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    with process:
        try:
            until = time.monotonic() + 200
            while not (place / "reading").exists():
                assert process.poll() is None and time.monotonic() < until, process.stdout.read()
                time.sleep(0.05)
            children = family(process.pid)
            assert children, "it works in a process of its own"
            os.kill(process.pid, number)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    word = "stopped" if number == signal.SIGINT else f"stopped by {number.name}"
    assert process.returncode == CODES[number] and f"error: {word}" in said and "Traceback" not in said, said
    for child in children:
        now = read_process(child.pid)
        assert now is None or now.zombie or now.start != child.start, "it works on"
    left = [path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor")]
    assert not left
    assert not list(cache.rglob("*.part"))
