"""Where Python looks for modules, in all that dstrain starts: never first, or by chance, in the current folder."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.child_process import module_command
from dstrain.launch import environment as launch_environment
from dstrain.launch.environment import default_environment, start_folder
from dstrain.plugins import load_plugin
from dstrain.runs.run_folder import DIRECTORY
from dstrain.train.rank_environment import enter_directory

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to stand in, whose modules leave a word in the file that is returned."""
    word = tmp_path / "word"
    word.touch()
    folder = tmp_path / "here"
    folder.mkdir()
    for name in ("random", "json", "typing", "runpy", "difflib", "yaml", "click", "no_such_module_anywhere"):
        (folder / f"{name}.py").write_text(f"open({str(word)!r}, 'a').write(__name__)\n")
    monkeypatch.chdir(folder)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return word


def test_a_module_command_passes_over_the_current_folder(canary: Path) -> None:
    done = subprocess.run(
        [*module_command("json.tool"), "--help"], capture_output=True, text=True, check=True
    )
    assert "json.tool" in done.stdout or "usage" in done.stdout
    assert canary.read_text() == ""
    assert "'" not in module_command("x")[2] and "\n" not in module_command("x")[2]


def test_python_m_dstrain_passes_over_it_too(canary: Path) -> None:
    """But for what Python 3.10 imports before dstrain comes: runpy."""
    (Path.cwd() / "runpy.py").unlink()
    command = [sys.executable, "-m", "dstrain.cli.main", "config", "--help"]
    subprocess.run(command, capture_output=True, check=True)
    assert canary.read_text() == ""


def test_other_programs_keep_their_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``python -m mine`` that uses dstrain."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (Path.cwd() / "mine").mkdir()
    (Path.cwd() / "mine" / "__init__.py").write_text("import dstrain\n")
    (Path.cwd() / "mine" / "part.py").write_text("import mine_too\n")
    (Path.cwd() / "mine_too.py").write_text("print('found')\n")
    done = subprocess.run([sys.executable, "-m", "mine.part"], capture_output=True, text=True, check=True)
    assert done.stdout == "found\n"


@pytest.mark.parametrize("safe", [True, False])
def test_ranks_are_told(safe: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_environment, "SAFE_PATH", safe)
    monkeypatch.chdir(tmp_path)
    told = default_environment("cpu", 1, True, environ={"PYTHONPATH": "src"})
    assert told.get("PYTHONSAFEPATH") == ("1" if safe else None)
    assert told.get(DIRECTORY) == (None if safe else str(tmp_path))
    assert start_folder(Path("x")) == (str(tmp_path / "x") if safe else "/")
    if not safe:  # relative places would count from /
        assert str(tmp_path / "src") in told["PYTHONPATH"].split(os.pathsep)
        monkeypatch.chdir("/")
        enter_directory(told)
        assert Path.cwd() == tmp_path


def test_a_plugin_that_is_installed_opens_no_folder(canary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    load_plugin("dstrain.hooks.profiler:Profiler", [os.getcwd()], what="hook")
    assert sys.path == before
    (Path.cwd() / "only_here_7.py").write_text("Mine = 1\n")
    assert load_plugin("only_here_7:Mine", [os.getcwd()], what="hook") == 1
    assert sys.path == [*before, os.getcwd()] and canary.read_text() == ""


def without_stdin(source: str) -> Iterator[int]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in (
            *("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call"),
            *("subprocess.check_output", "os.system", "os.popen"),
        ):
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if not given.keys() & {"stdin", "input"}:
                yield node.lineno


def test_whatever_is_started_has_no_standard_input() -> None:
    assert list(without_stdin("subprocess.run(['a'])\nos.system('a')")) == [1, 2]
    files = sorted((ROOT / "dstrain").rglob("*.py"))
    found = {str(file): list(without_stdin(file.read_text(encoding="utf-8"))) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}
