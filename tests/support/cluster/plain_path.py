"""Paths that survive the remote shells of pdsh, mpirun and DeepSpeed's launchers.

DeepSpeed's runner joins its remote command with spaces and quotes nothing, so that a path with a space becomes two
words; dstrain refuses such a python, working folder or run folder (`launch.launch_spec.check_remote`, tested in
tests/unit/test_launch_command.py). Where this checkout or its virtual environment lies in such a path, the commands of
this folder go there by links that do not.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path

from dstrain.launch.launch_spec import is_plain

_ROOT = Path(__file__).resolve().parents[3]


def plain_root() -> Path:
    """This checkout."""
    return _ROOT if is_plain(str(_ROOT)) else _linked(_ROOT)


def plain_python() -> str:
    """The python of the tests: by the link it finds the same virtual environment."""
    if is_plain(sys.executable):
        return sys.executable
    environment = Path(sys.prefix)
    return str(_linked(environment) / Path(sys.executable).relative_to(environment))


def plain_script(name: str, folder: Path) -> Path:
    """A script of the virtual environment, written into ``folder`` with a first line that the kernel can read: pip
    wraps its own entry points where the path holds a space, but not the scripts that a package brings along."""
    text = (Path(sys.executable).parent / name).read_text(encoding="utf-8")
    script = folder / name
    script.write_text(f"#!{plain_python()}\n{text.partition(chr(10))[2]}", encoding="utf-8")
    script.chmod(0o755)
    return script


@functools.cache
def _linked(folder: Path) -> Path:
    place = tempfile.mkdtemp(prefix="plain-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    link = Path(place) / "link"
    link.symlink_to(folder, target_is_directory=True)
    return link
