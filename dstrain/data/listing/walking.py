"""Goes through folders, and tells why a path can't be read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from dstrain.errors import DstrainError


def walk(
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
        unreadable(Path(error.filename or folder), error)
    # Sorted, so that of two links to one folder the same one is entered on every machine.
    for name in sorted(folders):
        yield from walk(os.path.join(folder, name), wanted, f"{below}{name}/", entered)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself: a file, and said to lead nowhere
        return False


def status_of(path: Path) -> os.stat_result:
    """What `Path.stat` gives. Raises DstrainError where there is no such file, or it can't be read."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        link = path.is_symlink()
        raise DstrainError(
            "broken link" if link else "there is no such file or folder",
            hint="remove it, or create its target"
            if link
            else "a data source is a file, a folder, a pattern, 'stdlib', a data set on the hub like org/name, or code"
            " of your own like my_module:my_documents",
            where=str(path),
        ) from None
    except (OSError, ValueError) as error:
        unreadable(path, error)


def unreadable(path: Path, error: Exception | None = None) -> NoReturn:
    """Raises DstrainError."""
    reason = getattr(error, "strerror", None) or (str(error) if error else "Permission denied")
    raise DstrainError(
        f"can't be read: {reason}", hint="check the path and its permissions", where=str(path)
    ) from error
