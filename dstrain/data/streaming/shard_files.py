"""Where the files of a stream are while they are read: here, or fetched from the hub, one after the other."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from dstrain.child_process import ChildProcess, run_module
from dstrain.data.listing.hub_names import HubName
from dstrain.data.listing.sources import SourceFile
from dstrain.data.streaming.hub_listing import HubListing, read_files
from dstrain.errors import DstrainError
from dstrain.files import write_json
from dstrain.shared_caches import is_own, locked, make_folder

AHEAD = 2
"""Files that are fetched ahead of the one that is read."""
_SHORTEST, _LONGEST = 0.001, 0.05
_OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
_AS_GIVEN: dict[str, str] = {}


def go_offline() -> None:
    """Let this process find nothing on the hub but the files of streams."""
    _AS_GIVEN.update({name: os.environ.get(name, "") for name in _OFFLINE})
    os.environ.update(dict.fromkeys(_OFFLINE, "1"), HF_HUB_DISABLE_TELEMETRY="1")


class ShardFiles(Protocol):
    """Gives the files of a stream to read."""

    def taken(self, file: SourceFile) -> Any:
        """A context with the file as it lies here. Raises DstrainError where it can't be had."""


class LocalFiles:
    """Files that are here."""

    @contextmanager
    def taken(self, file: SourceFile) -> Iterator[SourceFile]:
        """The file itself."""
        yield file


@dataclass(frozen=True)
class HubFiles:
    """The files of a data set on the hub.

    Attributes:
        cache: the folder of prepared data.
        passing: where files lie while they are read in the order of the stream; None: all are kept.
    """

    listing: HubListing
    cache: Path
    passing: Path | None = None

    @classmethod
    def open(cls, name: HubName, cache: Path, passing: Path | None = None) -> HubFiles:
        """Of the listing that is kept, or is made now.

        Raises:
            DstrainError: the files can't be listed.
        """
        listing = read_files(name, cache)
        if listing is None:
            with tempfile.TemporaryDirectory() as folder:
                asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
                write_json(asked, {**vars(name), "cache": str(cache)})
                run_module(
                    "dstrain.data.streaming.hub_shards", str(asked), str(answered), environment=_AS_GIVEN
                )
            listing = read_files(name, cache)
        if listing is None:
            raise DstrainError(
                f"the list of the files of {name} can't be kept",
                where=str(cache),
                hint="set DSTRAIN_CACHE to a folder that can be written, and by nobody else",
            )
        return cls(listing, cache, passing)

    def kept(self) -> KeptFiles:
        """To read some of them, again and again."""
        return KeptFiles(self)

    @contextmanager
    def in_order(self, seed: int, epoch: int, position: int, count: int) -> Iterator[ShardFiles]:
        """To read the first ``count`` of them in the order of a stream, from a position on."""
        if self.passing is None:
            yield self.kept()
            return
        order = {"seed": seed, "epoch": epoch, "position": position, "count": count}
        with _Fetching(self, self.passing, order, AHEAD) as found:
            yield found


class KeptFiles:
    """Files that stay in the cache for all processes of this host."""

    def __init__(self, files: HubFiles) -> None:
        self._files = files
        self._folder = files.listing.kept_in(files.cache)
        self._elsewhere: dict[str, str] = {}

    @contextmanager
    def taken(self, file: SourceFile) -> Iterator[SourceFile]:
        """The file, which is fetched where it is not here yet."""
        path = self._elsewhere.get(file.relative) or self._kept(file)
        yield replace(file, path=path, mtime_ns=os.stat(path).st_mtime_ns)

    def _kept(self, file: SourceFile) -> str:
        path = self._folder / file.relative
        if _is_whole(path, file):
            return str(path)
        make_folder(path.parent)
        with locked(self._folder.with_name(f"{self._folder.name}.lock"), self._say_waiting):
            if not _is_whole(path, file):
                return self._fetched(path, file)
        return str(path)

    def _fetched(self, path: Path, file: SourceFile) -> str:
        files = self._files
        number = next(at for at, one in enumerate(files.listing.files) if one.path == file.relative)
        folder = self._folder.with_name(f"{secrets.token_hex(8)}.part")
        with _Fetching(files, folder, {"numbers": [number]}, 0) as found, found.taken(file) as fetched:
            if not Path(fetched.path).is_relative_to(folder):  # it lies in the hub's cache
                self._elsewhere[file.relative] = fetched.path
                return fetched.path
            os.chmod(fetched.path, 0o600)
            os.replace(fetched.path, path)
        return str(path)

    def _say_waiting(self) -> None:
        print(
            f"dstrain: waiting for another process that fetches {self._files.listing.repository}",
            file=sys.stderr,
        )


def _is_whole(path: Path, file: SourceFile) -> bool:
    return is_own(path) and path.stat().st_size == file.size


class _Fetching:
    """Files that another process fetches in an order, and that are gone when they were read; used as a context."""

    def __init__(self, files: HubFiles, folder: Path, order: Mapping[str, Any], ahead: int) -> None:
        self._folder = folder
        make_folder(folder)
        asked = {
            "listing": files.listing.to_json(),
            "kept": str(files.listing.kept_in(files.cache)),
            "ahead": ahead,
        }
        write_json(folder / "request.json", {**asked, **order})
        self._next = 0
        environment = {
            **os.environ,
            **_AS_GIVEN,
            "PYTHONWARNINGS": "ignore",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._process = ChildProcess(
            "dstrain.data.streaming.fetching", [str(folder)], environment, own_stderr=True
        )

    def __enter__(self) -> _Fetching:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.__exit__(None, None, None)
        shutil.rmtree(self._folder, ignore_errors=True)

    @contextmanager
    def taken(self, file: SourceFile) -> Iterator[SourceFile]:
        """The file, which is the next one of the order. Waits until it is there.

        Raises:
            DstrainError: it can't be fetched, or the process that fetches has ended.
        """
        answer = self._folder / f"{self._next}.json"
        said = self._answered(answer)
        if "error" in said:
            raise DstrainError(**said["error"])
        folder = self._folder / str(self._next)
        self._next += 1
        path = Path(said["path"])
        assert path.as_posix().endswith(file.relative), (path, file.relative)
        try:
            yield replace(file, path=str(path), mtime_ns=path.stat().st_mtime_ns)
        finally:
            if said["fetched"]:
                shutil.rmtree(folder, ignore_errors=True)
            with suppress(FileNotFoundError):
                answer.unlink()

    def _answered(self, path: Path) -> Mapping[str, Any]:
        pause = _SHORTEST
        while True:
            over = self._process.has_ended()
            with suppress(FileNotFoundError):
                said: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
                return said
            if over:
                raise DstrainError(
                    "the process that fetches files from the hub has been killed",
                    where=str(self._folder),
                    hint="what is killed has often run out of memory (see dmesg); its log says more",
                    exit_code=1,
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)
