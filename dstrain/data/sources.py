"""Finds the files of a corpus by name and size; `documents` reads them.

A source is one of

- ``stdlib``: the modules of the running Python's standard library, a corpus that every machine already has;
- a text file, whatever its name: one document;
- a folder: its text files (one document each) and JSON-lines files, found recursively;
- a JSON-lines file (``.jsonl``, ``.ndjson``, ``.json``, ``.jsonl.gz``): one document a line, in the field ``text``.

What the user's own code gives is in `own_documents`.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from dstrain.addresses import refuse_address
from dstrain.data.left_out import Kinds, kind_and_size
from dstrain.errors import DstrainError
from dstrain.files import kind_of

STDLIB = "stdlib"
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".csv",
    ".tsv", ".log", ".srt", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go",
    ".java", ".kt",
    ".scala", ".js", ".ts", ".jsx", ".tsx", ".rb", ".pl", ".php", ".lua", ".jl", ".r", ".sh", ".bash", ".sql",
    ".swift", ".hs", ".ml", ".el", ".lisp", ".clj", ".ex", ".erl", ".yaml", ".yml", ".toml", ".ini", ".cfg",
})
# fmt: on
JSON_LINES_SUFFIXES = (
    *(".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst"),
)
# Inside a folder .json is usually a config or an index, so it is read as JSON lines only when it is named
# itself, or compressed.
SINGLE_JSON_LINES_SUFFIXES = (*JSON_LINES_SUFFIXES, ".json")

# What differs between distributions and builds of one Python version, or is no library code.
# fmt: off
_STDLIB_OUT = frozenset({
    "test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__", "lib2to3",
    "ensurepip", "_bundled", "turtledemo", "lib-dynload",
})
# fmt: on
_STDLIB_OUT_PREFIXES = ("config-", "_sysconfigdata", "sitecustomize", "usercustomize")

Kind = Literal["text", "json lines"]


@dataclass(frozen=True)
class SourceFile:
    """One file: `relative` is its posix path below the source's root, `size` is in bytes."""

    relative: str
    path: str
    kind: Kind
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Source:
    """A corpus as a sorted list of files; `name` is what the user wrote, `root` the folder they are in.

    Attributes:
        kinds, left_out: what is read of a folder, and what is not, in words.
        max_document_bytes: the limit that the user set for a document.
        text_field: of a JSON-lines file, what holds the document.
    """

    name: str
    root: str
    files: tuple[SourceFile, ...]
    kinds: str = ""
    left_out: str = ""
    max_document_bytes: int | None = None
    text_field: str = "text"

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
        return [
            self.root,
            *named,
            [(file.relative, file.kind, file.size, file.mtime_ns) for file in self.files],
        ]


def find_files(source: str) -> Source:
    """The files of `source` (see the top of this file), sorted by relative posix path.

    Raises:
        DstrainError: there is no such path, it may not be read, or it holds nothing that could be text.
    """
    if not source.strip():
        raise DstrainError(
            "no data source given",
            hint="name a text file, a folder, a .jsonl file, or 'stdlib'",
            where="data",
        )
    if source == STDLIB:
        return _stdlib()
    path = Path(source).expanduser()
    refuse_address(source, "data")
    status = _status(path)
    if stat.S_ISDIR(status.st_mode):
        return _folder(source, path)
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
        _unreadable(path)
    kind: Kind = "json lines" if path.name.lower().endswith(SINGLE_JSON_LINES_SUFFIXES) else "text"
    file = SourceFile(path.name, str(path), kind, status.st_size, status.st_mtime_ns)
    return Source(source, str(path.parent.resolve()), (file,))


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
        for entry, relative in _walk(str(root), wanted)
        if relative.endswith(".py")
    ]
    return Source(STDLIB, str(root), tuple(sorted(files, key=lambda file: file.relative)))


def _folder(source: str, root: Path) -> Source:
    files: list[SourceFile] = []
    others = Kinds()
    for entry, relative in _walk(str(root)):
        name = entry.name.lower()
        if name.endswith(JSON_LINES_SUFFIXES):
            files.append(_file(entry, relative, "json lines"))
        elif os.path.splitext(name)[1] in TEXT_SUFFIXES:
            files.append(_file(entry, relative, "text"))
        else:
            others.add(*kind_and_size(entry, relative))
    left_out = str(others)
    if not files:
        seen = f"it contains only {left_out}" if left_out else "the folder is empty"
        raise DstrainError(
            f"no text in this folder: {seen}",
            hint=f"{others.way_out()}supported are .txt, .md, .py etc., .jsonl and .jsonl.gz; a single file may have"
            " any name",
            where=str(root),
        )
    if not any(file.size for file in files):
        raise DstrainError(
            f"no text in this folder: all {len(files)} text files are empty"
            + (f"; not read: {left_out}" if left_out else ""),
            hint=others.way_out() or "check that they were copied completely",
            where=str(root),
        )
    if others.unread_bytes > sum(file.size for file in files):
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
        name = file.relative.lower()
        json_lines = (suffix for suffix in JSON_LINES_SUFFIXES if name.endswith(suffix))
        found.add(next(json_lines, os.path.splitext(name)[1]), file.size)
    return found


def _walk(
    folder: str,
    wanted: Callable[[str], bool] = lambda name: True,
    below: str = "",
    entered: set[tuple[int, int]] | None = None,
) -> Iterator[tuple[os.DirEntry[str], str]]:
    """Every file below `folder` with its relative posix path. Left out are names that start with a dot (.git,
    .cache), and those that are not `wanted`, with all that lies below them.

    Links to folders are followed, since corpora are often linked together, but no folder is entered twice. With
    entries and not paths: 100,000 files are listed at each start.
    """
    entered = set() if entered is None else entered
    folders = []
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            return
        entered.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not wanted(entry.name):
                    continue
                if _is_folder(entry):
                    folders.append(entry.name)
                else:
                    yield entry, below + entry.name
    except OSError as error:
        _unreadable(Path(error.filename or folder), error)
    # Sorted, so that of two links to one folder the same one is entered on every machine.
    for name in sorted(folders):
        yield from _walk(os.path.join(folder, name), wanted, f"{below}{name}/", entered)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a file, and said to lead nowhere
        return False


def _file(entry: os.DirEntry[str], relative: str, kind: Kind) -> SourceFile:
    try:
        status = entry.stat()
    except OSError:
        status = _status(Path(entry.path))  # says why
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for somebody to write to it
        raise DstrainError(
            f"this is {kind_of(status.st_mode)}, not a file",
            hint="remove it from the folder, or write its text to a file",
            where=entry.path,
        )
    if not os.access(entry.path, os.R_OK):
        _unreadable(Path(entry.path))
    return SourceFile(relative, entry.path, kind, status.st_size, status.st_mtime_ns)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        link = path.is_symlink()
        raise DstrainError(
            "broken link" if link else "there is no such file or folder",
            hint="remove it, or create its target"
            if link
            else "a data source is a text file, a folder, a .jsonl file, 'stdlib', or code of your own like"
            " my_module:my_documents; nothing is downloaded",
            where=str(path),
        ) from None
    except (OSError, ValueError) as error:
        _unreadable(path, error)


def _unreadable(path: Path, error: Exception | None = None) -> NoReturn:
    reason = getattr(error, "strerror", None) or (str(error) if error else "Permission denied")
    raise DstrainError(
        f"can't be read: {reason}", hint="check the path and its permissions", where=str(path)
    ) from error
