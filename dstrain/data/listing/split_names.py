"""Names of files that say which split of a data set they hold: what is kept for a test must not be trained on."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Protocol

from dstrain.data.listing.file_kinds import RECORD_KINDS, TOKEN_KINDS
from dstrain.errors import DstrainError

_TRAIN = "train"
_HELD_BACK = frozenset({"val", "valid", "validation", "test", "dev", "eval"})
_BETWEEN = re.compile(r"[-_./]+")


class _File(Protocol):
    @property
    def relative(self) -> str: ...

    @property
    def kind(self) -> str: ...


def refuse_both_splits(files: Iterable[_File], source: str) -> None:
    """Refuse files of a training split beside those of a split that is kept from training, by their names.

    Only files of records and of tokens: the texts of a program are in ``tests/`` too. The last word of a path counts:
    ``dev/train-0.parquet`` is for training.

    Args:
        files: of one folder, or of one pattern.
        source: as the user named them.

    Raises:
        DstrainError: with a file of each.
    """
    first: dict[bool, tuple[str, str]] = {}
    for file in files:
        if file.kind in RECORD_KINDS or file.kind in TOKEN_KINDS:
            word = _split_of(file.relative)
            if word:
                first.setdefault(word == _TRAIN, (file.relative, word))
    if len(first) < 2:
        return
    (train, _), (held, word) = first[True], first[False]
    folder = f"{source.rstrip('/')}/**/" if Path(source).expanduser().is_dir() else ".../"
    pattern = _pattern(train)
    apart = (
        f"move the files of {word} to a folder of their own"
        if PurePosixPath(held).match(pattern)
        else f"name the files for training with a pattern, such as '{folder}{pattern}'"
    )
    raise DstrainError(
        f"both {train} and {held} would be trained on, and the second is called {word}",
        hint=f"{apart}, and name those of {word} as validation; where all are meant, list a pattern of each as two"
        " sources",
        where=source,
    )


def _split_of(relative: str) -> str:
    words = _BETWEEN.split(relative.lower())
    return next((word for word in reversed(words) if word == _TRAIN or word in _HELD_BACK), "")


def _pattern(relative: str) -> str:
    """What matches a file and its brothers: by the folder that is called train, or by the name."""
    path = PurePosixPath(relative)
    name = path.name.lower()
    if _split_of(name):
        return f"*{_TRAIN}*{''.join(path.suffixes[-2:]) if path.suffix in ('.gz', '.zst') else path.suffix}"
    return f"{next(part for part in reversed(path.parent.parts) if _split_of(part))}/*{path.suffix}"
