"""A fork looks like the python that it stands for, from inside and from outside."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.forking.program import HOOK, Program, may_fork

TELL = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "place": os.getcwd(), "environment": dict(os.environ), "group": os.getpgid(0), "pid": os.getpid(),
    "arguments": open("/proc/self/cmdline").read().rstrip(chr(0)), "torch": "torch" in sys.modules,
}))
"""


def program(code: str, *arguments: str, place: Path, **environment: str) -> Program:
    return Program([sys.executable, "-c", code, *arguments], cwd=place, env=environment)


def test_it_has_the_arguments_the_folder_and_the_environment_that_it_was_given(tmp_path: Path) -> None:
    forked = program(TELL, "one", "two three", place=tmp_path, A="1")
    assert forked.wait(60) == 0 and not forked.err
    told = json.loads(forked.out)
    assert told.pop("torch"), "it imports nothing anew"
    assert told["pid"] == told["group"] == forked.pid
    argv = [sys.executable, "-c", TELL, "one", "two three"]
    assert told["arguments"].replace("\0", " ") == " ".join(argv)
    real = subprocess.run(argv, cwd=tmp_path, env={"A": "1"}, capture_output=True, text=True, check=True)
    same = ("argv", "place", "arguments")
    assert {key: told[key] for key in same} == {key: json.loads(real.stdout)[key] for key in same}
    assert told["environment"] == {"A": "1"}


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('no')", 1),
        ("raise KeyError", 1),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.kill(os.getpid(), 15)", -15),
    ],
)
def test_it_ends_as_a_python_does(code: str, ends: int, tmp_path: Path) -> None:
    assert program(code, place=tmp_path).wait(60) == ends
    real = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert real.returncode == ends


def test_what_it_starts_is_forked_too(tmp_path: Path) -> None:
    """By itself, and through a launch.sh, which bash has worked out."""
    (tmp_path / "launch.sh").write_text(
        f"""set -eu
mkdir -p sub; cd -- sub
export B='two words' C="${{A:-none}}"
exec {shlex.quote(sys.executable)} -m json.tool "$1"
"""
    )
    (tmp_path / "what.json").write_text('{"a": 1}')
    code = f"""
import subprocess, sys
print(subprocess.run([sys.executable, "-c", "import sys; print('torch' in sys.modules)"], stdout=-1).stdout.decode())
done = subprocess.run(["bash", "{tmp_path}/launch.sh", "../what.json"], stdout=-1)
print(done.returncode, done.stdout.decode())
print(subprocess.run(["bash", "{tmp_path}/launch.sh"], stderr=-1).stderr.decode())
"""
    forked = program(code, place=tmp_path, PATH=os.environ["PATH"])
    assert forked.wait(60) == 0, forked.err
    assert forked.out.startswith('True\n\n0 {\n    "a": 1\n}\n')
    assert "launch.sh: line 4: $1: unbound variable" in forked.out, (
        "a script that fails does so in its own words"
    )


def test_it_is_signalled(tmp_path: Path) -> None:
    forked = program("print('here', flush=True)\nimport time; time.sleep(60)", place=tmp_path)
    deadline = time.monotonic() + 30
    while not forked.out and time.monotonic() < deadline:
        time.sleep(0.01)
    assert forked.poll() is None
    with pytest.raises(TimeoutError, match="here"):
        forked.wait(0.01)
    forked.send_signal(signal.SIGTERM)
    assert forked.wait(30) == -signal.SIGTERM


def test_where_commands_are_forked() -> None:
    assert may_fork({"PYTHONPATH": f"{HOOK}:/elsewhere"})
    assert not may_fork({"PYTHONPATH": f"/other/modules:{HOOK}"}) and not may_fork({})
