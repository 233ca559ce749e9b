"""How much host memory a rank may use for a copy of its state."""

from __future__ import annotations

import os
from pathlib import Path

# Beside the copy there must be room for what the training itself may still ask for, and for the disk's cache.
_SHARE = 0.5

# By version of cgroup: its controller, where it lies, the limit's file, that of what is used, and what of this can
# be taken back.
_VERSIONS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    (
        "memory",
        "sys/fs/cgroup/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)


def room_for_copy() -> int:
    """Bytes that this rank may take now: its share of half of what is available on its host.

    0 where that is not known. A rank counts on every other rank of its host taking as much.
    """
    # As DeepSpeed's launcher says and, without it, torch's; at worst all ranks are on this host.
    ranks = next(
        (os.environ[name] for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "WORLD_SIZE") if name in os.environ),
        "1",
    )
    return int(_SHARE * available_memory()) // int(ranks)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes of host memory that can be taken without swapping, within this process's control group; 0 if unknown."""
    try:
        lines = (root / "proc" / "meminfo").read_text(encoding="utf-8").splitlines()
        sizes = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        groups = (root / "proc" / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError, IndexError):
        return 0  # not Linux
    for group in groups:
        _, controllers, path = group.split(":", 2)
        for controller, top, *names in _VERSIONS:
            if controller in controllers.split(","):
                sizes += _left_in_groups(root / top, path, *names)
    return max(0, min(sizes, default=0))


def _left_in_groups(top: Path, path: str, limit: str, used: str, reclaimable: str) -> list[int]:
    """What is left in a control group and in each that holds it; a container sees its own on top."""
    left = []
    folder = top / path.strip("/")
    for group in (folder, *folder.parents):
        if not group.is_relative_to(top):
            break
        try:
            most = int((group / limit).read_text(encoding="utf-8"))
            now = int((group / used).read_text(encoding="utf-8"))
            stat = (group / "memory.stat").read_text(encoding="utf-8").split()
            left.append(most - now + int(stat[stat.index(reclaimable) + 1]))
        except (OSError, ValueError):
            continue  # no such group from here, or the word "max": no limit
    return left
