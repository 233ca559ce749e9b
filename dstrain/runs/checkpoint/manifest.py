"""The manifest that makes a checkpoint complete: the files that it lists, and their checksums."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.errors import DstrainError
from dstrain.files import read_bounded, read_json, write_atomically
from dstrain.strict_json import to_json

MANIFEST = "manifest.json"
DAMAGED = "DAMAGED"
"""A file in a checkpoint whose bytes were found to be wrong: why, in one line."""
FORMAT = 2
WHOLE = "`dstrain checkpoints RUN --verify` tells which checkpoints are whole"
"""The way out where a checkpoint's files do not fit each other."""

_LONGEST_NOTE = 100_000  # bytes
_STEP = re.compile(r"step-[0-9]+")
_RUN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of one file. ``sha256`` is None in earlier manifests, which had sizes only."""

    size: int
    sha256: str | None

    def wrong_size(self, name: str, size: int) -> str | None:
        """What to say of a file that has another size; None where it has this one."""
        return None if size == self.size else f"{name} has {size:,} bytes instead of {self.size:,}"


@dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from, None where there is none yet; and the newer ones that are not usable.

    ``passed`` has (name, why) of each, newest first.
    """

    checkpoint: Path | None
    passed: tuple[tuple[str, str], ...] = ()


def make_manifest(
    *,
    step: int,
    run: str,
    identity: Mapping[str, Any],
    config: Mapping[str, Any],
    versions: Mapping[str, str],
    saved_at: float,
    files: Mapping[str, FileRecord],
) -> dict[str, Any]:
    """The record that `read_manifest` gives back.

    Args:
        step: the last step whose update the checkpoint holds.
        run: id of the run that made it.
        identity: `Plan.identity`: what the runs that go on from it must agree with, and the layout.
        config: the run config, of which the hash is kept.
        versions: of what wrote the files, by name.
        saved_at: seconds since 1970.
        files: by path inside the checkpoint.
    """
    record = {
        "format": FORMAT,
        "step": step,
        "run": run,
        "saved_at": round(saved_at, 3),
        "versions": dict(versions),
        "config": digest(config),
        "identity": dict(identity),
        "files": {name: {"size": file.size, "sha256": file.sha256} for name, file in sorted(files.items())},
    }
    return record | {"sha256": digest(record)}


def digest(record: Any) -> str:
    """SHA-256 of a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(to_json(record, sort_keys=True).encode()).hexdigest()


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Raises OSError or ValueError where there is none, half of one, or one that was changed."""
    manifest = read_json(checkpoint / MANIFEST)
    if not isinstance(manifest, dict):
        raise ValueError("it is not a JSON object")
    if "sha256" in manifest or "format" in manifest:  # earlier ones have neither
        rest = {key: value for key, value in manifest.items() if key != "sha256"}
        if manifest.get("sha256") != digest(rest):
            raise ValueError("its own checksum does not match")
        if manifest["format"] != FORMAT:
            raise ValueError(f"it has format {manifest['format']}, and this dstrain reads {FORMAT}")
    return manifest


def files_of(manifest: Mapping[str, Any]) -> dict[str, FileRecord]:
    """Every file that a manifest names. Raises ValueError where it names none."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    if "format" not in manifest:
        return {name: FileRecord(int(size), None) for name, size in files.items()}
    return {name: FileRecord(file["size"], file["sha256"]) for name, file in files.items()}


def named_checkpoints(folder: Path) -> list[Path]:
    """All that bear a checkpoint's name in a run's ``checkpoints/``, whole or not, oldest first; links too."""
    named = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name)]
    return sorted(named, key=step_of)


def half_written(folder: Path) -> list[Path]:
    """What was being written when a run ended."""
    return sorted(folder.glob(".step-*.partial"))


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's ``checkpoints/``, oldest first, as far as manifests and sizes tell."""
    return [path for path in named_checkpoints(folder) if damage_of(path) is None]


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_complete(folder: Path) -> Path | None:
    complete = complete_checkpoints(folder)
    return complete[-1] if complete else None


def damage_of(checkpoint: Path, *, noted: bool = True) -> str | None:
    """Why this is no complete checkpoint, as far as its manifest and the sizes of its files tell; or None.

    Nothing but the manifest is read. With ``noted`` wrong bytes that were found earlier count (`note_damage`).
    """
    if checkpoint.is_symlink():
        return "it is a link"
    try:
        manifest = read_manifest(checkpoint)
        if manifest.get("step") != step_of(checkpoint):
            return f"its manifest belongs to step {manifest.get('step')}"
        files = files_of(manifest)
    except FileNotFoundError:
        return "it has no manifest"
    except OSError as error:
        return f"its manifest can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError) as error:
        return f"its manifest is damaged ({str(error) or type(error).__name__})"
    return missing_or_cut(checkpoint, files) or (_noted(checkpoint) if noted else None)


def missing_or_cut(checkpoint: Path, files: Mapping[str, FileRecord]) -> str | None:
    """The first file that is not there or has another size."""
    sizes = file_sizes(checkpoint)
    for name, file in files.items():
        if name not in sizes:
            return f"{name} is missing"
        if why := file.wrong_size(name, sizes[name]):
            return why
    return None


def unknown_files(checkpoint: Path) -> list[str]:
    """Files that the manifest does not name: ignored, as somebody's notes. Raises as `read_manifest` does."""
    known = files_of(read_manifest(checkpoint))
    return [name for name in file_sizes(checkpoint) if name not in known]


def note_damage(checkpoint: Path, why: str) -> None:
    """Leave word that this checkpoint's bytes are wrong, so that nobody has to read them again to know."""
    write_atomically(checkpoint / DAMAGED, why + "\n", below=checkpoint.parent)


def forget_damage(checkpoint: Path) -> None:
    """Take `note_damage` back."""
    (checkpoint / DAMAGED).unlink(missing_ok=True)


def _noted(checkpoint: Path) -> str | None:
    try:
        text = read_bounded(checkpoint / DAMAGED, _LONGEST_NOTE).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None
    return text.strip() or "its checksums do not match"


def choose_newest(folder: Path, run: str | None, known: Mapping[str, str] | None = None) -> Choice:
    """The newest checkpoint that manifests and sizes make usable for this run.

    Args:
        folder: ``checkpoints/`` of the run folder.
        run: the run's id; None where it is not known.
        known: why some are not usable, by name, found out otherwise.

    Raises:
        DstrainError: there are checkpoints, and none is usable: a run does not silently start from scratch.
    """
    passed: list[tuple[str, str]] = []
    for checkpoint in reversed(named_checkpoints(folder)):
        why = (known or {}).get(checkpoint.name) or damage_of(checkpoint) or of_another_run(checkpoint, run)
        if why is None:
            return Choice(checkpoint, tuple(passed))
        passed.append((checkpoint.name, why))
    if passed:
        reasons = "\n".join(f"  {name}: {why}" for name, why in passed)
        hint = "restore the files from a backup; to train from scratch, start a run under another --name"
        if not all(is_lasting(why) for _, why in passed):
            hint = f"check this disk or network file system, then try again; or {hint}"
        raise DstrainError(
            f"no checkpoint of this run is usable:\n{reasons}",
            where=str(folder),
            hint=hint,
        )
    return Choice(None)


def passed_over(name: str, why: str, used: str) -> str:
    """The line that is said of a checkpoint that was not usable, and of the one that is used instead."""
    return f"{name} is skipped: {why}; the run continues from {used}"


def of_another_run(checkpoint: Path, run: str | None) -> str | None:
    """Why a checkpoint that is whole is not this run's; None where it is, or where an id is not known."""
    try:
        made_by = read_manifest(checkpoint).get("run")
    except (OSError, ValueError) as error:
        return f"its manifest can't be read ({error})"
    if run is None or made_by is None or made_by == run:
        return None
    return f"it belongs to another run ({made_by}, this one is {run})"


def run_id(file: Path, checkpoints: Path) -> str | None:
    """The id of a run: as its file says, else as its newest complete checkpoint does; None where there is none."""
    try:
        text = read_bounded(file, _LONGEST_NOTE).decode("utf-8").strip()
    except (OSError, ValueError):
        text = ""
    if _RUN_ID.fullmatch(text):
        return text
    for checkpoint in reversed(complete_checkpoints(checkpoints)):
        with suppress(OSError, ValueError):
            made_by = read_manifest(checkpoint).get("run")
            if isinstance(made_by, str):
                return made_by
    return None


def keep_run_id(file: Path, checkpoints: Path) -> str:
    """The id of a run; drawn, and written to its file, where it had none."""
    found = run_id(file, checkpoints) or uuid.uuid4().hex[:16]
    write_atomically(file, found + "\n")
    return found


def file_sizes(checkpoint: Path) -> dict[str, int]:
    """Bytes of every file but the manifest and the note of damage, by its path inside the checkpoint. Links and pipes
    are none: what they lead to is nobody's checkpoint, and may never end.

    A run that trains removes old checkpoints at any time: what goes while it is looked at is not in it.
    """
    sizes = {}
    for folder, _, names in os.walk(checkpoint):
        for path in (Path(folder, name) for name in names):
            name = path.relative_to(checkpoint).as_posix()
            if name not in (MANIFEST, DAMAGED):
                with suppress(FileNotFoundError):
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        sizes[name] = status.st_size
    return dict(sorted(sizes.items()))


_CHUNK = 4 * 1024 * 1024


def checksum(path: Path, *, from_disk: bool = False, on_bytes: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits.

    Args:
        from_disk: forget the system's copy in memory first, so that the disk itself is read. Only clean
            pages can be forgotten: call fsync before.
        on_bytes: told how many bytes were read, chunk by chunk.

    Raises:
        OSError: the file can't be read.
    """
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            if on_bytes is not None:
                on_bytes(count)
    return digest.hexdigest()


def wrong_files(
    checkpoint: Path,
    files: Mapping[str, FileRecord],
    names: Iterable[str],
    *,
    on_bytes: Callable[[int], None] | None = None,
) -> dict[str, str]:
    """What is wrong with each of the named files, all of whose bytes are read; empty where nothing is.

    Files of an earlier manifest, which holds no checksums, are read and compared by size.
    """
    found = {}
    for name in names:
        path, record = checkpoint / name, files[name]
        try:
            if why := record.wrong_size(name, path.stat().st_size):
                found[name] = why
            elif checksum(path, on_bytes=on_bytes) != record.sha256 and record.sha256 is not None:
                found[name] = f"{name} does not match its checksum"
        except FileNotFoundError:
            found[name] = f"{name} is missing"
        except OSError as error:
            found[name] = unreadable(name, error)
    return found


def unreadable(name: str, error: OSError | ValueError) -> str:
    """What to say of a file that can't be read now."""
    return f"{name} {_UNREADABLE} ({getattr(error, 'strerror', None) or error})"


_UNREADABLE = "can't be read"


def is_lasting(why: str) -> bool:
    """Whether a reason of `wrong_files` is one of the bytes themselves. A disk or network file system that does not
    give them may do so again: that is no damage to take note of."""
    return _UNREADABLE not in why


def share_out(sizes: Mapping[str, int], parts: int) -> list[list[str]]:
    """The files in ``parts`` shares of about as many bytes each; the same for the same arguments.

    The largest file goes to the smallest share, and so on.
    """
    shares: list[list[str]] = [[] for _ in range(parts)]
    filled = [0] * parts
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = filled.index(min(filled))
        shares[least].append(name)
        filled[least] += sizes[name]
    return shares
