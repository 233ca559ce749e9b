"""Names of data sets on the Hugging Face hub, and listings of what `dstrain.data.listing.hub_datasets` has fetched."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from dstrain.data.listing.file_kinds import (
    DELIMITED_SUFFIXES,
    NAMED_JSON_LINES_SUFFIXES,
    TEXT_SUFFIXES,
    kind_of_name,
)
from dstrain.shared_caches import is_own
from dstrain.strict_json import to_json

_NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?")
_SERVER = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILE_SUFFIXES = (
    *NAMED_JSON_LINES_SUFFIXES,
    *TEXT_SUFFIXES,
    *DELIMITED_SUFFIXES,
    ".bin",
    ".idx",
    ".gz",
    ".zst",
)
TRAIN = "train"
"""The split that is read where none is named."""


@dataclass(frozen=True)
class HubName:
    """What is wanted of the hub.

    Attributes:
        repository: ``org/name``.
        config, split: one of those that it has; no config: its only one, or its default.
        revision: a branch, a tag or a commit; None: what the hub shows.
    """

    repository: str
    config: str | None = None
    split: str = TRAIN
    revision: str | None = None

    @property
    def is_pinned(self) -> bool:
        """Whether it can't change."""
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def listing(self, cache: Path) -> Path:
        """Where is written which files were fetched.

        A branch is another one on another server; a commit is a hash of what it holds.
        """
        server = os.environ.get("HF_ENDPOINT", "").rstrip("/")
        other = [server] if server not in ("", _SERVER) and not self.is_pinned else []
        key = to_json([self.repository, self.config, self.split, self.revision, *other])
        return cache / "hub" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        config = f", config {self.config}" if self.config else ""
        return f"{self.repository}{at}{config}, split {self.split}"


@dataclass(frozen=True)
class Fetched:
    """Files of a data set in the hub library's cache, at a commit."""

    commit: str
    files: tuple[str, ...]


def hub_name(
    source: str, *, config: str | None = None, split: str | None = None, revision: str | None = None
) -> HubName | None:
    """The name that a source is: ``org/name`` or ``org/name@revision``; None where it is a path.

    A folder that is called like the organisation makes it a path with a slip in it: the hub is not told of that.
    """
    match = _NAME.fullmatch(source)
    if match is None or Path(source).expanduser().exists() or Path(source).parts[0] == "..":
        return None
    name = match[1].lower()
    if name.endswith(tuple(_FILE_SUFFIXES)) or kind_of_name(name, named=False) is not None:
        return None
    if Path(Path(source).parts[0]).is_dir():
        return None
    return HubName(match[1], config, split or TRAIN, revision or match[2])


def read_listing(file: Path) -> Fetched | None:
    """What was fetched, where all of it is still there; None else."""
    if not is_own(file):
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        fetched = Fetched(str(found["commit"]), tuple(str(path) for path in found["files"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fetched if fetched.files and all(Path(path).is_file() for path in fetched.files) else None
