"""tools/sbom.py: what the image's bill of materials holds, of an environment made for it."""

from __future__ import annotations

import json
import os
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from tools.sbom import bill_of_materials

RELEASE = 'PRETTY_NAME="Debian"\nID=debian\nVERSION_ID="12"\n'
LISTED = (
    "zlib1g\t1:1.2.13.dfsg-1\tamd64\tinstalled\n"
    "libc6\t2.36-9+deb12u10\tamd64\tinstalled\n"
    "gone\t1.0\tall\tconfig-files\n"
)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment that holds dstrain 9.8 and small 1.0, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for name, version in {"dstrain": "9.8", "small": "1.0"}.items():
        info = packages / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder / "bin" / "python")


def bill(python: str, listed: str = LISTED) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bill_of_materials(python, listed, RELEASE))
    return found


def test_it_lists_what_is_installed_and_nothing_else(python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in the image's build, where the packages of the tool lie in a folder of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = bill(python)
    assert sorted(one["purl"] for one in found["components"]) == [
        "pkg:deb/debian/libc6@2.36-9%2Bdeb12u10?arch=amd64&distro=debian-12",
        "pkg:deb/debian/zlib1g@1:1.2.13.dfsg-1?arch=amd64&distro=debian-12",
        "pkg:pypi/dstrain@9.8",
        "pkg:pypi/small@1.0",
    ]
    assert (found["bomFormat"], found["specVersion"]) == ("CycloneDX", "1.6")
    assert found["metadata"]["component"]["version"] == "9.8"


def test_it_is_the_same_to_the_byte_whatever_the_order_and_the_hour(python: str) -> None:
    first = bill_of_materials(python, LISTED, RELEASE)
    other_order = "".join(reversed(LISTED.splitlines(keepends=True)))
    assert bill_of_materials(python, other_order, RELEASE) == first
    assert "serialNumber" not in first and "timestamp" not in first


def test_an_environment_without_dstrain_is_no_image(tmp_path: Path) -> None:
    venv.create(tmp_path, symlinks=True)
    with pytest.raises(ValueError, match="no dstrain"):
        bill_of_materials(str(tmp_path / "bin" / "python"), LISTED, RELEASE)
