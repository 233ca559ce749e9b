"""Puts stand-ins in the place of functions of torch, transformers and DeepSpeed, for the rest of this process."""

from __future__ import annotations

import sys
from typing import Any


def replace(owner: Any, name: str, stand_in: Any) -> Any:
    """Set an attribute that is there; returns what it was."""
    original = getattr(owner, name)
    setattr(owner, name, stand_in)
    return original


def replace_everywhere(original: Any, stand_in: Any) -> None:
    """Set all names of a function, in whatever module has imported it."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name in [name for name, value in names.items() if value is original]:
            setattr(module, name, stand_in)
