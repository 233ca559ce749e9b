"""Fetches data sets from the Hugging Face hub into its cache, as Arrow files.

``python -m dstrain.data.listing.hub_datasets REQUEST.json OUT.json``: the request has the attributes of `HubName`, and
``cache``, the folder that the listing of the files goes to. No code of a data set is run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import datasets
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dstrain.child_process import child_main
from dstrain.data.listing.hub_names import Fetched, HubName, read_listing
from dstrain.errors import DstrainError
from dstrain.files import write_json
from dstrain.shared_caches import make_folder, write_own
from dstrain.strict_json import to_json

_SECONDS = 30.0


def fetch(name: HubName, cache: Path, note: Callable[[str], object]) -> Fetched:
    """Fetch a data set, unless its commit is in the cache, and leave the listing for others.

    Where the hub can't be reached, what was fetched before serves, and ``note`` is told of it.

    Raises:
        DstrainError: no such data set, revision, config or split, no right to it, or no network and not in the cache.
    """
    return at_newest_commit(
        name,
        note,
        "fetched",
        read=lambda one: read_listing(one.listing(cache)),
        make=lambda commit: _load(name, commit),
        keep=lambda found, one: _keep(found, one, cache),
    )


class AtCommit(Protocol):
    """What is known of a data set at a commit."""

    @property
    def commit(self) -> str: ...


_Listing = TypeVar("_Listing", bound=AtCommit)


def at_newest_commit(
    name: HubName,
    note: Callable[[str], object],
    done: str,
    *,
    read: Callable[[HubName], _Listing | None],
    make: Callable[[str], _Listing],
    keep: Callable[[_Listing, HubName], None],
) -> _Listing:
    """The listing of a data set as it is on the hub now, kept for what was asked for and for the commit.

    Whoever has planned with that commit goes on with it.

    Args:
        done: what was done to make a listing, in a word.
        read: a listing that is kept.
        make: one of a commit.
        keep: leaves one for others.

    Raises:
        DstrainError: a part of a split is named; or the hub can't be reached, and no listing is kept.
    """
    check_split(name)
    known = read(name)
    if known is not None and name.is_pinned:
        return known
    try:
        commit = find_commit(name)
    except UnreachableError as unreachable:
        if known is None:
            raise not_found(name, unreachable) from unreachable
        note(f"{name}: what was {done} before serves, since {unreachable}")
        found = known
    else:
        pinned = read(replace(name, revision=commit))
        found = next((one for one in (known, pinned) if one and one.commit == commit), None) or make(commit)
    for one in {name, replace(name, revision=found.commit)}:
        if read(one) != found:
            keep(found, one)
    return found


def _keep(found: Fetched, name: HubName, cache: Path) -> None:
    make_folder(cache)
    content = {"name": str(name), "commit": found.commit, "files": list(found.files)}
    write_own(name.listing(cache), to_json(content, indent=1) + "\n")


def check_split(name: HubName) -> None:
    """Raises DstrainError where what is named is a part of a split, or several."""
    if "[" in name.split or "+" in name.split:
        raise DstrainError(
            f"{name.split!r} is not the name of a split",
            hint="name one split; limit takes its first documents, several sources take several splits",
        )


class UnreachableError(Exception):
    """The hub, why, and what may help."""

    def __init__(self, reason: str, way_out: str) -> None:
        super().__init__(reason)
        self.way_out = way_out


def not_found(name: HubName, unreachable: UnreachableError) -> DstrainError:
    """What is no path here, and is not known of the hub."""
    return DstrainError(
        f"{name.repository!r} is not a file or folder here, and {unreachable}",
        hint=f"{_check_path(name)}, or {unreachable.way_out}; a folder with its files works without a network",
    )


def find_commit(name: HubName) -> str:
    """What the revision is now.

    Raises:
        DstrainError: there is no such data set or revision, or no right to it.
        UnreachableError: the hub says nothing.
    """
    page = f"{constants.ENDPOINT}/datasets/{name.repository}"
    try:
        return str(HfApi().dataset_info(name.repository, revision=name.revision, timeout=_SECONDS).sha)
    except GatedRepoError as error:
        raise DstrainError(
            f"{name.repository} is a gated data set, and you have no access",
            hint=f"accept its terms on {page}, then `hf auth login`, or set HF_TOKEN",
        ) from error
    except RevisionNotFoundError as error:
        raise DstrainError(
            f"the data set {name.repository} has no revision {name.revision!r}",
            hint=f"{page}/tree/main lists branches and tags",
        ) from error
    except RepositoryNotFoundError as error:
        raise DstrainError(
            f"{name.repository!r} is neither a file or folder here nor a data set on the hub (or it is private)",
            hint=f"{_check_path(name)}, or the name on {constants.ENDPOINT}/datasets; for a private data set"
            " `hf auth login`, or set HF_TOKEN",
        ) from error
    except HFValidationError as error:
        raise DstrainError(
            f"{name.repository!r} is neither a file or folder here nor a valid name on the hub: {_first_line(error)}",
            hint=_check_path(name),
        ) from error
    except OfflineModeIsEnabled as error:
        raise UnreachableError("HF_HUB_OFFLINE prevents access to the hub", "unset HF_HUB_OFFLINE") from error
    except Exception as error:  # besides the hub's own, whatever the network raises
        what = "does not answer as it should" if isinstance(error, HfHubHTTPError) else "can't be reached"
        raise UnreachableError(
            f"the hub {what}: {_first_line(error)}", f"the network ({constants.ENDPOINT})"
        ) from error


def _check_path(name: HubName) -> str:
    """A path with a slip in it is not asked for on the hub where it shows that it is one."""
    return f"check the path (./{name.repository} is always one here)"


def _load(name: HubName, commit: str) -> Fetched:
    """The files of the split, from the data sets' library, which makes Arrow files of whatever it has."""
    print(f"dstrain: fetching {name}", file=sys.stderr)
    try:
        found = datasets.load_dataset(
            name.repository, name.config, split=name.split, revision=commit, trust_remote_code=False
        )
    except Exception as error:  # of the library, of Arrow, and of the network
        raise explained(error, name) from error
    files = tuple(str(file["filename"]) for file in found.cache_files)
    if not files:
        raise DstrainError(f"{name} holds no rows: there is nothing to train on", hint="name another split")
    return Fetched(commit, files)


def explained(error: Exception, name: HubName) -> DstrainError:
    """What an error of the data sets' library means."""
    text = str(error)
    by_hand = f"hf download {name.repository} --repo-type dataset --local-dir FOLDER, and name what is in it"
    if "Config name is missing" in text:
        return DstrainError(
            f"the data set {name.repository} has several configs, and none is named: {_listed(text)}",
            hint="say which with config",
        )
    if "BuilderConfig" in text and "not found" in text:
        return DstrainError(
            f"the data set {name.repository} has no config {name.config!r}",
            hint=f"its configs are: {_listed(text)}",
        )
    if "Unknown split" in text:
        return DstrainError(
            f"the data set {name.repository} has no split {name.split!r}",
            hint=f"its splits are: {_listed(text)}; say which with split",
        )
    if any(
        words in text for words in ("scripts are no longer supported", "custom code", "dataset script in")
    ):
        return DstrainError(
            f"the data set {name.repository} is made by code of its own, and no code from the hub is run",
            hint="many such data sets have a revision refs/convert/parquet; or make files of it, and name those",
        )
    if isinstance(error, datasets.exceptions.DataFilesNotFoundError | datasets.data_files.EmptyDatasetError):
        return DstrainError(
            f"the data set {name.repository} has no files that the datasets library can read", hint=by_hand
        )
    cause = error.__cause__ or error
    return DstrainError(f"{name} can't be fetched: {_first_line(cause)}", hint=f"try again; or {by_hand}")


def _listed(text: str) -> str:
    """The names in brackets in one of the library's messages."""
    inside = text.partition("[")[2].partition("]")[0]
    return inside.replace("'", "") or "none"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    request = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    cache = Path(request.pop("cache"))
    notes: list[str] = []
    found = fetch(HubName(**request), cache, notes.append)
    write_json(Path(argv[1]), {"commit": found.commit, "files": list(found.files), "notes": notes})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
