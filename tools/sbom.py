"""Write a bill of materials, CycloneDX in JSON: the Python packages of an environment and Debian's packages.

    dpkg-query --show --showformat FORMAT | python -m tools.sbom PYTHON > sbom.cdx.json

The Dockerfile does so for the image; ``FORMAT`` is below. For the same packages it is the same to the byte: it holds no
time and no serial number. What a wheel brings along inside of itself, such as compiled libraries, has no entry.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

FORMAT = r"${Package}\t${Version}\t${Architecture}\t${db:Status-Status}\n"
"""Of dpkg-query."""
_RELEASE = Path("/etc/os-release")


def python_packages(python: str) -> dict[str, Any]:
    """The bill of what the environment of this interpreter holds, as cyclonedx-bom writes it.

    Raises:
        SystemExit: with cyclonedx-bom's exit code: it has said why.
    """
    # Where this program's own packages lie is no place of that interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    search = f"import runpy, sys; sys.path[:0] = {sys.path!r}; runpy.run_module('cyclonedx_py', run_name='__main__')"
    # The whole bill is validated in the end.
    options = ["--output-reproducible", "--no-validate", "--spec-version", "1.6"]
    command = [sys.executable, "-c", search, "environment", *options, python]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
    bill: dict[str, Any] = json.loads(done.stdout)
    return bill


def debian_packages(listed: str, release: str) -> list[dict[str, Any]]:
    """A component for each installed package.

    Args:
        listed: what dpkg-query says, in ``FORMAT``.
        release: the content of /etc/os-release: which Debian or Ubuntu it is.
    """
    said = dict(line.split("=", 1) for line in release.splitlines() if "=" in line)
    system, number = (said.get(key, "").strip("\"'") for key in ("ID", "VERSION_ID"))
    components = []
    for name, version, architecture, status in (line.split("\t") for line in listed.splitlines()):
        if status != "installed":
            continue
        qualifiers = {"arch": architecture, "distro": f"{system}-{number}"}
        url = PackageURL("deb", system, name, version, qualifiers).to_string()
        components.append({"bom-ref": url, "type": "library", "name": name, "version": version, "purl": url})
    return components


def bill_of_materials(python: str, listed: str, release: str) -> str:
    """The whole bill, valid by CycloneDX's schema. Raises ValueError if it is not, or knows no dstrain."""
    bill = python_packages(python)
    versions = [one["version"] for one in bill.get("components", ()) if one["name"] == "dstrain"]
    if not versions:
        raise ValueError(f"there is no dstrain in the environment of {python}")
    components = [*bill["components"], *debian_packages(listed, release)]
    bill["components"] = sorted(components, key=lambda one: str(one["bom-ref"]))
    bill["metadata"]["component"] = {
        "bom-ref": "image",
        "type": "container",
        "name": "dstrain",
        "version": versions[0],
    }
    text = json.dumps(bill, indent=2, sort_keys=True) + "\n"
    if fault := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        raise ValueError(f"the bill does not follow CycloneDX's schema: {fault}")
    return text


def main() -> None:
    [python] = sys.argv[1:]
    print(bill_of_materials(python, sys.stdin.read(), _RELEASE.read_text()), end="")


if __name__ == "__main__":
    main()
