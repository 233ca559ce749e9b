"""Which processor and libraries computed some numbers: only the same ones give the same bits."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from pathlib import Path
from typing import Any

OTHER_PROCESSOR = 1e-6
"""Largest relative difference where another processor or library computed: kernels add in another order."""


def fingerprint() -> dict[str, str]:
    """This machine's processor, and the libraries that decide in which order it adds."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        info = ""
    fields = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = " ".join(sorted((known.get("flags") or known.get("Features") or "").split()))
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": " ".join(
            known.get(key, "?") for key in ("model name", "cpu family", "model", "stepping")
        ),
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "torch": importlib.metadata.version("torch"),
        "deepspeed": importlib.metadata.version("deepspeed"),
        "transformers": importlib.metadata.version("transformers"),
    }


def same_numbers(stored: Any, now: Any, tolerance: float) -> bool:
    """Whether two JSON numbers are the same bits, or within a relative tolerance that is not 0."""
    if type(stored) is not type(now):
        return False
    return stored == now or (tolerance > 0 and math.isclose(stored, now, rel_tol=tolerance))


def tolerance(made_on: dict[str, str], elsewhere: float = OTHER_PROCESSOR) -> float:
    """0 where the numbers were made on this very kind of machine, else ``elsewhere``."""
    return 0.0 if made_on == fingerprint() else elsewhere
