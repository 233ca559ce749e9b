"""How long a command takes before it says anything, beside its peers: a table on stdout.

    python benchmarks/startup.py            # 15 runs of each, one after the other, in turns
    python benchmarks/startup.py --runs 5

Each is run as a user runs it, in a process of its own; the median of the runs is shown, the quickest, and the median
of the processor's seconds, which are the steadier ones on a machine with other work. All files are in memory, and a
plan is warm: its model was measured and its data were prepared before.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("dstrain", "click", "pydantic", "rich", "accelerate", "deepspeed", "torch")
HERE = Path(sys.executable).parent
DSTRAIN = [sys.executable, "-m", "dstrain.cli.main"]


def commands() -> dict[str, list[str] | None]:
    """What is timed, by the name that is shown; None: it is not installed."""
    return {
        "python -c pass": [sys.executable, "-c", "pass"],
        "dstrain --help": [*DSTRAIN, "--help"],
        "dstrain plan --help": [*DSTRAIN, "plan", "--help"],
        "dstrain plan (a mistake in it)": [*DSTRAIN, "plan", "--set", "stpes=3"],
        "dstrain plan --pipeline 2 (warm)": [*DSTRAIN, "plan", "--pipeline", "2"],
        "accelerate --help": _peer("accelerate"),
        "deepspeed --help": _peer("deepspeed"),
        "torchrun --help": _peer("torchrun"),
    }


def _peer(name: str) -> list[str] | None:
    found = HERE / name if (HERE / name).exists() else shutil.which(name)
    return [str(found), "--help"] if found else None


def seconds_of(command: list[str]) -> tuple[float, float]:
    """One run: seconds by the clock, and of the processor."""
    before, began = os.times(), time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env=_environment())
    clock, after = time.perf_counter() - began, os.times()
    return clock, after.children_user + after.children_system - before.children_user - before.children_system


def _environment() -> dict[str, str]:
    repository = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH")]))
    return {"DS_ACCELERATOR": "cpu"} | os.environ | {"PYTHONPATH": path}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--runs", type=int, default=15, help="of each command (15)")
    runs = parser.parse_args().runs
    all_commands = commands()
    timed = {name: command for name, command in all_commands.items() if command is not None}
    for command in timed.values():
        seconds_of(
            command
        )  # the files are in memory afterwards, the model is measured, the data are prepared
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
    for _ in range(runs):  # in turns, so that a busy moment of the machine is everybody's
        for name, command in timed.items():
            found[name].append(seconds_of(command))
    print("| command | median | quickest | of the processor |\n| --- | ---: | ---: | ---: |")
    for name in all_commands:
        if name in found:
            clock, processor = zip(*found[name], strict=True)
            times = (statistics.median(clock), min(clock), statistics.median(processor))
            print(f"| `{name}` | " + " | ".join(f"{seconds:.3f} s" for seconds in times) + " |")
        else:
            print(f"| `{name}` | not installed | `pip install {name.split()[0]}` | |")
    print(f"\n{runs} runs of each; {_machine()}; load {os.getloadavg()[0]:.1f} at the end.")


def _machine() -> str:
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    return f"{system}, {', '.join(packages)}"


if __name__ == "__main__":
    main()
