"""Config keys and run-folder names of version 0.1, and their current names; both are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CONFIG_KEYS: Mapping[str, str] = {"held_out": "validation"}
MEANT_BEFORE: Mapping[str, Any] = {"begin_token": "never", "data_format": "text-0.1"}
"""What a run of a version that did not have the key yet has trained with."""
METRICS: Mapping[str, str] = {"held_out_loss": "validation_loss"}
DATA_SUMMARY: Mapping[str, str] = {
    "held_out_rows": "validation_rows",
    "held_out_documents": "validation_documents",
}


def with_new_names(record: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The same record under the names of today; where it has both, the new one counts."""
    renamed = {names.get(key, key): value for key, value in record.items()}
    return renamed | {key: value for key, value in record.items() if key in names.values()}
