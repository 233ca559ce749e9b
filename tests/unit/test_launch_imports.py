from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
import dstrain.launch.hosts, dstrain.launch.devices, dstrain.launch.command, dstrain.supervise.supervisor
import dstrain.supervise.guard, dstrain.launch.environment
heavy = {"torch", "deepspeed", "transformers", "datasets", "numpy", "pydantic"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else 0)
"""


def test_launch_stays_light() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True, timeout=60)
