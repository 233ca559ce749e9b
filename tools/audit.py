"""Compare every version of constraints.txt with the known vulnerabilities: ``make audit``.

pip-audit asks PyPI. Its own options may follow, such as ``--vulnerability-service osv`` or ``--ignore-vuln ID``. Exit
code 0: none is known, or nothing could be learned, which is said in a line that begins with "not audited". 1: some are
known. 2: pip-audit does not work here, or does not read the versions.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tools.lock import CONSTRAINTS

FOUND, BROKEN = 1, 2


def pins(constraints: str) -> Iterator[list[str]]:
    """All ``name==version``, whatever their markers, in lists that hold each name once, since pip-audit wants that."""
    versions = re.findall(r"^([\w.-]+)==([^\s;]+)", constraints, re.MULTILINE)
    seen: Counter[str] = Counter()
    lists: list[list[str]] = []
    for name, version in versions:
        if seen[name] == len(lists):
            lists.append([])
        lists[seen[name]].append(f"{name}=={version}")
        seen[name] += 1
    yield from lists


def run_pip_audit(requirements: Path, options: Sequence[str]) -> tuple[list[dict[str, Any]] | None, str]:
    """What pip-audit knows of each package; None where it ended without. And what it said beside."""
    report = requirements.with_suffix(".json")
    report.unlink(missing_ok=True)
    command = [
        *(sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--format", "json"),
        *("--output", str(report), "--no-deps", "--disable-pip", "--requirement", str(requirements)),
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    if not report.exists() or not report.read_text():
        return None, done.stderr
    dependencies: list[dict[str, Any]] = json.loads(report.read_text())["dependencies"]
    return dependencies, done.stderr


def audit(constraints: str, options: Sequence[str]) -> int:
    """Prints what is found, and returns the exit code."""
    known: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "requirements.txt"
        for pinned in pins(constraints):
            file.write_text("\n".join(pinned) + "\n")
            # Without the service first: what fails after that fails for want of it.
            found, said = run_pip_audit(file, [*options, "--dry-run"])
            if found is None:
                print(said, file=sys.stderr)
                return BROKEN
            found, said = run_pip_audit(file, options)
            if found is None:
                print(f"not audited: {_last_line(said)}")
                break
            known += found
    return _report(known)


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "the service of known vulnerabilities gave no answer"


def _report(known: list[dict[str, Any]]) -> int:
    unknown = [one["name"] for one in known if "skip_reason" in one]
    audited = len(known) - len(unknown)
    if unknown:
        names = ": " + ", ".join(unknown) if audited else ""
        print(f"not audited: {len(unknown)} of {len(known)} versions, which the service does not know{names}")
    vulnerable = [one for one in known if one.get("vulns")]
    for one in vulnerable:
        for fault in one["vulns"]:
            names = ", ".join([fault["id"], *fault.get("aliases", ())])
            repaired = ", ".join(fault["fix_versions"]) or "no version yet"
            print(f"{one['name']} {one['version']}: {names}; fixed in {repaired}")
    if audited:
        print(f"audited {audited} versions: {len(vulnerable) or 'none'} with known vulnerabilities")
    return FOUND if vulnerable else 0


def main() -> None:
    raise SystemExit(audit(CONSTRAINTS.read_text(), sys.argv[1:]))


if __name__ == "__main__":
    main()
