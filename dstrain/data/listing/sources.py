"""Finds the files of a corpus by name and size; `documents` reads them.

A source is one of

- ``stdlib``: the modules of the running Python's standard library, a corpus that every machine already has;
- a text file, whatever its name: one document;
- a JSON-lines file (``.jsonl``, ``.ndjson``, ``.json``, packed or not): one record a line;
- a table (``.parquet``, ``.arrow``, ``.feather``, ``.csv``, ``.tsv``): one record a row;
- a folder: all of these in it, found recursively; one that ``datasets.save_to_disk`` has written: its rows;
- files of tokens, which are read in place: see `token_file_kinds`;
- a data set on the hub, ``org/name``, of which the files were fetched: see `hub_datasets`;
- a pattern such as ``data/**/*.parquet``: all files that match.

Files are sorted by their path below the source's root. What the user's own code gives is in `own_documents`.
"""

from __future__ import annotations

import glob
import os
import stat
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dstrain.addresses import refuse_address
from dstrain.data.listing.file_kinds import (
    DELIMITED_SUFFIXES,
    RECORD_KINDS,
    TEXTS_OF_0_1,
    TOKEN_KINDS,
    Kind,
    kind_of_name,
    label_of,
)
from dstrain.data.listing.hub_names import HubName, hub_name, read_listing
from dstrain.data.listing.left_out import Kinds, kind_and_size
from dstrain.data.listing.saved_datasets import DATASET_DICT, saved_files
from dstrain.data.listing.split_names import refuse_both_splits
from dstrain.data.listing.walking import status_of, unreadable, walk
from dstrain.data.reading.delimited import header_of
from dstrain.data.token_files.kinds import index_of, is_token_file, named_by_its_prefix, token_file_kind
from dstrain.errors import DstrainError
from dstrain.files import kind_of

STDLIB = "stdlib"

# What differs between distributions and builds of one Python version, or is no library code.
# fmt: off
_STDLIB_OUT = frozenset({
    "test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3",
    "ensurepip", "_bundled", "turtledemo", "lib-dynload",
})
# fmt: on
_STDLIB_OUT_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class SourceFile:
    """One file: `relative` is its posix path below the source's root, `size` is in bytes."""

    relative: str
    path: str
    kind: Kind
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Choices:
    """What decides, besides their names, which files a source has and how they are read.

    Attributes:
        data_format, data_fields: as in `dstrain.data.chat.options`: a table without their fields may be a text.
        config, split, revision: of a data set that has several.
        cache: the folder of prepared data, where the listings of data sets of the hub are; None: none is looked for.
    """

    data_format: str = "auto"
    data_fields: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    cache: Path | None = None

    @property
    def of_0_1(self) -> bool:
        """Whether the files are those that version 0.1 has read, in its way: a run that has begun with it goes on."""
        return self.data_format == TEXTS_OF_0_1


@dataclass(frozen=True)
class Source:
    """A corpus as a sorted list of files; `name` is what the user wrote, `root` the folder they are in.

    Attributes:
        kinds, left_out: what is read of a folder, and what is not, in words.
        max_document_bytes: the limit that the user set for a document.
        text_field: of records, what holds the document.
        first_text: the place of the record that told that they are texts; empty where that was named.
        on_bad_record: of records that hold texts: whether one without its text is an ``error``, or left out (``skip``).
        choices: what it was found with.
        limit: how many documents are read, from the first; None: all.
        commit: of a data set on the hub.
    """

    name: str
    root: str
    files: tuple[SourceFile, ...]
    kinds: str = ""
    left_out: str = ""
    max_document_bytes: int | None = None
    text_field: str = "text"
    first_text: str = ""
    on_bad_record: str = "error"
    choices: Choices = Choices()
    limit: int | None = None
    commit: str = ""

    @property
    def bytes(self) -> int:
        """Size of all files on disk, in bytes (compressed files as they lie there)."""
        return sum(file.size for file in self.files)

    @property
    def place(self) -> str:
        """Where the corpus is, for messages about all of it: its file if it has one, else its folder."""
        return self.files[0].path if len(self.files) == 1 else self.root

    @property
    def state(self) -> list[Any]:
        """What tells it from every other corpus without reading it, as JSON values.

        The root is part of it: two files of one name and size may share a time too (images that set all times to 0).
        """
        named = [] if self.text_field == "text" else [self.text_field]
        limited = [] if self.limit is None else [{"limit": self.limit}]
        skips = self.on_bad_record == "skip" and any(file.kind in RECORD_KINDS for file in self.files)
        return [
            self.root,
            *named,
            *limited,
            *([{"on_bad_record": "skip"}] if skips else []),
            [(file.relative, file.kind, file.size, file.mtime_ns) for file in self.files],
        ]


@dataclass(frozen=True)
class FormattedSource:
    """A source whose files are read in another way than as texts."""

    source: Source

    @property
    def name(self) -> str:
        """As of a `Source`, and so the others."""
        return self.source.name

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return self.source.files

    @property
    def bytes(self) -> int:
        return self.source.bytes

    @property
    def place(self) -> str:
        return self.source.place


def find_files(
    source: str,
    *,
    data_format: str = "auto",
    data_fields: Mapping[str, str] | None = None,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    cache: Path | None = None,
) -> Source:
    """The files of `source` (see the top of this file), sorted by relative posix path.

    Args: as of `Choices`.

    Raises:
        DstrainError: there is no such path, it may not be read, or it holds nothing that could be text.
    """
    return listed(source, Choices(data_format, data_fields or {}, config, split, revision, cache))


def listed(source: str, choices: Choices) -> Source:
    """`find_files` with these choices."""
    if not source.strip():
        raise DstrainError(
            "no data source given",
            hint="name a text file, a folder, a .jsonl or .parquet file, or 'stdlib'",
            where="data",
        )
    if source == STDLIB:
        _refuse_choices_of_hub(source, choices)
        _refuse_split(source, choices)
        found = _stdlib()
    else:
        refuse_address(source, "data")
        path = Path(source).expanduser()
        name = _hub_name(source, choices)
        if name is None:
            _refuse_choices_of_hub(source, choices)
        if choices.cache is not None and name is not None:
            found = _from_hub(source, name, choices.cache)
        elif glob.has_magic(source) and not os.path.lexists(path):
            _refuse_split(source, choices)
            found = _matching(source, path, choices)
        elif stat.S_ISDIR(status_of(path := named_by_its_prefix(path)).st_mode):
            if not (path / DATASET_DICT).is_file():
                _refuse_split(source, choices)
            found = _saved(source, path, choices) or _folder(source, path, choices)
        else:
            _refuse_split(source, choices)
            found = _single(source, path, choices)
    if not choices.of_0_1:
        refuse_both_splits(found.files, source)
    return replace(found, choices=choices)


def _refuse_choices_of_hub(source: str, choices: Choices) -> None:
    for name, value in (("config", choices.config), ("revision", choices.revision)):
        if value is not None:
            raise DstrainError(
                f"{name} ({value}) is for data sets on the hub, and this is a path here",
                hint=f"remove it, and name the files that are meant: a folder, or a pattern like {source}/*.parquet"
                if Path(source).expanduser().is_dir()
                else "remove it",
                where=source,
            )


def _refuse_split(source: str, choices: Choices) -> None:
    if choices.split is None:
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = f"{source.rstrip('/')}/**/{choices.split}-*.parquet"
        hint = f"remove it, and name the files of the split: a pattern such as '{files}', or a folder with them alone"
    else:
        hint = (
            "remove it; files of one split are named themselves, by a folder with them alone, or by a pattern"
        )
    raise DstrainError(
        f"split ({choices.split}) is for data sets on the hub and for folders in which save_to_disk has written several"
        " splits, and this is neither",
        hint=hint,
        where=source,
    )


def _hub_name(source: str, choices: Choices) -> HubName | None:
    return hub_name(source, config=choices.config, split=choices.split, revision=choices.revision)


def _from_hub(source: str, name: HubName, cache: Path) -> Source:
    fetched = read_listing(name.listing(cache))
    if fetched is None:
        pinned = f", and {name.repository}@{name.revision} as the source" if name.is_pinned else ""
        raise DstrainError(
            f"{name} was not fetched on this machine, or its files are gone from the hub's cache",
            hint=f"run `dstrain plan` here with the same config{pinned}; or name a folder",
            where=source,
        )
    files = []
    for path in map(Path, fetched.files):
        status = status_of(path)
        files.append(SourceFile(path.name, str(path), "arrow", status.st_size, status.st_mtime_ns))
    kinds = f"{_kinds(files)} of {name}, at commit {fetched.commit[:12]}"
    folder = str(Path(fetched.files[0]).parent)
    return Source(source, folder, tuple(files), kinds, commit=fetched.commit)


def changed(source: Source) -> bool:
    """Whether its files are not those any more that were found."""
    return listed(source.name, source.choices).files != source.files


def source_summary(source: Source) -> dict[str, int]:
    """What shows without opening a file: ``files``, ``bytes``, and ``documents`` where each file is one."""
    summary = {"files": len(source.files), "bytes": source.bytes}
    if all(file.kind == "text" for file in source.files):
        # Empty files hold no document, and a size of 0 shows without reading.
        summary["documents"] = sum(file.size > 0 for file in source.files)
    return summary


def _stdlib() -> Source:
    root = Path(sysconfig.get_path("stdlib"))
    if not (root / "os.py").is_file():
        raise DstrainError(
            "this Python has no readable standard library there, so 'stdlib' can't be the data source",
            hint="name a text file, a folder or a .jsonl file",
            where=str(root),
        )

    def wanted(name: str) -> bool:
        return name not in _STDLIB_OUT and not name.startswith(_STDLIB_OUT_PREFIXES)

    files = [
        _file(entry, relative, "text")
        for entry, relative in walk(str(root), wanted)
        if relative.endswith(".py")
    ]
    return Source(STDLIB, str(root), tuple(sorted(files, key=lambda file: file.relative)))


def _single(source: str, path: Path, choices: Choices) -> Source:
    """A file that the user has named."""
    files = _named(path, path.name, choices)
    # What else it could have been does not show in its name.
    said = files[0].kind not in ("text", "json lines") or path.name.lower().endswith(DELIMITED_SUFFIXES)
    return Source(source, str(path.parent.resolve()), tuple(files), str(_kinds(files)) if said else "")


def _named(path: Path, relative: str, choices: Choices) -> list[SourceFile]:
    """A file that is named, and what belongs to it."""
    status = status_of(path)
    if not stat.S_ISREG(status.st_mode):
        raise DstrainError(
            "this is neither a file nor a folder",
            hint="write the text to a file, and name that",
            where=str(path),
        )
    if status.st_size == 0:
        raise DstrainError(
            "the file is empty: there is nothing to train on", hint="name one with text", where=str(path)
        )
    if not os.access(path, os.R_OK):
        unreadable(path)
    kind = kind_of_name(path.name, named=True, of_0_1=choices.of_0_1)
    assert kind is not None, "what is named is read"
    file = SourceFile(relative, str(path), kind, status.st_size, status.st_mtime_ns)
    if choices.of_0_1:
        return [file]
    return _with_tokens(file, choices.data_format) or [_as_table(file, choices)]


def _with_tokens(file: SourceFile, data_format: str) -> list[SourceFile]:
    """The file as one of tokens, and its index if it has one; empty where it is none."""
    path = Path(file.path)
    if not is_token_file(path, data_format):
        return []
    try:
        kind = token_file_kind(path, data_format)
    except OSError as error:
        unreadable(path, error)
    if kind is None:
        return []
    found = [replace(file, kind=kind)]
    if kind == "megatron":
        index = index_of(path)
        status = status_of(index)
        relative = index_of(Path(file.relative)).as_posix()
        found.append(SourceFile(relative, str(index), "index", status.st_size, status.st_mtime_ns))
    return found


def _as_table(file: SourceFile, choices: Choices) -> SourceFile:
    """The file as a table, where it has comma-separated values with the columns of a format."""
    if not file.relative.lower().endswith(DELIMITED_SUFFIXES) or not file.size:
        return file
    if choices.data_format not in ("auto", "text"):  # such records can be in no text
        return replace(file, kind="csv")
    try:
        found = header_of(file.path, choices.data_format, choices.data_fields)
    except OSError as error:
        unreadable(Path(file.path), error)
    return file if found is None else replace(file, kind="csv")


def _matching(source: str, path: Path, choices: Choices) -> Source:
    """The files that a pattern matches, each as if it was named itself."""
    root = Path(*_without_magic(path.parts))
    matches = sorted(glob.glob(str(path), recursive=True))
    # Through a link that leads back, ** finds a file again and again.
    files_at = {
        (os.path.realpath(os.path.dirname(match)), os.path.basename(match)): match for match in matches[::-1]
    }
    found = [Path(match) for match in files_at.values() if not os.path.isdir(match)]
    if not found:
        folders = f": {len(matches):,} folders do" if matches else ""
        raise DstrainError(
            f"no file matches this pattern{folders}",
            hint="'folder/**/*.jsonl' matches at any depth; put a pattern in quotes, so that the shell leaves it alone",
            where=source,
        )
    indexes = {str(index_of(match)) for match in found if match.suffix == ".bin"}
    files = [
        file
        for match in found
        if str(match) not in indexes  # it comes with its file
        for file in _named(match, match.relative_to(root).as_posix(), choices)
    ]
    files.sort(key=lambda file: file.relative)
    return Source(source, str(root.resolve()), tuple(files), str(_kinds(files)))


def _without_magic(parts: tuple[str, ...]) -> list[str]:
    """The folders of a path in front of the first that is a pattern."""
    first = next(at for at, part in enumerate(parts) if glob.has_magic(part))
    return list(parts[:first])


def _saved(source: str, root: Path, choices: Choices) -> Source | None:
    """The files of a data set that was saved there; None where none was."""
    paths = None if choices.of_0_1 else saved_files(root, choices.split)
    if paths is None:
        return None
    files = []
    for path in paths:
        status = status_of(path)
        relative = path.relative_to(root).as_posix()
        files.append(SourceFile(relative, str(path), "arrow", status.st_size, status.st_mtime_ns))
    kinds = f"{_kinds(files)} of a saved data set"
    return Source(source, str(root.resolve()), tuple(files), kinds)


def _folder(source: str, root: Path, choices: Choices) -> Source:
    files: list[SourceFile] = []
    others = Kinds()
    named = choices.data_format if choices.data_format in TOKEN_KINDS else "auto"
    for entry, relative in walk(str(root)):
        kind = kind_of_name(entry.name, named=False, of_0_1=choices.of_0_1)
        if choices.of_0_1:
            if kind is not None:
                files.append(_file(entry, relative, kind))
            else:
                others.add(*kind_and_size(entry, relative))
            continue
        if entry.name == DATASET_DICT:
            raise DstrainError(
                "a data set with several splits lies in this folder",
                hint=f"name the folder of one split, such as {Path(entry.path).parent / 'train'}",
                where=os.path.dirname(entry.path),
            )
        if kind is not None:
            files.append(_as_table(_file(entry, relative, kind), choices))
        elif entry.name.endswith(".bin") and (found := _with_tokens(_file(entry, relative, "text"), named)):
            files += found
        elif entry.name.endswith(".idx") and named_by_its_prefix(Path(entry.path)).suffix == ".bin":
            continue  # it comes with its file
        else:
            others.add(*kind_and_size(entry, relative))
    left_out = str(others)
    if not files:
        seen = f"it contains only {left_out}" if left_out else "the folder is empty"
        raise DstrainError(
            f"no text in this folder: {seen}",
            hint=f"{others.way_out()}supported are .txt, .md, .py etc., .jsonl (also .gz and .zst), .parquet,"
            " .arrow and .csv; a single file may have any name",
            where=str(root),
        )
    if not any(file.size for file in files):
        raise DstrainError(
            f"no text in this folder: all {len(files)} text files are empty"
            + (f"; not read: {left_out}" if left_out else ""),
            hint=others.way_out() or "check that they were copied completely",
            where=str(root),
        )
    if others.unread_bytes > sum(file.size for file in files) and not choices.of_0_1:
        raise DstrainError(
            f"most of this folder would be left out: {others}; read would be {_kinds(files)}",
            hint=f"{others.way_out()}if the rest is what is meant, name a folder with that alone",
            where=str(root),
        )
    ordered = tuple(sorted(files, key=lambda file: file.relative))
    return Source(source, str(root.resolve()), ordered, str(_kinds(files)), left_out)


def _kinds(files: list[SourceFile]) -> Kinds:
    found = Kinds()
    for file in files:
        found.add(label_of(file.relative, file.kind), file.size)
    return found


def _file(entry: os.DirEntry[str], relative: str, kind: Kind) -> SourceFile:
    try:
        status = entry.stat()
    except OSError:
        status = status_of(Path(entry.path))  # says why
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for somebody to write to it
        raise DstrainError(
            f"this is {kind_of(status.st_mode)}, not a file",
            hint="remove it from the folder, or write its text to a file",
            where=entry.path,
        )
    if not os.access(entry.path, os.R_OK):
        unreadable(Path(entry.path))
    return SourceFile(relative, entry.path, kind, status.st_size, status.st_mtime_ns)
