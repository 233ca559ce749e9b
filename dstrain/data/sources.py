"""Which files make up a corpus. Looks at names and sizes only; `documents` reads them.

A source is one of

- ``stdlib``: the modules of the running Python's standard library, a corpus that every machine already has;
- a text file, whatever its name: one document;
- a folder: its text files (one document each) and JSON-lines files, found recursively;
- a JSON-lines file (``.jsonl``, ``.json``, ``.jsonl.gz``): one document a line, in the field ``text``.
"""

from __future__ import annotations

import os
import stat
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from dstrain.errors import DstrainError

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
JSON_LINES_SUFFIXES = (".jsonl", ".jsonl.gz")
# Inside a folder .json is usually a config or an index, so it is read as JSON lines only when it is named
# itself.
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
    """A corpus as a sorted list of files; `name` is what the user wrote, `root` the folder they are in."""

    name: str
    root: str
    files: tuple[SourceFile, ...]

    @property
    def bytes(self) -> int:
        """Size of all files on disk, in bytes (compressed files as they lie there)."""
        return sum(file.size for file in self.files)

    @property
    def place(self) -> str:
        """Where the corpus is, for messages about all of it: its file if it has one, else its folder."""
        return self.files[0].path if len(self.files) == 1 else self.root


def find_files(source: str) -> Source:
    """The files of `source` (see the top of this file), sorted by relative posix path.

    Raises:
        DstrainError: there is no such path, it may not be read, or it holds nothing that could be text.
    """
    if not source.strip():
        raise DstrainError(
            "the data source is empty", hint="name a text file, a folder, a .jsonl file, or 'stdlib'"
        )
    if source == STDLIB:
        return _stdlib()
    path = Path(source).expanduser()
    status = _status(path)
    if stat.S_ISDIR(status.st_mode):
        return _folder(source, path)
    if not stat.S_ISREG(status.st_mode):
        raise DstrainError("this is neither a file nor a folder", where=str(path))
    if status.st_size == 0:
        raise DstrainError("the file is empty: there is nothing to train on", where=str(path))
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
            "this Python keeps no readable standard library there, so 'stdlib' can't be the data source",
            hint="name a text file, a folder or a .jsonl file",
            where=str(root),
        )

    def wanted(name: str) -> bool:
        return name not in _STDLIB_OUT and not name.startswith(_STDLIB_OUT_PREFIXES)

    files = [
        _file(path, relative, "text")
        for path, relative in _walk(root)
        if relative.endswith(".py") and all(wanted(part) for part in relative.split("/"))
    ]
    return Source(STDLIB, str(root), tuple(sorted(files, key=lambda file: file.relative)))


def _folder(source: str, root: Path) -> Source:
    files: list[SourceFile] = []
    others: set[str] = set()
    for path, relative in _walk(root):
        name = path.name.lower()
        if name.endswith(JSON_LINES_SUFFIXES):
            files.append(_file(path, relative, "json lines"))
        elif path.suffix.lower() in TEXT_SUFFIXES:
            files.append(_file(path, relative, "text"))
        else:
            others.add(path.suffix.lower() or path.name)
    if not files:
        seen = f"it holds only {', '.join(sorted(others)[:8])}" if others else "the folder is empty"
        raise DstrainError(
            f"no text in this folder: {seen}",
            hint="read are .txt, .md, .py etc., .jsonl and .jsonl.gz; a single file may have any name",
            where=str(root),
        )
    if not any(file.size for file in files):
        raise DstrainError(f"no text in this folder: all {len(files)} text files are empty", where=str(root))
    return Source(source, str(root.resolve()), tuple(sorted(files, key=lambda file: file.relative)))


def _walk(root: Path) -> Iterator[tuple[Path, str]]:
    """Every file below `root` with its relative posix path. Names that start with a dot are left out (.git,
    .cache).

    Links to folders are followed, since corpora are often linked together, but no folder is entered twice.
    """
    entered: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> NoReturn:
        _unreadable(Path(error.filename or root), error)

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # Sorted, so that of two links to one folder the same one is entered on every machine.
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                path = Path(folder, name)
                yield path, path.relative_to(root).as_posix()


def _file(path: Path, relative: str, kind: Kind) -> SourceFile:
    status = _status(path)
    if not os.access(path, os.R_OK):
        _unreadable(path)
    return SourceFile(relative, str(path), kind, status.st_size, status.st_mtime_ns)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        link = path.is_symlink()
        raise DstrainError(
            "this link leads nowhere" if link else "there is no such file or folder",
            hint=None
            if link
            else "a data source is a text file, a folder, a .jsonl file, or 'stdlib'; nothing is downloaded",
            where=str(path),
        ) from None
    except (OSError, ValueError) as error:
        _unreadable(path, error)


def _unreadable(path: Path, error: Exception | None = None) -> NoReturn:
    reason = getattr(error, "strerror", None) or (str(error) if error else "Permission denied")
    raise DstrainError(f"can't be read: {reason}", where=str(path)) from error
