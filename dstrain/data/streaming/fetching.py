"""The process that fetches a stream's files from the hub: ``python -m dstrain.data.streaming.fetching FOLDER``.

``request.json`` in the folder says which, in their order. File ``n`` of that order comes into the folder ``n``, and
``n.json`` says what came of it; whoever has read it removes both. A few files lie there at a time, whatever the data
set has: one is read, and some are ahead. Of a file that lies in the hub's own cache, or is kept, only the place is
said.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from huggingface_hub import (
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from dstrain.child_process import child_main
from dstrain.data.streaming.hub_listing import HubFile, HubListing
from dstrain.data.streaming.shard_order import shards_from
from dstrain.errors import DstrainError, os_error_shown
from dstrain.files import write_json
from dstrain.shared_caches import is_own

_PAUSES = (1, 2, 4, 8, 16, 30, 60)
"""Seconds before each further try. The hub's library tries again some times by itself."""
_TIMEOUT = 30.0
_LOOK = 0.02
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
_FOR_GOOD = {401, 403, 404, 410, 451}
"""Answers that stay what they are."""


def fetch_in_order(
    listing: HubListing,
    numbers: Iterable[int],
    folder: Path,
    kept: Path,
    ahead: int,
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Fetch files until there are no more, or one can't be fetched, whose error is left where it would be.

    Args:
        numbers: of the files in the listing.
        ahead: how many lie ready beside the one that is read.
        pause: waits some seconds before a further try.
    """
    waiting: deque[Path] = deque()
    for at, number in zip(count(), numbers, strict=False):
        while waiting and (len(waiting) > ahead or not waiting[0].exists()):
            if waiting[0].exists():
                time.sleep(_LOOK)
            else:
                waiting.popleft()
        answer = folder / f"{at}.json"
        try:
            said = _found(listing, listing.files[number], folder / str(at), kept, pause)
        except DstrainError as error:
            words = {name: getattr(error, name) for name in ("message", "hint", "where")}
            write_json(answer, {"error": words})
            return
        write_json(answer, said)
        waiting.append(answer)


def _found(
    listing: HubListing, file: HubFile, folder: Path, kept: Path, pause: Callable[[float], object]
) -> dict[str, Any]:
    path = kept / file.path
    if is_own(path) and path.stat().st_size == file.size:
        return {"path": str(path), "fetched": False}
    cached = try_to_load_from_cache(
        listing.repository, file.path, revision=listing.commit, repo_type="dataset"
    )
    if isinstance(cached, str) and os.stat(cached).st_size == file.size:
        return {"path": cached, "fetched": False}
    return {"path": str(_fetched(listing, file, folder, pause)), "fetched": True}


def _fetched(listing: HubListing, file: HubFile, folder: Path, pause: Callable[[float], object]) -> Path:
    for seconds in (*_PAUSES, None):
        try:
            return _fetch(listing, file, folder)
        except DstrainError:
            raise
        except Exception as error:  # besides the hub's own, whatever the network raises
            reason = _reason(error, listing, file)
            if seconds is None:
                raise DstrainError(
                    f"this file can't be fetched from the hub: {reason}",
                    where=listing.place(file),
                    hint=f"the network ({constants.ENDPOINT}), then resume the run; or fetch all of it first:"
                    f" {_by_hand(listing)}",
                ) from error
        print(f"dstrain: {file.path}: {reason}; again in {seconds} s", file=sys.stderr, flush=True)
        pause(seconds)
    raise AssertionError


def _fetch(listing: HubListing, file: HubFile, folder: Path) -> Path:
    name, commit = listing.repository, listing.commit
    url = hf_hub_url(name, file.path, repo_type="dataset", revision=commit)
    now = get_hf_file_metadata(url, timeout=_TIMEOUT)
    if (now.etag, now.size) != (file.id, file.size):
        raise DstrainError(
            f"this file is another one than was listed: {now.size:,} bytes with the hash {now.etag}, and {file.size:,}"
            f" bytes with {file.id} were",
            where=listing.place(file),
            hint="what answers is no exact mirror of the hub: see HF_ENDPOINT; start a new run for changed data",
        )
    shutil.rmtree(folder, ignore_errors=True)
    found = hf_hub_download(name, file.path, repo_type="dataset", revision=commit, local_dir=folder)
    size = os.stat(found).st_size
    if size != file.size:
        raise OSError(f"{size:,} of {file.size:,} bytes came")
    return Path(found)


def _reason(error: Exception, listing: HubListing, file: HubFile) -> str:
    """Why a try has failed. Raises DstrainError where another one would fail as well."""
    place = listing.place(file)
    if isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = (
            error.__cause__
        )  # the library looks for a copy of its own before it says why there is no other
    if isinstance(error, OfflineModeIsEnabled):
        raise DstrainError(
            "this file is not here, and HF_HUB_OFFLINE prevents access to the hub",
            where=place,
            hint=f"unset HF_HUB_OFFLINE; or fetch all of it where there is a network: {_by_hand(listing)}",
        ) from error
    if isinstance(error, GatedRepoError | RepositoryNotFoundError):
        raise DstrainError(
            "there is no access to this file's data set (any more)",
            where=place,
            hint=f"see {constants.ENDPOINT}/datasets/{listing.repository}; `hf auth login`, or set HF_TOKEN",
        ) from error
    if isinstance(error, EntryNotFoundError | RevisionNotFoundError):
        raise DstrainError(
            "this file, or its commit, is not on the hub any more",
            where=place,
            hint="start a new run, which lists what there is now",
        ) from error
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in _FOR_GOOD:
            raise DstrainError(
                f"the hub refuses this file: {_first_line(error)}",
                where=place,
                hint="`hf auth login`, or set HF_TOKEN",
            ) from error
        return f"the hub answers {status}"
    if isinstance(error, OSError) and error.errno in _DISK:
        raise os_error_shown(error) from error
    return _first_line(error)


def _by_hand(listing: HubListing) -> str:
    return f"hf download {listing.repository} --repo-type dataset --revision {listing.commit}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]


def numbers_of(asked: Mapping[str, Any]) -> Iterable[int]:
    """Which files are asked for: ``numbers``, or the order of a seed from a position on."""
    if "numbers" in asked:
        found: list[int] = asked["numbers"]
        return found
    return shards_from(asked["seed"], asked["epoch"], asked["position"], asked["count"])


@child_main
def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit code."""
    folder = Path(argv[0])
    asked = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    listing = HubListing.from_json(asked["listing"])
    fetch_in_order(listing, numbers_of(asked), folder, Path(asked["kept"]), asked["ahead"])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
