"""Caches the summary of a prepared dataset next to its tokens, so that the next plan need not recompute it.

``<cache_dir>/summaries/<key>.json`` holds the summary and the state of the token files that it speaks of. Whoever
looks makes the key anew from the listing of the source, or from the hash of the documents that code gives, so what
changed has another key; and a summary whose
token files are gone or were written since is passed over. The ranks look at the tokens themselves.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dstrain.data.reading.own_documents import TextCorpus
from dstrain.data.tokenizing.tokenizer_files import (
    BYTES,
    CHAT_TEMPLATE_FILES,
    TOKENIZER_FILES,
    tokenizer_folder,
)
from dstrain.shared_caches import is_own, write_own
from dstrain.strict_json import to_json
from dstrain.version import __version__

TOKEN_FILES = ("tokens.bin", "lengths.npy", "meta.json")
"""What a folder of the token cache holds: `dstrain.data.token_cache`. Tokens that are read in place are not in it."""

State = list[list[Any]]
"""Files as [name, bytes, time of the last change of the content, and of anything, in ns]."""


def tokenizer_state(tokenizer: str) -> State:
    """What decides a tokenizer: its files, and the version of transformers that reads them.

    To be taken before the tokenizer is read: what changes meanwhile has another state afterwards.

    Raises:
        DstrainError: there is no such tokenizer.
    """
    if tokenizer == BYTES:
        return []
    return [
        [tokenizer, importlib.metadata.version("transformers")],  # the summary says its name
        # Where the tokenizer's own files do not name its class, the model's do.
        *_state(tokenizer_folder(tokenizer), (*TOKENIZER_FILES, *CHAT_TEMPLATE_FILES, "config.json")),
    ]


def summary_file(
    cache_dir: Path,
    source: TextCorpus,
    tokenizer: State,
    *,
    seq_len: int,
    validation: float,
    pack: bool,
    begin: str,
    records: Sequence[Any] = (),
) -> Path:
    """Where the summary of these choices is kept, if it is. ``records``: the state of `RecordOptions`.

    Another version of dstrain has another: also one of a checkout that was changed, so that no number needs to be
    raised manually.
    """
    here = Path(__file__).parent
    content = to_json(
        [
            __version__,
            _state(here, sorted(str(path.relative_to(here)) for path in here.rglob("*.py"))),
            source.name,
            *source.state,
            tokenizer,
            [seq_len, validation, pack, begin, *records],
        ]
    )
    return cache_dir / "summaries" / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.json"


def read_summary(file: Path) -> dict[str, Any] | None:
    """The summary in ``file``; None where there is none, it is another user's, or its token files are not those that it
    speaks of."""
    if not is_own(file):
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        tokens = file.parents[1] / kept["tokens"]
        names = [name for name in TOKEN_FILES if name in [one[0] for one in kept["state"]]]
        if names not in ([*TOKEN_FILES], [*TOKEN_FILES[1:]]):
            return None
        if not all(map(is_own, (tokens, *(tokens / name for name in names)))):
            return None
        if _state(tokens, TOKEN_FILES) == kept["state"]:
            summary: dict[str, Any] = kept["summary"]
            return summary
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def tokens_of_summary(file: Path) -> Path:
    """The folder of the tokens that a summary speaks of, which `read_summary` has found. Raises OSError."""
    return Path(file.parents[1] / json.loads(file.read_text(encoding="utf-8"))["tokens"])


def keep_summary(file: Path, tokens: Path, summary: dict[str, Any]) -> None:
    """Leave ``summary`` of the tokens in the folder ``tokens`` for others, where the cache can be written."""
    with suppress(OSError):
        kept = {"tokens": tokens.name, "state": _state(tokens, TOKEN_FILES), "summary": summary}
        write_own(file, to_json(kept, indent=1) + "\n")


def _state(folder: Path, names: tuple[str, ...] | list[str]) -> State:
    """Of those of the files that are there."""
    found = []
    for name in names:
        with suppress(FileNotFoundError):
            status = (folder / name).stat()
            found.append([name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return found
