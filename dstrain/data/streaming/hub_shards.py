"""Lists the files of a data set on the hub, for a stream to fetch them one by one. None of them is fetched here.

``python -m dstrain.data.streaming.hub_shards REQUEST.json OUT.json``: the request is that of
`dstrain.data.listing.hub_datasets`. Which files are those of a config and a split, the data sets' library says.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from dstrain.child_process import child_main
from dstrain.data.listing.file_kinds import DELIMITED_SUFFIXES, Kind, kind_of_name
from dstrain.data.listing.hub_datasets import at_newest_commit, explained
from dstrain.data.listing.hub_names import HubName
from dstrain.data.streaming.hub_listing import HubFile, HubListing, read_files, write_files
from dstrain.errors import DstrainError
from dstrain.files import write_json

_READ: dict[str, Kind] = {"parquet": "parquet", "json": "json lines", "csv": "csv", "arrow": "arrow"}
"""The library's modules whose files are read as it reads them."""
_URL = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)@(?P<commit>[^/]+)/(?P<path>.+)")
_NOT_READING = {"name", "version", "data_dir", "data_files", "description"}
"""What of a config does not say how files are read."""
_AT_ONCE = 500


def list_files(name: HubName, cache: Path, note: Callable[[str], object]) -> HubListing:
    """The files of a split, and leave the listing for others.

    Where the hub can't be reached, what was listed before serves, and ``note`` is told of it.

    Raises:
        DstrainError: no such data set, revision, config or split, no right to it, or no network and not listed before;
            or its files are read in a way in which they can't be streamed.
    """
    return at_newest_commit(
        name,
        note,
        "listed",
        read=lambda one: read_files(one, cache),
        make=lambda commit: _listed(name, commit),
        keep=lambda found, one: write_files(found, one, cache),
    )


# Before version 4 the library could run a data set's own code, and asks on the terminal where it is not told.
_NO_CODE: dict[str, Any] = (
    {"trust_remote_code": False}
    if "trust_remote_code" in inspect.signature(datasets.load_dataset_builder).parameters
    else {}
)


def _listed(name: HubName, commit: str) -> HubListing:
    try:
        builder = datasets.load_dataset_builder(name.repository, name.config, revision=commit, **_NO_CODE)
        paths = _paths(name, commit, builder)
        return HubListing(name.repository, commit, tuple(_files(name, commit, paths)))
    except DstrainError:
        raise
    except Exception as error:  # of the library, and of the network
        raise explained(error, name) from error


def _paths(name: HubName, commit: str, builder: Any) -> dict[str, Kind]:
    """The paths of a split's files in the repository."""
    by_split = builder.config.data_files or {}
    if name.split not in by_split:
        raise explained(ValueError(f"Unknown split: {sorted(map(str, by_split))}"), name)
    module = type(builder).__module__.rpartition(".")[2]
    if module not in _READ:
        raise _refusal(name, f"the datasets library reads its files as {module!r}")
    found: dict[str, Kind] = {}
    for url in by_split[name.split]:
        match = _URL.fullmatch(str(url))
        if match is None or match["repository"] != name.repository or match["commit"] != commit:
            raise _refusal(name, f"{url} is not a file of the repository at commit {commit[:12]}")
        path = match["path"]
        kind = kind_of_name(path, named=True)
        if path.lower().endswith(DELIMITED_SUFFIXES):
            kind = "csv"
        if kind != _READ[module]:
            raise _refusal(name, f"{path} is packed, or called otherwise than what it is read as ({module})")
        found[path] = kind
    changed = _changed(builder.config, {"\t"} if all(path.endswith(".tsv") for path in found) else {","})
    if changed:
        raise _refusal(name, f"its files are read with {', '.join(changed)}")
    return found


def _changed(config: Any, separators: set[str]) -> list[str]:
    """How files are read otherwise than it is usual."""
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        usual = field.default_factory() if field.default_factory is not MISSING else field.default
        usual_here = value in separators if field.name in ("sep", "delimiter") and value else value == usual
        if field.name not in _NOT_READING and not usual_here:
            found.append(f"{field.name}={str(value)[:60]!r}")
    return found


def _refusal(name: HubName, reason: str) -> DstrainError:
    return DstrainError(
        f"{name} can't be streamed from the hub: {reason}",
        hint="set data_stream to false, which fetches all of it; or"
        f" hf download {name.repository} --repo-type dataset --local-dir FOLDER, and name what is in it",
    )


def _files(name: HubName, commit: str, kinds: dict[str, Kind]) -> Iterator[HubFile]:
    paths = sorted(kinds)
    for first in range(0, len(paths), _AT_ONCE):
        some = paths[first : first + _AT_ONCE]
        infos = {
            info.path: info
            for info in HfApi().get_paths_info(name.repository, some, revision=commit, repo_type="dataset")
            if isinstance(info, RepoFile)
        }
        for path in some:
            info = infos[path]
            yield HubFile(path, kinds[path], info.size, info.lfs.sha256 if info.lfs else info.blob_id)


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    cache = Path(request.pop("cache"))
    notes: list[str] = []
    list_files(HubName(**request), cache, notes.append)
    write_json(Path(argv[1]), {"notes": notes})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
