"""The cache of tokenized corpora on disk: written once, complete or absent.

``<cache_dir>/<key>/`` holds ``tokens.bin``, ``lengths.npy`` and ``meta.json``, and of conversations ``trained.bin``. Of
files that hold tokens already there is only where the documents are, ``starts.npy`` in place of ``tokens.bin``. It
is written aside and named by one rename, under a lock that makes others wait rather than do the same work. Where a file
system knows no locks, several may do the work, and the first rename wins.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.data.chat.corpus import Corpus, listed_source
from dstrain.data.dataset_summary_cache import TOKEN_FILES
from dstrain.data.listing.sources import Source, changed
from dstrain.data.rows.packing import TokenStream
from dstrain.data.token_files.corpus import TokenFiles
from dstrain.data.token_files.mapped import MappedFile, map_tokens, scan
from dstrain.data.token_files.record_writer import write_token_records
from dstrain.data.token_files.records import TokenRecords
from dstrain.data.tokenizing.text_writer import write_tokens
from dstrain.data.tokenizing.token_output import TRAINED, can_go_on, close_for_good
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.data.tokenizing.worker_pool import WorkerEndedError, available_cores
from dstrain.errors import DstrainError
from dstrain.files import flush
from dstrain.shared_caches import is_own, locked, make_folder
from dstrain.strict_json import to_json

FORMAT = 1
_TOKENS, _LENGTHS, _META = TOKEN_FILES
_STARTS = "starts.npy"
_BYTES_A_WORKER = 4_000_000
_CHECKED_BLOCKS, _BLOCK_BYTES = 64, 1 << 16


@dataclass(frozen=True)
class Tokens:
    """A tokenized corpus.

    Attributes:
        empty_documents: how many documents were empty, or left out.
        content: a hash of the stream's content.
        folder: where it lies.
        stop_tokens: what ends an assistant's turn.
        rendered: whether a chat template was used.
    """

    stream: TokenStream
    empty_documents: int
    content: str
    folder: Path
    stop_tokens: tuple[int, ...] = ()
    rendered: bool = False


def load_or_build(
    source: Corpus, tokenizer: Tokenizer, cache_dir: Path, workers: int | None = None
) -> Tokens:
    """The tokens of `source`, from the cache if they are there and whole, else built into it.

    The key covers the format, the tokenizer's content, what documents begin with, and each file's path, size and
    modification time; of documents that code gives, a hash of their texts. Any number of processes, on any number of
    hosts that share `cache_dir`, may call this at once.

    Args:
        workers: processes that tokenize; 0: this one alone; None: as many as are worth their start.

    Raises:
        DstrainError: the source can't be read, changed meanwhile, or the cache can't be written.
    """
    folder = cache_dir / _key(source, tokenizer)
    workers = worth_starting(source.bytes) if workers is None else workers
    try:
        # Before the lock, so that a complete cache on a read-only disk serves.
        found = _open(folder, tokenizer)
        if found is None and isinstance(source, Source) and source.on_bad_record == "skip":
            # Where a bad record would have been an error, there was none to leave out.
            found = _open(cache_dir / _key(replace(source, on_bad_record="error"), tokenizer), tokenizer)
        if found is not None:
            return found
        make_folder(cache_dir)
        with locked(cache_dir / f"{folder.name}.lock", lambda: _say_waiting(source)) as held:
            found = _open(folder, tokenizer)  # another process may have built it while this one waited
            if found is None:
                if held:
                    _clear_leftovers(folder)
                with _aside(folder, alone=held is True) as aside:
                    _build(source, tokenizer, folder, aside, workers)
                found = _open(folder, tokenizer)
    except OSError as error:
        hint = None
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = f"the corpus has {source.bytes / 1e6:,.0f} MB; its tokens need up to 4 times that"
        raise DstrainError(
            f"the token cache can't be used: {error.strerror or error}",
            hint=hint or "name a cache folder on a writable disk",
            where=str(error.filename or cache_dir),
        ) from error
    if found is None:
        raise DstrainError(
            "the token cache reads back differently from what was written: the disk is faulty",
            hint="name a cache folder on another disk",
            where=str(folder),
        )
    return found


def worth_starting(size: int) -> int:
    """How many worker processes tokenize so many bytes soonest: none for less than what one does while it starts."""
    cores = available_cores()
    return min(cores, size // _BYTES_A_WORKER) if cores > 1 and size >= 2 * _BYTES_A_WORKER else 0


def is_cached(source: Corpus, tokenizer: Tokenizer, cache_dir: Path) -> bool:
    """Whether `load_or_build` would find the tokens."""
    try:
        return _open(cache_dir / _key(source, tokenizer), tokenizer) is not None
    except OSError:  # which it would tell of
        return False


def _key(source: Corpus, tokenizer: Tokenizer) -> str:
    begin = [list(tokenizer.begin_of_document)] if tokenizer.begin_of_document else []
    content = to_json([FORMAT, tokenizer.fingerprint, *begin, *source.state])
    return hashlib.sha256(content.encode()).hexdigest()[:24]


@contextmanager
def _aside(folder: Path, *, alone: bool) -> Iterator[Path]:
    """A folder to write into before it gets its name. Nothing is left behind on failure, but by a process that is
    interrupted: the next one goes on there.

    Args:
        alone: this process holds the lock.
    """
    aside = folder.with_name(
        f"{folder.name}.unfinished" if alone else f"{folder.name}.{uuid.uuid4().hex}.part"
    )
    if not (is_own(aside) and can_go_on(aside)):
        _remove(aside)
        aside.mkdir(mode=0o700)
    try:
        yield aside
    except BaseException as error:
        interrupted = not isinstance(error, Exception) or isinstance(error, WorkerEndedError)
        if not (alone and interrupted and can_go_on(aside)):
            _remove(aside)
        raise
    _remove(aside)  # where another process has given its own the name


def _build(source: Corpus, tokenizer: Tokenizer, folder: Path, aside: Path, workers: int) -> None:
    """Write `folder` aside, flush it to the disk, and name it."""
    names, mapped = [_TOKENS, _LENGTHS], {}
    if isinstance(source, TokenFiles):
        names, mapped = [_LENGTHS, _STARTS], _scanned(source, tokenizer, aside)
        written = mapped.pop("written")
    elif isinstance(source, TokenRecords):
        written = write_token_records(source, tokenizer, aside)
    else:
        written = write_tokens(source, tokenizer, aside, workers)
    if (aside / TRAINED).exists():
        names.append(TRAINED)
    files = listed_source(source)
    if isinstance(files, Source) and changed(files):
        raise DstrainError(
            "the source's files changed while they were being read",
            hint="start again",
            where=source.place,
        )
    meta = {
        "format": FORMAT,
        "source": source.name,
        "tokenizer": tokenizer.name,
        "dtype": tokenizer.dtype.name,
        **asdict(written),
        **mapped,
        "checks": {name: _check(aside / name) for name in names},
    }
    (aside / _META).write_text(to_json(meta, indent=1) + "\n", encoding="utf-8")
    for name in (*names, _META):
        (aside / name).chmod(0o600)
    for name in (*names, _META):
        flush(aside / name)
    close_for_good(aside)
    flush(aside)
    _name(aside, folder, tokenizer)


def _scanned(source: TokenFiles, tokenizer: Tokenizer, aside: Path) -> dict[str, Any]:
    """Where the documents of token files are goes into files, the rest into the meta data: the files stay in place."""
    found = scan(source, tokenizer)
    np.save(aside / _LENGTHS, found.lengths.astype("<i8"), allow_pickle=False)
    np.save(aside / _STARTS, found.starts.astype("<i8"), allow_pickle=False)
    # Whoever opens the cache may stand in another folder.
    files = [{**asdict(file), "path": os.path.realpath(file.path)} for file in found.files]
    return {
        "written": found.written,
        "mapped": files,
        "checks_of_mapped": [_check(Path(file.path)) for file in found.files],
    }


def _name(aside: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """Rename `aside` to `folder`. A damaged folder there is moved out of the way, a whole one is kept."""
    for _ in range(10):
        try:
            aside.rename(folder)
            flush(folder.parent)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
        if _open(folder, tokenizer) is not None:
            return
        # Processes that have mapped the old files keep them until they end.
        damaged = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
        try:
            folder.rename(damaged)
        except FileNotFoundError:
            continue  # without locks another process may have moved it just now
        _remove(damaged)
    raise OSError(errno.EBUSY, "other processes keep replacing this folder", str(folder))


def _open(folder: Path, tokenizer: Tokenizer) -> Tokens | None:
    """The tokens in `folder`; None if it is not there, not complete, not what was written, or another user's."""
    if not all(map(is_own, (folder, folder / _LENGTHS, folder / _META))):
        return None
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        if meta["format"] != FORMAT or meta["dtype"] != tokenizer.dtype.name:
            return None
        if "mapped" in meta:
            return _open_mapped(folder, meta)
        names = [_TOKENS, _LENGTHS, *([TRAINED] if TRAINED in meta["checks"] else [])]
        if not is_own(folder / _TOKENS) or any(
            _check(folder / name) != meta["checks"][name] for name in names
        ):
            return None
        tokens = np.memmap(folder / _TOKENS, dtype=tokenizer.dtype.newbyteorder("<"), mode="r")
        lengths = _numbers(folder / _LENGTHS)
        if (lengths.size, int(lengths.sum()), tokens.size) != (
            meta["documents"],
            meta["tokens"],
            meta["tokens"],
        ):
            return None
        trained = None
        if TRAINED in names:
            if not is_own(folder / TRAINED):
                return None
            trained = np.memmap(folder / TRAINED, dtype=np.uint8, mode="r")
            if trained.size != -(-tokens.size // 8):
                return None
        starts = np.cumsum(lengths, dtype=np.int64)
        starts -= lengths
        stream = TokenStream(tokens, starts, lengths, trained)
        stops = tuple(int(token) for token in meta.get("stop_tokens", ()))
        rendered = bool(meta.get("rendered"))
        return Tokens(stream, int(meta["empty_documents"]), str(meta["content"]), folder, stops, rendered)
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def _numbers(path: Path) -> np.ndarray:
    """A number of each document: int64 [documents], mapped, so that the ranks of a host share it."""
    numbers: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False).astype(np.int64, copy=False)
    return numbers


def _open_mapped(folder: Path, meta: Mapping[str, Any]) -> Tokens | None:
    """Tokens that lie elsewhere. Raises as `_open` expects it."""
    files = [MappedFile(**file) for file in meta["mapped"]]
    if not is_own(folder / _STARTS) or any(
        _check(folder / name) != meta["checks"][name] for name in (_LENGTHS, _STARTS)
    ):
        return None
    if [_check(Path(file.path)) for file in files] != meta["checks_of_mapped"]:
        return None
    lengths, starts = (_numbers(folder / name) for name in (_LENGTHS, _STARTS))
    if (lengths.size, starts.size, int(lengths.sum())) != (
        meta["documents"],
        meta["documents"],
        meta["tokens"],
    ):
        return None
    stream = TokenStream(map_tokens(files), starts, lengths)
    stops = tuple(int(token) for token in meta["stop_tokens"])
    return Tokens(stream, int(meta["empty_documents"]), str(meta["content"]), folder, stops)


def _check(path: Path) -> list[int | str]:
    """A file's size and a hash of 64 blocks of 64 KiB spread over it (all of a file up to 4 MiB).

    Every rank checks at every start, so a corpus of 100 GB can't be read whole; truncated, zeroed and
    exchanged files are what happens, and these are seen.
    """
    size = path.stat().st_size
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as stream:
        if size <= _CHECKED_BLOCKS * _BLOCK_BYTES:
            digest.update(stream.read())
        else:
            for block in range(_CHECKED_BLOCKS):
                stream.seek((size - _BLOCK_BYTES) * block // (_CHECKED_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return [size, digest.hexdigest()]


def _say_waiting(source: Corpus) -> None:
    print(f"dstrain: another process is tokenizing {source.name}; waiting for it", file=sys.stderr)


def _clear_leftovers(folder: Path) -> None:
    """What killed processes left behind. Only under the lock: nobody else is writing then."""
    for path in folder.parent.glob(f"{folder.name}.*.part"):
        _remove(path)


def _remove(path: Path) -> None:
    """Whatever is there. What can't be removed now is left to `_clear_leftovers` of the next build."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
