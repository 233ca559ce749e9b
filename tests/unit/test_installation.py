"""`make` installs torch from the index that it is told, and hands its options on to pip."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder that pip can use as an index: it holds one package, a torch that is a version and nothing else."""
    [version] = re.findall(r"^torch==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    version += "+local"
    folder = tmp_path / "index" / "torch"
    folder.mkdir(parents=True)
    wheel = folder / f"torch-{version}-py3-none-any.whl"
    information = f"torch-{version}.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("torch/__init__.py", f"__version__ = {version!r}\n")
        # A dependency that the index does not have: what torch depends on comes from elsewhere.
        archive.writestr(
            f"{information}/METADATA",
            f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\nRequires-Dist: sympy\n",
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    (folder / "index.html").write_text(f'<a href="{wheel.name}#sha256={digest}">{wheel.name}</a>\n')
    return tmp_path / "index"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`make` in the repository; pip knows nothing of this machine's settings and reaches only what it is told."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1"}
    return subprocess.run(
        ["make", "-C", str(ROOT), f"PYTHON={sys.executable}", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_torch_comes_from_the_index_that_is_named(tmp_path: Path, index: Path) -> None:
    venv = tmp_path / "venv"
    done = make(f"VENV={venv}", f"TORCH_INDEX={index.as_uri()}", f"{venv}/.torch")
    assert done.returncode == 0, done.stderr
    told = subprocess.run(
        [venv / "bin" / "python", "-c", "import torch; print(torch.__version__)"],
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip().endswith("+local"), told.stderr
    assert (venv / ".torch").exists()


def test_an_index_without_torch_is_an_error(tmp_path: Path, index: Path) -> None:
    """Nothing else is asked in its place: a build for GPUs would come along unseen."""
    venv = tmp_path / "venv"
    done = make(f"VENV={venv}", f"TORCH_INDEX={(index / 'torch').as_uri()}", f"{venv}/.torch")
    assert done.returncode != 0 and re.search("No matching distribution|Cannot install torch", done.stderr)
    assert not (venv / ".torch").exists()


def test_options_are_handed_to_every_pip(tmp_path: Path, index: Path) -> None:
    venv = tmp_path / "venv"
    options = f"--index-url {index.as_uri()} --no-deps"
    done = make(f"VENV={venv}", f"PIP_ARGS={options}", f"{venv}/.torch")
    assert done.returncode == 0, done.stderr
    shown = make("--dry-run", f"VENV={venv}", f"PIP_ARGS={options}", f"{venv}/.ready").stdout
    [last] = [line for line in shown.splitlines() if "pip install" in line]
    assert options in last and last.endswith("-e '.[dev]'") and "-c constraints.txt" in last
