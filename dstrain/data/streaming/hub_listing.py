"""The files of a data set on the hub as they were listed at a commit; a stream fetches them one by one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dstrain.data.listing.file_kinds import Kind, label_of
from dstrain.data.listing.hub_names import TRAIN, HubName
from dstrain.data.listing.left_out import Kinds
from dstrain.data.listing.sources import Choices, Source, SourceFile
from dstrain.shared_caches import is_own, write_own
from dstrain.strict_json import to_json


@dataclass(frozen=True)
class HubFile:
    """A file of the repository.

    Attributes:
        path: in it.
        size: in bytes.
        id: a hash of what it holds.
    """

    path: str
    kind: Kind
    size: int
    id: str


@dataclass(frozen=True)
class HubListing:
    """The files of a split, at a commit.

    Attributes:
        files: sorted by their paths; at least one.
    """

    repository: str
    commit: str
    files: tuple[HubFile, ...]

    @property
    def root(self) -> str:
        """What the files' places begin with in messages."""
        return f"hf://datasets/{self.repository}@{self.commit}"

    def place(self, file: HubFile) -> str:
        """A file in messages."""
        return f"{self.root}/{file.path}"

    def kept_in(self, cache: Path) -> Path:
        """The folder of the files that every process of a host needs, such as the first one."""
        return cache / "hub" / f"{self.repository.replace('/', '--')}@{self.commit}"

    def source(self, name: str, choices: Choices) -> Source:
        """The corpus that the user has called ``name``; none of its files is here."""
        files = tuple(SourceFile(one.path, self.place(one), one.kind, one.size, 0) for one in self.files)
        kinds = Kinds()
        for file in files:
            kinds.add(label_of(file.relative, file.kind), file.size)
        said = f"{kinds} of {self.repository}, split {choices.split or TRAIN}, at commit {self.commit[:12]}"
        return Source(name, self.root, files, said, choices=choices, commit=self.commit)

    def to_json(self) -> dict[str, Any]:
        """As an object of JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> HubListing:
        """The reverse of `to_json`."""
        files = tuple(HubFile(**file) for file in value["files"])
        return cls(str(value["repository"]), str(value["commit"]), files)


def listing_file(name: HubName, cache: Path) -> Path:
    """Where the listing is kept."""
    return name.listing(cache).with_suffix(".files.json")


def read_files(name: HubName, cache: Path) -> HubListing | None:
    """The listing that is kept; None where there is none."""
    path = listing_file(name, cache)
    if not is_own(path):
        return None
    try:
        found = HubListing.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if found.files else None


def write_files(listing: HubListing, name: HubName, cache: Path) -> None:
    """Keep a listing. Raises OSError."""
    write_own(listing_file(name, cache), to_json(listing.to_json(), indent=1) + "\n")
