"""File writes that are atomic and durable, and reads with a bound; none goes through a link.

A folder that is written to decides who may read what is made in it: a file is never open to more people than its
folder is.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dstrain.strict_json import to_json

# Linux needs no right to read a folder for this; others do.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)
LARGEST_JSON = 64_000_000
"""Bytes of a JSON file in a run folder. A plan for a thousand ranks has less than one."""


def kind_of(mode: int) -> str:
    """What a path is that is no regular file: ``a link``, ``a pipe``."""
    return next((kind for is_kind, kind in _KINDS if is_kind(mode)), "no file")


def flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's own entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_to_write(path: Path, flags: int, *, below: Path | None = None) -> int:
    """A descriptor of a regular file, for writing in place; with O_CREAT it is made where it is missing.

    Args:
        flags: of os.open.
        below: a folder that ``path`` lies in, at any depth: no folder between the two may be a link. What leads to
            ``below`` itself may be.

    Raises:
        OSError: as of os.open; and where it is a link, no regular file, or has another name elsewhere (a hard link),
            so that somebody could let it stand for any other file.
    """
    with _folder(path.parent, below) as folder, naming(path):
        try:
            _refuse_other_kinds(os.stat(path.name, dir_fd=folder, follow_symlinks=False), path)
            made = False
        except FileNotFoundError:
            made = True
        mode, widen = _file_mode(folder)
        flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(path.name, flags, mode, dir_fd=folder)
        try:
            _refuse_other_kinds(os.fstat(descriptor), path)
            os.set_blocking(descriptor, True)
            if made and widen:
                os.fchmod(descriptor, mode)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def make_folder(path: Path, *, below: Path | None = None) -> None:
    """Make a folder in one that is there; it is open to as many people as that. One that is there already stays.

    Args:
        below: as for `open_to_write`.

    Raises:
        OSError: it can't be made, or there is something else of this name: a link to a folder, too.
    """
    with _folder(path.parent, below) as folder, naming(path):
        mode = stat.S_IMODE(os.stat(folder).st_mode) & 0o777
        try:
            os.mkdir(path.name, mode, dir_fd=folder)
        except FileExistsError:
            found = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            if not stat.S_ISDIR(found.st_mode):
                raise OSError(
                    errno.ENOTDIR, f"it is {kind_of(found.st_mode)}, and not a folder", str(path)
                ) from None
        else:
            if _is_for_group(mode):
                _set_folder_mode(path, mode)


def make_shared_folder(path: Path, mode: int) -> None:
    """Make a folder with exactly these permissions, whatever the umask; a set-group-ID bit that it inherits stays.

    Raises:
        OSError: it can't be made, or is there already.
    """
    os.mkdir(path, mode & 0o700)
    _set_folder_mode(path, mode)


def write_atomically(
    path: Path, content: str | bytes, *, below: Path | None = None, private: bool = False
) -> None:
    """Write ``content`` beside ``path`` and rename it into place; text as UTF-8. Its folder must be there.

    A link at ``path`` is replaced, not followed.

    Args:
        below: as for `open_to_write`.
        private: with mode 0600 from the first byte on, whoever may read the folder.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    with _folder(path.parent, below) as folder, naming(path):
        aside = f".{path.name}.{secrets.token_hex(8)}.tmp"
        mode, widen = (0o600, False) if private else _file_mode(folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            with open(os.open(aside, flags, mode, dir_fd=folder), "wb") as file:
                if widen:
                    os.fchmod(file.fileno(), mode)
                file.write(data)
            os.replace(aside, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(aside, dir_fd=folder)
            raise


def write_json(path: Path, record: Any, *, below: Path | None = None) -> None:
    """Write ``record`` as indented, strict JSON, atomically."""
    write_atomically(path, to_json(record, indent=2) + "\n", below=below)


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Never waits: a pipe is not read.

    Raises:
        OSError: it is not there, or may not be read.
        ValueError: it is a link, no regular file, or larger than ``most`` bytes.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a socket
            raise ValueError("it is a link, or no file") from None
        raise
    with open(descriptor, "rb") as file, naming(path):
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"it is {kind_of(status.st_mode)}, and not a file")
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most / 1e6:,.0f} MB")
    return content


def read_json(path: Path, most: int = LARGEST_JSON) -> Any:
    """What a JSON file holds. Raises as `read_bounded`; ValueError also where it is no JSON."""
    return parse_json(read_bounded(path, most))


def parse_json(text: str | bytes) -> Any:
    """Raises ValueError where it is no JSON, or nested so deep that no program of ours has written it."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise ValueError("it has a number with too many digits") from None


def umask_in(folder: Path) -> int:
    """The umask for a process that works in ``folder``: nobody gets at its files who does not get into the folder.

    It takes away what this process's own umask does, but in a folder that a group may read (0750): there the group may
    read the files too. Where there is no folder yet, others get nothing.
    """
    try:
        mode = stat.S_IMODE(os.stat(folder).st_mode) & 0o777
    except OSError:
        mode = 0o700
    return 0o027 if _is_for_group(mode) else _own_umask() | (~mode & 0o077)


def open_to_group(path: Path) -> None:
    """Let a group that may read a folder read a file in it that a library has left to its owner alone."""
    mode = stat.S_IMODE(os.stat(path.parent).st_mode) & 0o777
    if _is_for_group(mode):
        os.chmod(path, 0o640)


def make_executable(path: Path) -> None:
    """For all who may read it."""
    mode = stat.S_IMODE(os.stat(path).st_mode)
    os.chmod(path, mode | (mode & 0o444) >> 2)


def _own_umask() -> int:
    with suppress(OSError, ValueError):
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    mask = os.umask(0o077)  # not Linux: it can only be read by being set
    os.umask(mask)
    return mask


def _is_for_group(folder_mode: int) -> bool:
    return folder_mode & 0o077 == 0o050


def _file_mode(folder: int) -> tuple[int, bool]:
    """The permissions of a new file in a folder, of which the umask takes some away; and whether it may not."""
    mode = stat.S_IMODE(os.stat(folder).st_mode) & 0o777
    return (mode & 0o666) | 0o600, _is_for_group(mode)


def _set_folder_mode(path: Path, mode: int) -> None:
    os.chmod(path, mode | (os.stat(path).st_mode & stat.S_ISGID))


def _refuse_other_kinds(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        number = errno.ELOOP if stat.S_ISLNK(status.st_mode) else errno.EINVAL
        raise OSError(number, f"it is {kind_of(status.st_mode)}, and not a file", str(path))
    if status.st_nlink > 1:
        raise OSError(errno.EMLINK, "it is a hard link: the same file has another name", str(path))


@contextmanager
def _folder(path: Path, below: Path | None) -> Iterator[int]:
    """A descriptor of a folder; from ``below`` on it is gone into without following links."""
    start = path if below is None else below
    descriptor = os.open(start, _FOLDER)
    try:
        here = start
        for part in path.relative_to(start).parts:
            here /= part
            try:
                inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENOTDIR):
                    raise OSError(errno.ENOTDIR, "it is a link, and not a folder", str(here)) from None
                error.filename = str(here)
                raise
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError names the whole path: reads and writes name none, and a descriptor's folder is not in it."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise
