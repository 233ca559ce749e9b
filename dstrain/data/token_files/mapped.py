"""Corpora of files that hold tokens already: they are mapped into memory where they lie, and nothing of them is copied.

Documents are taken as they are. Where a file does not say where they are (``nanogpt``, ``llm.c``), each ends with the
tokenizer's end-of-document token, or begins with its begin token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dstrain.data.listing.sources import SourceFile
from dstrain.data.progress import Progress
from dstrain.data.token_files.corpus import TokenFiles
from dstrain.data.token_files.kinds import LLM_C_HEADER_BYTES, LLM_C_HEADERS, index_of
from dstrain.data.token_files.megatron_index import read_index
from dstrain.data.tokenizing.text_writer import Written
from dstrain.data.tokenizing.tokenizers import Tokenizer
from dstrain.errors import DstrainError, way_out

_BLOCK = 2**22
"""Tokens that are looked at at once."""
_FEWEST, _LARGEST_VOCABULARY = 64, 2**20
"""In so many tokens of 16 bits, every second one is not below 16 by chance, as it is in tokens of 32 bits."""


@dataclass(frozen=True)
class MappedFile:
    """Where in a file tokens lie: ``tokens`` of ``dtype`` from byte ``offset`` on."""

    path: str
    dtype: str
    offset: int
    tokens: int


class MappedTokens:
    """The tokens of several files, one behind the other, by their places.

    Args:
        arrays: each [n] of any whole numbers.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([array.size for array in arrays])
        self.size = int(self._ends[-1])

    def __getitem__(self, at: np.ndarray) -> np.ndarray:
        """int [...] -> int64 [...]."""
        at = np.asarray(at, dtype=np.int64)
        which = np.searchsorted(self._ends, at, side="right")
        found = np.empty(at.shape, dtype=np.int64)
        for number in np.unique(which).tolist():
            here = which == number
            begin = int(self._ends[number - 1]) if number else 0
            found[here] = self._arrays[number][at[here] - begin]
        return found


def map_tokens(files: Sequence[MappedFile]) -> np.ndarray | MappedTokens:
    """The tokens of files, mapped.

    Raises:
        OSError: a file is not there.
        ValueError: it is shorter than it was.
    """
    arrays: list[np.ndarray] = [
        np.memmap(file.path, dtype=file.dtype, mode="r", offset=file.offset, shape=(file.tokens,))
        for file in files
    ]
    return arrays[0] if len(arrays) == 1 else MappedTokens(arrays)


@dataclass(frozen=True)
class Scanned:
    """What was found in token files: ``files`` as they are mapped, and the ``starts`` of documents in all tokens."""

    files: tuple[MappedFile, ...]
    starts: np.ndarray
    lengths: np.ndarray
    written: Written


def scan(corpus: TokenFiles, tokenizer: Tokenizer) -> Scanned:
    """Read all tokens once, up to the file that has the last document of the source's limit.

    Each is checked, and it is seen where documents are.

    The content's hash is that of the same documents from records of tokens.

    Raises:
        DstrainError: a token is none of the tokenizer's, or a file is not what its format says.
    """
    digest = hashlib.blake2b(digest_size=16)
    progress = Progress(f"checking {corpus.name}", corpus.bytes, "bytes")
    files: list[MappedFile] = []
    starts: list[np.ndarray] = []
    lengths: list[np.ndarray] = []
    empty = before = read = 0
    left = corpus.source.limit
    ended = True
    for file in corpus.files:
        if left == 0:
            break
        read += file.size
        if file.kind == "index":
            continue
        try:
            mapped, known = _mapped(file, tokenizer)
            if not mapped.tokens:  # a shard of nothing, or of documents without a token
                of_shard = known[:left].size if known is not None else 0
                empty, left = empty + of_shard, None if left is None else left - of_shard
                continue
            tokens = map_tokens([mapped])
        except OSError as error:
            raise DstrainError(
                f"can't be read: {error.strerror or error}", where=file.path, hint=way_out(error)
            ) from error
        except ValueError as error:  # there is less to map than was there when the files were listed
            raise DstrainError(
                "this file changed while it was being read", where=file.path, hint="start again"
            ) from error
        assert isinstance(tokens, np.ndarray)
        bounds = [np.zeros(1, np.int64)]
        for at, block in _blocks(tokens):
            _check(block, at, tokenizer.vocab_size, file.path)
            if known is None:
                bounds.append(at + _bounds(block, tokenizer))
            progress.update(read - file.size + mapped.offset + (at + block.size) * block.itemsize)
        of_file = known if known is not None else _lengths(bounds, tokens.size)
        of_file = of_file[:left]
        begins = np.cumsum(of_file) - of_file
        kept = of_file > 0
        single = np.flatnonzero(of_file == 1)
        kept[single[tokens[begins[single]] == tokenizer.end_of_document]] = False
        empty += int((~kept).sum())
        _hash(digest, tokens, begins[kept], of_file[kept], tokenizer.dtype)
        ended = ended and bool((tokens[(begins + of_file - 1)[kept]] == tokenizer.end_of_document).all())
        starts.append(before + begins[kept])
        lengths.append(of_file[kept])
        files.append(mapped)
        before += tokens.size
        left = None if left is None else left - of_file.size
    all_lengths = np.concatenate([np.zeros(0, np.int64), *lengths])
    if not all_lengths.size:
        raise DstrainError(
            "no document in this source has a token", hint="name a file with tokens", where=corpus.place
        )
    digest.update(all_lengths.astype("<i8").tobytes())
    written = Written(
        tokens=int(all_lengths.sum()),
        documents=int(all_lengths.size),
        empty_documents=empty,
        content=digest.hexdigest(),
        stop_tokens=(tokenizer.end_of_document,) if ended else (),
    )
    return Scanned(tuple(files), np.concatenate(starts), all_lengths, written)


def _mapped(file: SourceFile, tokenizer: Tokenizer) -> tuple[MappedFile, np.ndarray | None]:
    """Where a file's tokens lie, and the lengths of its documents if it says them."""
    if file.kind == "megatron":
        index = read_index(index_of(Path(file.path)))
        needed = int(index.lengths.sum()) * index.dtype.itemsize
        if needed != file.size:
            raise DstrainError(
                f"this file has {file.size:,} bytes, and its index speaks of {needed:,}",
                hint=f"copy it and {index_of(Path(file.path)).name} again: one of them may be cut off",
                where=file.path,
            )
        return MappedFile(file.path, index.dtype.str, 0, file.size // index.dtype.itemsize), index.lengths
    if file.kind == "llm.c":
        return _llm_c(file), None
    size = _bytes_of_a_token(file, tokenizer)
    return MappedFile(file.path, f"<u{size}", 0, file.size // size), None


def _llm_c(file: SourceFile) -> MappedFile:
    with open(file.path, "rb") as stream:
        content = stream.read(LLM_C_HEADER_BYTES)
    if len(content) < LLM_C_HEADER_BYTES:
        raise DstrainError(
            f"this file has {file.size:,} bytes, and its header alone takes {LLM_C_HEADER_BYTES:,}",
            hint="copy it again: it may be cut off",
            where=file.path,
        )
    header = np.frombuffer(content, dtype="<i4", count=3)
    if (kind := (int(header[0]), int(header[1]))) not in LLM_C_HEADERS:
        raise DstrainError(
            "this file's header is another one than before", hint="start again", where=file.path
        )
    size, tokens = LLM_C_HEADERS[kind], int(header[2])
    needed = LLM_C_HEADER_BYTES + size * tokens
    if needed != file.size:
        raise DstrainError(
            f"this file has {file.size:,} bytes, and its header speaks of {tokens:,} tokens, which take {needed:,}",
            hint="copy it again: it may be cut off",
            where=file.path,
        )
    return MappedFile(file.path, f"<u{size}", LLM_C_HEADER_BYTES, tokens)


def _bytes_of_a_token(file: SourceFile, tokenizer: Tokenizer) -> int:
    """Whether a file without a header has tokens of 16 or of 32 bits: the one that its numbers allow.

    As numbers of 16 bits, tokens of 32 bits are a low half and a small number in turn.
    """
    if not file.size:
        return 2
    if file.size % 2:
        raise DstrainError(
            f"this file has {file.size:,} bytes, which are no whole number of tokens",
            hint="copy it again: it may be cut off",
            where=file.path,
        )
    halves: np.ndarray = np.memmap(file.path, dtype="<u2", mode="r")
    narrow, wide = True, file.size % 4 == 0
    for _, block in _blocks(halves):
        narrow = narrow and int(block.max()) < tokenizer.vocab_size
        wide = wide and int(block.view("<u4").max()) < tokenizer.vocab_size
        if not (narrow or wide):
            break
    if wide and halves.size // 2 >= _FEWEST and tokenizer.vocab_size <= _LARGEST_VOCABULARY:
        return 4
    if narrow and wide:
        raise DstrainError(
            "these may be tokens of 16 bits or of 32: there are too few to tell",
            hint="write them as records of tokens, or with an index as Megatron does",
            where=file.path,
        )
    if narrow or wide:
        return 2 if narrow else 4
    raise DstrainError(
        f"neither as 16 nor as 32 bits are these numbers tokens of the tokenizer, which has {tokenizer.vocab_size:,}",
        hint="name the tokenizer that they were made with",
        where=file.path,
    )


def _blocks(tokens: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for at in range(0, tokens.size, _BLOCK):
        yield at, np.asarray(tokens[at : at + _BLOCK])


def _check(block: np.ndarray, at: int, vocab_size: int, path: str) -> None:
    if int(block.max()) < vocab_size and int(block.min()) >= 0:
        return
    out = (block >= vocab_size) | (block < 0)
    place = int(out.argmax())
    raise DstrainError(
        f"token {at + place:,} is {block[place]}, and the tokenizer has the tokens 0 to {vocab_size - 1:,}",
        hint="name the tokenizer that these tokens were made with",
        where=path,
    )


def _bounds(block: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Where in a block documents begin: behind an end, and at a begin token."""
    bounds = np.flatnonzero(block == tokenizer.end_of_document) + 1
    begin = tokenizer.begin_of_sequence
    if begin is not None and begin != tokenizer.end_of_document:
        bounds = np.concatenate([bounds, np.flatnonzero(block == begin)])
    return bounds


def _lengths(bounds: Sequence[np.ndarray], size: int) -> np.ndarray:
    edges = np.unique(np.concatenate([*bounds, np.array([size])]))
    return np.diff(edges)


def _hash(digest: Any, tokens: np.ndarray, begins: np.ndarray, lengths: np.ndarray, dtype: np.dtype) -> None:
    """Add the tokens of documents, as the cache would hold them."""
    if not begins.size:
        return
    ends = begins + lengths
    breaks = np.flatnonzero(begins[1:] != ends[:-1]) + 1
    for first, last in pairwise([0, *breaks.tolist(), begins.size]):  # documents behind each other
        for at in range(int(begins[first]), int(ends[last - 1]), _BLOCK):
            block = np.asarray(tokens[at : min(at + _BLOCK, int(ends[last - 1]))])
            digest.update(block.astype(dtype.newbyteorder("<")).tobytes())
