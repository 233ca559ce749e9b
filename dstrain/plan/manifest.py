"""What makes a checkpoint complete: its manifest, and every file that this names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError

MANIFEST = "manifest.json"


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's ``checkpoints/``, oldest first."""
    named = [path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return [path for path in sorted(named, key=_step) if _is_complete(path)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_complete(folder: Path) -> Path | None:
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises OSError or ValueError where there is none, or half of one."""
    manifest: dict[str, Any] = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    return manifest


def refuse_other(checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of another layout, model or data. Raises DstrainError."""
    saved = read_manifest(checkpoint)["identity"]
    for key, value in identity.items():
        if saved.get(key) != value:
            raise DstrainError(
                f"the checkpoint was made with {key} = {saved.get(key)}, and this run has {value}",
                where=str(checkpoint),
                hint=f"resume with the same {key}, or start a new run under another --name",
            )


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file but the manifest, by its path inside the checkpoint."""
    return {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _is_complete(checkpoint: Path) -> bool:
    try:
        named = read_manifest(checkpoint)["files"]
        sizes = file_sizes(checkpoint)
        return bool(named) and all(sizes.get(name) == size for name, size in named.items())
    except (OSError, ValueError, KeyError):
        return False
