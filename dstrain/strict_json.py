"""JSON as RFC 8259 has it, which knows no NaN and no Infinity: many readers stop at a file that holds one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(
    value: Any, *, indent: int | None = None, sort_keys: bool = False, ascii_only: bool = True
) -> str:
    """``value`` as JSON text; a float that is no finite number is null.

    Raises:
        TypeError: it holds what JSON does not know.
    """
    options: dict[str, Any] = {
        "indent": indent,
        "sort_keys": sort_keys,
        "ensure_ascii": ascii_only,
        "allow_nan": False,
    }
    try:
        return json.dumps(value, **options)
    except ValueError:
        return json.dumps(_finite(value), **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
