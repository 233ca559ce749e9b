"""Child processes of the command line: what they say, what they leave behind, and what they import."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dstrain.child_process import run_module
from dstrain.errors import DstrainError


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The name of a module with this code."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))

    def write(code: str) -> str:
        (tmp_path / "modules").mkdir(exist_ok=True)
        (tmp_path / "modules" / "mine.py").write_text(f"import os, signal, subprocess, sys, time\n{code}\n")
        return "mine"

    return write


def has_ended(pid: int) -> bool:
    """Or it is a zombie that only its parent has to take note of."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def wait_for_the_end(pid: int) -> None:
    until = time.monotonic() + 20
    while not has_ended(pid):
        assert time.monotonic() < until, "it runs on"
        time.sleep(0.02)


def test_progress_is_said_and_an_error_passed_on(module: Callable[[str], str]) -> None:
    said: list[str] = []
    run_module(
        module("print('dstrain: half', file=sys.stderr); print('more', file=sys.stderr)"), say=said.append
    )
    assert said == ["half"]
    wrong = "x.json:3: this is wrong"
    for code in (1, 2):
        with pytest.raises(DstrainError) as caught:
            run_module(
                module(
                    "from dstrain.child_process import child_main\nfrom dstrain.errors import DstrainError\n"
                    "@child_main\ndef main(arguments):\n    print('a library warns', file=sys.stderr)\n"
                    f"    raise DstrainError('this is wrong', where='x.json:3', hint='so', exit_code={code})\n"
                    "sys.exit(main([]))"
                )
            )
        assert (caught.value.message, caught.value.hint, caught.value.exit_code) == (wrong, "so", code)
    with pytest.raises(DstrainError, match=r"^mine failed: ValueError: no$"):
        run_module(module("raise ValueError('no')"))
    with pytest.raises(DstrainError, match=r"^mine failed: it was ended by SIGSEGV$"):
        run_module(module("os.kill(os.getpid(), signal.SIGSEGV)"))


def test_what_it_leaves_running_is_ended_and_not_waited_for(module: Callable[[str], str]) -> None:
    """It holds standard error open."""
    said: list[str] = []
    began = time.monotonic()
    code = "print(subprocess.Popen(['sleep', '600']).pid, file=sys.stderr, flush=True)"
    run_module(module(code), say=said.append, user_code=True)
    assert time.monotonic() - began < 300
    wait_for_the_end(int(said[0]))


def test_it_ends_where_the_caller_gives_up(module: Callable[[str], str]) -> None:
    said: list[str] = []

    def give_up(line: str) -> None:
        said.append(line)
        raise KeyboardInterrupt

    code = "print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)"
    with pytest.raises(KeyboardInterrupt):
        run_module(module(code), say=give_up, user_code=True)
    wait_for_the_end(int(said[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_it_ends_with_its_parent(number: int, module: Callable[[str], str]) -> None:
    name = module("print(os.getpid(), file=sys.stderr, flush=True); time.sleep(600)")
    code = f"from dstrain.child_process import run_module; run_module({name!r}, say=print, user_code=True)"
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ["PYTHONPATH"]])},
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.send_signal(number)
    wait_for_the_end(child)


def test_files_of_the_current_folder_hide_nothing(
    module: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("random", "json", "token", "torch", "dstrain"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')\n")
    monkeypatch.chdir(tmp_path)
    run_module(module("import json, random, token, dstrain.errors"))


def test_what_it_has_half_written_goes_where_the_caller_gives_up(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    code = f"""
try:
    open({str(half)!r}, "w").close()
    print("begun", file=sys.stderr, flush=True)
    time.sleep(600)
finally:
    os.unlink({str(half)!r})
"""

    def give_up(line: str) -> None:
        assert half.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_module(module(code), say=give_up, user_code=True)
    assert not half.exists()


def test_one_that_does_not_end_by_itself_is_not_waited_for(
    module: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dstrain.child_process._CLEAN_SECONDS", 0.2)
    said: list[str] = []

    def give_up(line: str) -> None:
        said.append(line)
        raise KeyboardInterrupt

    code = """
while True:
    try:
        print(os.getpid(), file=sys.stderr, flush=True)
        time.sleep(600)
    except BaseException:
        pass
"""
    with pytest.raises(KeyboardInterrupt):
        run_module(module(code), say=give_up, user_code=True)
    wait_for_the_end(int(said[0]))


def test_who_ended_it_is_said(module: Callable[[str], str]) -> None:
    with pytest.raises(DstrainError, match=r"^mine failed: it was ended by SIGTERM$"):
        run_module(module("os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)"))


def test_forks_of_its_own_end_as_ever(module: Callable[[str], str]) -> None:
    """``multiprocessing`` ends its workers by SIGTERM."""
    code = """
worker = os.fork()
if not worker:
    time.sleep(600)
os.kill(worker, signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == -signal.SIGTERM
"""
    run_module(module(code))
